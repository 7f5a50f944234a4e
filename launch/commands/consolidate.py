"""Consolidate: a checkpoint that ranks wrote in parts becomes one file, and a Hugging Face folder.

    python -m launch.commands.consolidate runs/pretrain/xl    the newest checkpoint of a run
    python -m launch.commands.consolidate runs/pretrain/xl/checkpoints/step-000200.ckpt

Both are put into the run's folder `consolidated`: step-000200.ckpt, as checkpoint_format=single writes it, and hf/,
with averaged weights where they are kept and LoRA merged, for evaluate.py, generate.py, init= and teacher=. It runs in
one process on the CPU and takes the memory of the whole checkpoint.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2lab.errors import InputError
from gpt2lab.storage.utf8 import check_process
from launch import logging_setup
from launch.config import run_spec
from launch.config.run_spec import PreparedSpec
from launch.exit_codes import end

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

OUTPUT = "consolidated"


def consolidate(given: str) -> Path:
    """Write the file and the folder; returns the folder that holds both.

    Raises:
        InputError: no run, no whole checkpoint, or one that is a single file already.
    """
    run, checkpoint = _named(Path(given).expanduser())
    import torch

    from gpt2lab.data.tokenizer import load_tokenizer
    from gpt2lab.reports.hf_folder import write_hf_folder
    from gpt2lab.storage.atomic_files import flush, told_when_full
    from gpt2lab.storage.sharded_checkpoint import is_sharded, read_whole

    if not is_sharded(checkpoint):
        raise InputError(f"{checkpoint} is one file already, and {run}/hf its Hugging Face folder.")
    spec, whole = run_spec.load(run / "config.yaml"), read_whole(checkpoint)
    folder = run / OUTPUT
    folder.mkdir(exist_ok=True)
    with told_when_full("the consolidated checkpoint", f"{checkpoint} is intact."):
        aside = folder / f".{checkpoint.name}.tmp"
        torch.save(whole, aside)
        flush(aside)
        aside.replace(folder / checkpoint.name)
        card = {"title": run.name, "steps": str(whole["global_step"]), "trained with": "gpt2-lab"}
        write_hf_folder(_plain_model(spec, whole), load_tokenizer(str(run)), folder / "hf", card)
    return folder


def _named(path: Path) -> tuple[Path, Path]:
    """(run directory, checkpoint) of what was given."""
    from gpt2lab.storage.checkpoint_ledger import newest_good_checkpoint

    if (path / "config.yaml").is_file():
        newest = newest_good_checkpoint(path)
        if newest is None:
            raise InputError(f"The run in {path} has no whole checkpoint.")
        return path, newest
    path = path.resolve()  # `last` is a link
    if len(path.parents) > 1 and path.exists() and (path.parents[1] / "config.yaml").is_file():
        return path.parents[1], path
    raise InputError(
        f"{path} is neither a run directory nor a checkpoint in one.\n"
        "Give runs/… or runs/…/checkpoints/step-000200.ckpt."
    )


def _plain_model(spec: PreparedSpec, whole: dict[str, Any]) -> "GPT2LMHeadModel":
    """The model as `transformers` knows it."""
    from gpt2lab.model.backbone import plain_hf_from_state
    from gpt2lab.model.lora import merged
    from gpt2lab.settings import ModelShape

    state = dict(whole["state_dict"])
    if "weight_average" in whole:
        averages = zip(whole["averaged"], whole["weight_average"], strict=True)
        kind = whole["state_dict"]["backbone.lm.transformer.wte.weight"].dtype  # in which the run's own model has them
        state |= {f"backbone.{name}": average.to(kind) for name, average in averages}
    prefix, model = "backbone.lm.", spec.resolved.model
    inner = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    embedding = inner["transformer.wte.weight"]  # (V, D)
    inner["lm_head.weight"] = embedding
    lora = spec.config.task.get("lora") or {}
    if lora.get("rank"):
        inner = merged(inner, lora["alpha"] / lora["rank"])
    assert model.n_layer is not None
    assert model.n_head is not None
    assert model.n_positions is not None
    shape = ModelShape(model.n_layer, model.n_head, embedding.shape[1], model.n_positions, embedding.shape[0])
    return plain_hf_from_state(inner, shape, spec.config.objective.name)


def _program(arguments: list[str]) -> None:
    check_process(arguments)
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        raise InputError("Give one run directory or checkpoint: python -m launch.commands.consolidate runs/pretrain/xl")
    logging_setup.settle_noise()
    folder = consolidate(arguments[0])
    print(f"{folder}/hf")


if __name__ == "__main__":
    end(lambda: _program(sys.argv[1:]))
