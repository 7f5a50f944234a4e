# An image with the pinned packages; runs are written to /workspace/runs.
#
#   docker build -t gpt2-lab .
#   docker build -t gpt2-lab:cuda --build-arg DEVICE=cuda .
#   docker run --rm -it -v "$PWD/runs:/workspace/runs" gpt2-lab python train.py task=pretrain model=nano
#   docker run --rm -it --gpus all --shm-size 8g -v "$PWD/runs:/workspace/runs" gpt2-lab:cuda python train.py
FROM python:3.12-slim

ARG DEVICE=cpu

# make for the commands of the README, a C++ compiler for torch.compile
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /workspace
COPY requirements.txt requirements-lock.txt setup.sh ./
# There is no driver while the image is built, so setup.sh installs the CPU build of torch.
RUN ./setup.sh \
    && if [ "$DEVICE" = cuda ]; then \
           .venv/bin/pip install --force-reinstall -c requirements-lock.txt "$(grep '^torch==' requirements.txt)" \
               --index-url https://pypi.org/simple; \
       fi \
    && rm -rf /root/.cache/pip
COPY . .
RUN touch .venv/.ready

ENV PATH=/workspace/.venv/bin:$PATH
CMD ["python", "train.py", "--help"]
