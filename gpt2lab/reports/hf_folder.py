"""Hugging Face folder: export a GPT-2 with tokenizer, generation settings and model card, and verify it."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, GPT2LMHeadModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from gpt2lab.data.tokenizer import load_tokenizer, tokenizer_hash
from gpt2lab.errors import ExportError
from gpt2lab.reports.model_card import FILE, write_card
from gpt2lab.storage.atomic_files import replaced_folder, write_json
from gpt2lab.storage.model_folder import read_objective, read_pair_template
from gpt2lab.storage.stored_weights import UNREADABLE

DAMAGED: tuple[type[Exception], ...] = (RuntimeError, SafetensorError, *UNREADABLE)
TOLERANCE = 1e-5  # largest absolute difference of logits between this process and a new one

# Fields of tokenizer_config.json that describe this machine or the class in memory, not the tokenizer
NOT_EXPORTED = (
    *("name_or_path", "is_local", "local_files_only", "tokenizer_file", "special_tokens_map_file"),
    *("backend", "auto_map", "processor_class", "extra_special_tokens"),
)

# Runs with transformers only: the project is not on the path. Logits come through a pipe, which needs no disk space.
FRESH_PROCESS = """
import io
import sys
import torch
torch.tanh(torch.ones(1))  # on one thread, see gpt2lab/system/mkl_warmup.py
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
given = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=True)
AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(given["input_ids"]).logits
print((logits - given["logits"]).abs().max().item())
"""


def write_hf_folder(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: Mapping[str, Any],
    export_adapter: Callable[[Path], bool] | None = None,
) -> None:
    """Write `folder`, replacing an existing one atomically.

    Args:
        model: GPT-2 in the layout of transformers, on the CPU.
        card: facts of the model card (model_card.py).
        export_adapter: writes a PEFT adapter into the given folder and returns whether there is one.

    Raises:
        RuntimeError: a tensor read back differs from the one written.
    """
    end_of_text = tokenizer.eos_token_id
    model.config.bos_token_id = model.config.eos_token_id = end_of_text
    model.generation_config = GenerationConfig(
        bos_token_id=end_of_text, eos_token_id=end_of_text, pad_token_id=end_of_text
    )
    with replaced_folder(folder) as scratch:
        _save_quietly(model, scratch)
        _save_tokenizer(tokenizer, scratch, model.config.n_positions)
        write_card(scratch, card, tokenizer)
        if export_adapter is not None:
            export_adapter(scratch / "adapter")
        for weights in scratch.rglob("*.safetensors"):  # safetensors ignores the umask: readable by the owner only
            weights.chmod((scratch / FILE).stat().st_mode)
        _compare_tensors(model, scratch / "model.safetensors")


def holds_model(folder: Path, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a folder that `write_hf_folder` has written still holds this model and tokenizer.

    Adapters may have been merged on another device, with other rounding.
    """
    try:
        _compare_tensors(model, folder / "model.safetensors", rounding=TOLERANCE)
        GenerationConfig.from_pretrained(folder)
        stored = load_tokenizer(str(folder)), read_objective(folder), read_pair_template(folder)
    except DAMAGED:
        return False
    config = model.config.to_dict()
    expected = tokenizer, config.get("objective", "clm"), config.get("pair_template", {})
    return tokenizer_hash(stored[0]) == tokenizer_hash(expected[0]) and stored[1:] == expected[1:]


def verify_in_fresh_process(folder: Path, input_ids: Tensor, logits: Tensor) -> float:
    """Load `folder` with transformers only, offline, in a new process; return the largest difference of its logits.

    Args:
        input_ids: (B, T) int64.
        logits: (B, T, V) fp32 of the folder's model in this process.

    Raises:
        ExportError: it does not load, or its logits differ by more than 1e-5.
        OSError: the process could not be started, was killed, or had no disk space.
    """
    given = io.BytesIO()
    torch.save({"input_ids": input_ids, "logits": logits}, given)
    # -P removes the script's folder from the path, -E ignores PYTHONPATH: this project cannot be imported there.
    command = [sys.executable, "-PE", "-c", FRESH_PROCESS, str(folder.resolve()), str(torch.get_num_threads())]
    environment = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        command,
        cwd=folder.parent,
        env={**_environment(), **environment},
        input=given.getvalue(),
        capture_output=True,
        check=False,
    )
    stderr = result.stderr.decode(errors="replace")[-2000:]
    if result.returncode < 0 or os.strerror(errno.ENOSPC) in stderr:
        last = stderr.strip().splitlines()[-1:]
        raise OSError(f"{folder} could not be verified: {last[0] if last else signal.Signals(-result.returncode).name}")
    if result.returncode:
        raise ExportError(f"{folder} does not load in a process with transformers only:\n{stderr}")
    difference = float(result.stdout.split()[-1])
    if not difference <= TOLERANCE:
        raise ExportError(
            f"The logits of {folder} differ by {difference:.1e} in a new process; at most 1e-5 is allowed."
        )
    return difference


def _save_quietly(model: GPT2LMHeadModel, folder: Path) -> None:
    """Call `save_pretrained` without its progress bar, which would interrupt the run's."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder)
    if shown:
        transformers_logging.enable_progress_bar()


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, positions: int) -> None:
    """Save tokenizer.json and a tokenizer_config.json that transformers 4 and 5 load alike, on any machine.

    Version 5 names a class that version 4 lacks, and lists extra special tokens under another name.
    """
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = {name: value for name, value in json.loads(file.read_bytes()).items() if name not in NOT_EXPORTED}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": positions}
    config["model_input_names"] = ["input_ids", "attention_mask"]  # GPT-2 would add embeddings of token_type_ids
    splitting = json.loads((folder / "tokenizer.json").read_bytes())["pre_tokenizer"] or {}
    if "add_prefix_space" in splitting:  # version 4 overwrites it by the one in this file
        config["add_prefix_space"] = splitting["add_prefix_space"]
    if tokenizer.extra_special_tokens:
        config["additional_special_tokens"] = list(tokenizer.extra_special_tokens)
    write_json(file, config)


def _environment() -> dict[str, str]:
    """Return the environment without the variables of a rank."""
    return {name: value for name, value in os.environ.items() if name not in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}}


def _compare_tensors(model: GPT2LMHeadModel, file: Path, rounding: float = 0.0) -> None:
    written = load_file(file)
    expected = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}  # tied to wte
    if written.keys() != expected.keys():
        raise RuntimeError(f"{file} differs from the model in {sorted(written.keys() ^ expected.keys())[:3]}.")
    for name, tensor in expected.items():
        if not torch.allclose(written[name], tensor, rtol=rounding, atol=rounding):
            raise RuntimeError(f"{file}: tensor {name} differs from the one written.")
