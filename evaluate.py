"""Scores any checkpoint on any data: loss in nats per token, perplexity, bits per byte.

    python evaluate.py checkpoint=runs/pretrain/nano-…
    python evaluate.py checkpoint=gpt2 data=text path=~/notes context=1024 json=scores.json

Arguments are key=value and taken verbatim. A run directory brings its own data, context and tokenizer; for pairs the
loss is over the responses.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2lab.errors import InputError
from gpt2lab.settings import TokenizerChoice
from launch.answer import exit_code
from launch.key_values import argument, check_output_file, describe, parse
from launch.spelling import nearest

if TYPE_CHECKING:
    from gpt2lab.evaluation import Score
    from launch.config import Config


@dataclass
class Arguments:
    checkpoint: str = argument("a run directory, a Hugging Face folder or a Hub id")
    data: str = argument("a value of conf/data; default: the run's own, else stdlib", "")
    path: str = argument("file, folder or glob, for data=text, bin and pairs", "")
    val_path: str = argument("validation data of their own", "")
    source: str = argument("column of pairs", "")
    target: str = argument("column of pairs", "")
    context: int = argument("tokens of a window; 0: the run's own, else the model's positions", 0, at_least=0)
    split: str = argument("the validation split, or all of the data", "val", choices=("val", "all"))
    tokenizer: str = argument("folder or Hub id; default: the checkpoint's own", "")
    precision: str = argument("number format of the matrix products", "fp32", choices=("fp32", "bf16"))
    accelerator: str = argument("where to compute", "auto", choices=("auto", "cpu", "gpu", "mps"))
    cache_dir: str = argument("where prepared data lie; default: $GPT2LAB_CACHE, else ~/.cache/gpt2lab", "")
    json: str = argument("also write loss, perplexity, bits_per_byte and tokens to this file", "")


def data_settings(arguments: Arguments, folder: Path, positions: int) -> "Config":
    """The configuration that says which data to score: the run's own or conf/'s defaults, with what was given on top.

    Args:
        folder: the checkpoint's Hugging Face folder.
        positions: of its model; the longest possible context.

    Raises:
        InputError: an unknown value of data, a file that is not there, or a context longer than the model.
    """
    from launch import checks, config
    from launch.ignored_keys import unread_keys

    run_config = folder.parent / "config.yaml"
    is_run = folder.name == "hf" and run_config.is_file()
    own = config.load(run_config) if is_run else None
    settings = own if own is not None and not arguments.data else composed(arguments.data or "stdlib")
    given = {key: vars(arguments)[key] for key in ("path", "val_path", "source", "target", "cache_dir")}
    for key, value in given.items():
        if value:
            setattr(settings, key, value)
            settings.record.overrides.append(f"{key}={value}")  # goes before what a preset names itself
    settings.context = arguments.context or min(own.context if own is not None else positions, positions)
    settings.tokenizer = TokenizerChoice("pretrained", source=arguments.tokenizer or str(folder))
    settings.record.accumulate = 1
    for key, message in unread_keys(settings).items():
        if given.get(key):
            raise InputError(f"{message}.\nLeave it out.")
    checks.check_files(settings)
    if not 2 <= settings.context <= positions:
        raise InputError(f"context={settings.context}: the model takes windows of 2 to {positions} tokens.")
    return settings


def composed(data: str) -> "Config":
    """The defaults of conf/ with one value of the data group."""
    from hydra import compose, initialize_config_dir
    from omegaconf import open_dict

    from launch import config

    folder = Path(__file__).resolve().parent / "conf"
    allowed = sorted(file.stem for file in (folder / "data").glob("*.yaml"))
    if data not in allowed:
        raise InputError(f"data={data}: no such value{nearest(data, allowed)}.\nAllowed: {', '.join(allowed)}.")
    config.register()
    with initialize_config_dir(str(folder), version_base="1.3"):
        tree = compose("train", overrides=[f"data={data}"], return_hydra_config=True)
    with open_dict(tree):
        hydra_node = tree.pop("hydra")
    return config.typed(tree, hydra_node, command="")


def evaluate(arguments: Arguments) -> "Score":
    """Score the checkpoint as the arguments say.

    Raises:
        InputError: no such checkpoint, data, column or device, or a tokenizer of another vocabulary.
    """
    from gpt2lab.model_folder import folder_of, read_shape

    folder = folder_of(arguments.checkpoint, "checkpoint")
    shape = read_shape(folder)
    settings = data_settings(arguments, folder, shape["n_positions"])
    from launch.noise import settle_noise  # what follows takes seconds to import; mistakes are told before

    settle_noise()
    import torch
    from transformers import logging

    from gpt2lab.backbone import load_backbone
    from gpt2lab.device import named_device
    from gpt2lab.evaluation import bytes_of_tokens, score
    from gpt2lab.host_memory import keep_freed_memory
    from gpt2lab.tokenizer import load_tokenizer
    from launch.build import data_module

    logging.disable_progress_bar()
    device = named_device(arguments.accelerator)
    if device.type == "cpu":
        keep_freed_memory()
    settings.accelerator = "cpu" if device.type == "cpu" else "gpu"
    data = data_module(settings)
    facts = data.prepare()
    if facts.vocab_size > shape["vocab_size"]:
        raise InputError(
            f"tokenizer={facts.tokenizer_folder} has {facts.vocab_size} entries, "
            f"the model {shape['vocab_size']}.\nLeave out tokenizer=, which takes the checkpoint's own."
        )
    return score(
        load_backbone(str(folder)),
        batches_of(data, arguments.split),
        bytes_of_tokens(load_tokenizer(facts.tokenizer_folder)),
        device=device,
        autocast=torch.bfloat16 if arguments.precision == "bf16" else None,
    )


def batches_of(data: Any, split: str) -> Iterator[Any]:
    """Every batch of the split once, with a progress bar where somebody watches."""
    from tqdm import tqdm

    loaders = [data.val_dataloader()] if split == "val" else [data.val_dataloader(), data.train_eval_dataloader()]
    total = sum(len(loader) for loader in loaders)
    with tqdm(total=total, desc="evaluating", unit="batch", disable=None, leave=False) as bar:
        for loader in loaders:
            for batch in loader:
                yield batch
                bar.update()


def show(arguments: Arguments, result: "Score") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("checkpoint", overflow="fold")
    table.add_column("split")
    row = [arguments.checkpoint, arguments.split]
    for name, value in asdict(result).items():
        table.add_column(name.replace("_", " "), justify="right")
        row.append(f"{value:,}" if name == "tokens" else f"{value:.4f}")
    table.add_row(*row)
    Console().print(table)


def main() -> None:
    arguments = parse(sys.argv[1:], Arguments)
    check_output_file(arguments.json)
    result = evaluate(arguments)
    show(arguments, result)
    if arguments.json:
        from gpt2lab.atomic_files import write_json

        write_json(Path(arguments.json), asdict(result))


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{__doc__}\n{describe(Arguments)}")
        sys.exit(0)
    sys.exit(exit_code(main))
