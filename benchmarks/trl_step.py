"""Training step of TRL's distillation, for comparison; run it in an environment with TRL.

    /path/to/trl-environment/bin/python -m benchmarks.trl_step --loop gkd --corpus DIR --tokenizer DIR --teacher DIR …

    gkd        GKDTrainer as a plain trainer; a sequence has one prompt token, its minimum, and `context` targets
    chunked    the loss of DistillationTrainer, which holds no logits of the whole batch, in a loop of a dozen lines
    compiled   the same with both models compiled
    liger      the fused Jensen–Shannon divergence of Liger in the same loop, both models compiled; on a GPU

Prints one JSON object: {"milliseconds", "before_model", "peak", "targets", "trl"}; on a GPU the bytes are its
allocator's. The student is a GPT-2 with random weights.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl
from datasets import Dataset
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from trl.experimental.gkd import GKDConfig, GKDTrainer

from gpt2lab.system.device import peak_memory_bytes, reset_peak_memory
from gpt2lab.system.malloc_tuning import keep_freed_memory

IGNORE_INDEX = -100


def dataset(corpus: Path, context: int, sequences: int) -> Dataset:
    """Build a tokenized data set with rows of context + 1 tokens: one prompt token, the rest targets."""
    tokens = np.fromfile(corpus / "train.bin", dtype=np.uint16, count=sequences * (context + 1))
    rows = tokens.reshape(sequences, context + 1).astype(np.int64).tolist()
    masks = [[0] + [1] * context] * sequences
    return Dataset.from_dict({"input_ids": rows, "completion_mask": masks, "prompt": ["0"] * sequences})


def settings(options: argparse.Namespace, folder: str) -> GKDConfig:
    """Build a configuration without generation, evaluation, saving, logging and activation checkpointing."""
    return GKDConfig(
        output_dir=folder,
        lmbda=0.0,
        seq_kd=False,
        beta=options.beta,
        disable_dropout=True,
        max_length=options.context + 1,
        per_device_train_batch_size=options.batch,
        max_steps=options.steps,
        optim="adamw_torch_fused",
        learning_rate=1e-3,
        weight_decay=0.1,
        max_grad_norm=1.0,
        use_cpu=not torch.cuda.is_available(),
        bf16=options.precision == "bf16",
        fp16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )


def build_models(options: argparse.Namespace, tokenizer: Any) -> tuple[GPT2LMHeadModel, GPT2LMHeadModel]:
    """Return a student with random weights and the teacher."""
    torch.manual_seed(0)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"n_layer": options.layers, "n_head": options.heads, "n_embd": options.width, "n_positions": 1024}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    student = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), use_cache=False, **sizes, **dropout, **ends))
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    return student, GPT2LMHeadModel.from_pretrained(options.teacher, dtype=dtype)


def train_gkd(options: argparse.Namespace, tokenizer: Any, rows: Dataset) -> int:
    """Train with GKDTrainer and return the target tokens of a step."""
    student, teacher = build_models(options, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=settings(options, folder),
            train_dataset=rows,
            processing_class=tokenizer,
        )
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.train()
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())


def trl_divergence(hidden: Tensor, target: Tensor, weight: Tensor, target_weight: Tensor, beta: float) -> Tensor:
    """Compute TRL's chunked loss: hidden states (B, T, D) and head (V, D) of the student, then the teacher's."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    mask = torch.ones(hidden.shape[:2], device=hidden.device)
    return _chunked_divergence_loss(hidden, target, weight, target_weight, mask, beta)[0]


def liger_divergence(hidden: Tensor, target: Tensor, weight: Tensor, target_weight: Tensor, beta: float) -> Tensor:
    """Compute Liger's fused loss of the same; autocast does not apply to it."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    student = hidden.flatten(0, 1).to(target_weight.dtype), weight.to(target_weight.dtype)
    teacher = target.flatten(0, 1).to(target_weight.dtype), target_weight
    return LigerFusedLinearJSD(jsd_beta=beta)(*student, *teacher)


def train_in_a_loop(options: argparse.Namespace, tokenizer: Any, rows: Dataset) -> int:
    """Train with a loss that holds no logits of the whole batch, in bf16 by autocast; return the targets of a step."""
    divergence = liger_divergence if options.loop == "liger" else trl_divergence
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student, teacher = (model.to(device) for model in build_models(options, tokenizer))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    bodies = [student.transformer, teacher.eval().transformer]
    if options.loop != "chunked":
        bodies = [torch.compile(body) for body in bodies]
    heads = student.lm_head.weight, teacher.lm_head.weight
    ids = torch.tensor(rows["input_ids"])[:, :-1].contiguous().to(device)  # at once, so that no step waits for it
    for inputs in ids.split(options.batch):
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            hidden = bodies[0](inputs, use_cache=False)[0]
            with torch.no_grad():
                target = bodies[1](inputs, use_cache=False)[0]
            loss = divergence(hidden, target, *heads, options.beta)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return options.batch * options.context


class StepClock:
    """Record the ends of all optimizer steps; as in step_times.py, a step is the time between two of them.

    On a GPU its own clock records them, so that no step waits for the one before.
    """

    def __init__(self) -> None:
        self.ended: list[float] = []
        self.events: list[torch.cuda.Event] = []
        register_optimizer_step_post_hook(self._stepped)

    def _stepped(self, *_unused: Any) -> None:
        if torch.cuda.is_available():
            self.events.append(torch.cuda.Event(enable_timing=True))
            self.events[-1].record()
        else:
            self.ended.append(time.perf_counter())

    @property
    def milliseconds(self) -> float:
        """Median step after the first quarter."""
        steps = (np.diff(self.ended) * 1e3).tolist()
        if self.events:
            torch.cuda.synchronize()
            steps = [before.elapsed_time(after) for before, after in pairwise(self.events)]
        return statistics.median(steps[len(steps) // 4 :])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the median step, and the bytes in use before the model is built and at the peak."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    rows = dataset(options.corpus, options.context, options.batch * options.steps)
    torch.empty(0, device=device)  # starts CUDA, without which there is no peak to reset
    before_model = reset_peak_memory(device)
    clock = StepClock()
    targets = (train_gkd if options.loop == "gkd" else train_in_a_loop)(options, tokenizer, rows)
    return {
        "milliseconds": clock.milliseconds,
        "before_model": before_model,
        "peak": peak_memory_bytes(device),
        "targets": targets,
        "trl": trl.__version__,
    }


def option_parser(description: str, loops: Sequence[str], sizes: Sequence[str]) -> argparse.ArgumentParser:
    """Build a parser of the options of every loop; `sizes` are the integers beyond the student's and the batch's."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--loop", choices=loops, default=loops[0])
    for name in ("tokenizer", "teacher"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("layers", "heads", "width", "batch", "steps", "threads", *sizes):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16"), required=True)
    parser.add_argument("--beta", type=float, required=True, help="0 forward KL, 1 reverse KL, between them JSD")
    parser.add_argument("--keep-freed-memory", action="store_true", help="as train.py does on a CPU")
    return parser


def print_measured(options: argparse.Namespace, measured: Callable[[argparse.Namespace], dict[str, Any]]) -> None:
    """Set the threads and the allocator, measure and print one JSON object."""
    torch.set_num_threads(options.threads)
    if options.keep_freed_memory and not keep_freed_memory():
        raise SystemExit("This C library has no mallopt.")
    with contextlib.redirect_stdout(sys.stderr):  # the trainer prints a summary
        found = measured(options)
    print(json.dumps(found))


def main() -> None:
    parser = option_parser(__doc__.splitlines()[0], ("gkd", "chunked", "compiled", "liger"), ("context",))
    parser.add_argument("--corpus", type=Path, required=True)
    print_measured(parser.parse_args(), measure)


if __name__ == "__main__":
    main()
