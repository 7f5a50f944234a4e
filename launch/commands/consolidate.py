"""Consolidate: converts a sharded checkpoint into a single file and a Hugging Face folder.

    python -m launch.commands.consolidate runs/pretrain/xl    the newest checkpoint of a run
    python -m launch.commands.consolidate runs/pretrain/xl/checkpoints/step-000200.ckpt

Both are written to the run's folder `consolidated`: step-000200.ckpt, in the format of checkpoint_format=single, and
hf/ for evaluate.py, generate.py, init= and teacher=, with averaged weights if the run has them, and LoRA merged. The
conversion runs in one process on the CPU and needs memory for the whole checkpoint.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2lab.errors import InputError
from gpt2lab.storage.utf8 import check_process
from launch import logging_setup
from launch.config import run_spec
from launch.config.run_spec import PreparedSpec
from launch.exit_codes import run_and_exit

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

OUTPUT = "consolidated"


def consolidate(given: str) -> Path:
    """Write the file and the Hugging Face folder; return the folder that contains both.

    Args:
        given: run directory or sharded checkpoint.

    Raises:
        InputError: there is no run or no complete checkpoint, or the checkpoint is a single file already.
    """
    run, checkpoint = _resolve(Path(given).expanduser())
    import torch

    from gpt2lab.data.tokenizer import load_tokenizer
    from gpt2lab.reports.hf_folder import write_hf_folder
    from gpt2lab.storage.atomic_files import flush, input_error_when_full
    from gpt2lab.storage.report_json import read_report
    from gpt2lab.storage.sharded_checkpoint import is_sharded, read_whole
    from launch.run.card_facts import card_facts

    if not is_sharded(checkpoint):
        raise InputError(f"{checkpoint} is a single file already; its Hugging Face folder is {run}/hf.")
    spec, content = run_spec.load(run / "config.yaml"), read_whole(checkpoint)
    folder = run / OUTPUT
    folder.mkdir(exist_ok=True)
    with input_error_when_full("the consolidated checkpoint", f"{checkpoint} is intact."):
        temporary = folder / f".{checkpoint.name}.tmp"
        torch.save(content, temporary)
        flush(temporary)
        temporary.replace(folder / checkpoint.name)
        measured = {"title": run.name, "steps": content["global_step"], "tokens_seen": content["tokens_seen"]}
        card = {**card_facts(spec, read_report(run)), **measured}
        write_hf_folder(_hf_model(spec, content), load_tokenizer(str(run)), folder / "hf", card)
    return folder


def _resolve(path: Path) -> tuple[Path, Path]:
    """Return (run directory, checkpoint)."""
    from gpt2lab.storage.checkpoint_ledger import newest_good_checkpoint

    if (path / "config.yaml").is_file():
        newest = newest_good_checkpoint(path)
        if newest is None:
            raise InputError(f"The run in {path} has no complete checkpoint.")
        return path, newest
    path = path.resolve()  # `last` is a symbolic link
    if len(path.parents) > 1 and path.exists() and (path.parents[1] / "config.yaml").is_file():
        return path.parents[1], path
    raise InputError(
        f"{path} is neither a run directory nor a checkpoint in one.\n"
        "Give runs/… or runs/…/checkpoints/step-000200.ckpt."
    )


def _hf_model(spec: PreparedSpec, content: dict[str, Any]) -> "GPT2LMHeadModel":
    """Build the Hugging Face model from a consolidated checkpoint."""
    from gpt2lab.model.backbone import hf_from_state
    from gpt2lab.model.ema import stored_weights
    from gpt2lab.model.lora import merge_adapters

    inner = stored_weights(content)
    lora = spec.config.lora
    if lora.rank:
        inner = merge_adapters(inner, lora.alpha / lora.rank)
    shape = spec.resolved.model.shape(inner["lm_head.weight"].shape[0])
    return hf_from_state(inner, shape, spec.config.objective.name, spec.config.pair_template)


def _program(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    check_process(arguments)
    if len(arguments) != 1:
        raise InputError("Give one run directory or checkpoint: python -m launch.commands.consolidate runs/pretrain/xl")
    logging_setup.configure_logging()
    logging_setup.announce(f"Reading {arguments[0]}")
    folder = consolidate(arguments[0])
    print(f"{folder}/hf")


if __name__ == "__main__":
    run_and_exit(lambda: _program(sys.argv[1:]))
