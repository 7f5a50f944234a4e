"""Scores any checkpoint on any data: loss, perplexity, bits per byte, and how near a student is to its teacher.

    python evaluate.py checkpoint=runs/pretrain/nano-…
    python evaluate.py checkpoint=gpt2 data=text path=~/notes context=1024 json=scores.json
    python evaluate.py checkpoint=runs/distill/nano-… teacher=runs/pretrain/micro-… baseline=runs/pretrain/nano-…

Arguments are key=value and taken verbatim. A run directory brings its own data, context and tokenizer; for pairs the
loss is over the responses. With teacher= the two distributions are compared at every target: divergences, agreement,
calibration, and what the student is worth as a draft model in speculative decoding.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2lab.errors import InputError
from gpt2lab.metric_names import DISTILL_GAP_CLOSED
from gpt2lab.settings import ObjectiveSettings, TokenizerChoice
from launch import compared_models, score_tables
from launch.answer import end
from launch.groups import CONF, values
from launch.key_values import argument, check_output_file, describe, parse
from launch.spelling import nearest

if TYPE_CHECKING:
    from gpt2lab.comparison import Comparison
    from gpt2lab.evaluation import Score
    from launch.config import Config


@dataclass
class Arguments:
    checkpoint: str = argument("a run directory, a Hugging Face folder or a Hub id")
    teacher: str = argument("compare with this model: a run directory, a Hugging Face folder or a Hub id", "")
    baseline: str = argument(
        "the student trained without the teacher: likewise; tells how much of the gap is closed", ""
    )
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
    seed: int = argument("of the drafts drawn to measure acceptance", 1337, at_least=0, at_most=2**63 - 1)
    json: str = argument("also write loss, perplexity, bits_per_byte, tokens and the comparison to this file", "")


def data_settings(arguments: Arguments, folder: Path, positions: int) -> "Config":
    """The configuration that says which data to score: the run's own or conf/'s defaults, with what was given on top.

    Args:
        folder: the checkpoint's Hugging Face folder.
        positions: of its model; the longest possible context.

    Raises:
        InputError: an unknown value of data, a file that is not there, or a context longer than the model.
    """
    from gpt2lab.model_folder import read_objective
    from launch import checks, config, objective_checks
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
    settings.objective = own.objective if own is not None else ObjectiveSettings(read_objective(folder))
    settings.record.accumulate = 1
    objective_checks.check(settings)
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

    allowed = values("data")
    if data not in allowed:
        raise InputError(f"data={data}: no such value{nearest(data, allowed)}.\nAllowed: {', '.join(allowed)}.")
    config.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        tree = compose("train", overrides=[f"data={data}"], return_hydra_config=True)
    with open_dict(tree):
        hydra_node = tree.pop("hydra")
    return config.typed(tree, hydra_node, command="")


def evaluate(arguments: Arguments) -> "tuple[Score, Comparison | None]":
    """Score the checkpoint as the arguments say, and compare it with a teacher where there is one.

    Raises:
        InputError: no such checkpoint, data, column or device, or models of different tokenizers.
    """
    models = compared_models.named_models({key: vars(arguments)[key] for key in ("checkpoint", "teacher", "baseline")})
    settings = data_settings(arguments, models[0].folder, models[0].positions)
    compared_models.check_context(models, settings.context)
    from launch.noise import settle_library_noise, settle_noise

    settle_noise()  # what follows takes seconds to import; mistakes are told before
    import torch

    from gpt2lab.backbone import load_backbone
    from gpt2lab.comparison import compare
    from gpt2lab.device import named_device
    from gpt2lab.evaluation import bytes_of_tokens, score
    from gpt2lab.host_memory import keep_freed_memory
    from gpt2lab.tokenizer import load_tokenizer
    from launch.build import data_module

    settle_library_noise()
    device = named_device(arguments.accelerator)
    if device.type == "cpu":
        keep_freed_memory()
    settings.accelerator = "cpu" if device.type == "cpu" else "gpu"
    data = data_module(settings)
    facts = data.prepare()
    compared_models.check_vocabularies(models, facts)
    token_bytes = bytes_of_tokens(load_tokenizer(facts.tokenizer_folder))
    autocast = torch.bfloat16 if arguments.precision == "bf16" else None
    student, *others = (load_backbone(str(model.folder)) for model in models)
    batches = batches_of(data, arguments.split)
    if not others:
        return score(student, batches, token_bytes, device=device, autocast=autocast), None
    comparison = compare(
        student,
        others[0],
        batches,
        token_bytes,
        baseline=others[1] if len(others) > 1 else None,
        device=device,
        context=settings.context,
        seed=arguments.seed,
        autocast=autocast,
    )
    return comparison.student, comparison


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


def show(arguments: Arguments, result: "Score", comparison: "Comparison | None") -> None:
    from rich.console import Console

    console = Console()
    if comparison is None:
        console.print(score_tables.score_table([(arguments.checkpoint, result)], "checkpoint", arguments.split))
        return
    sources = {"student": arguments.checkpoint, "teacher": arguments.teacher, "baseline": arguments.baseline}
    scores = {"student": result, "teacher": comparison.teacher, "baseline": comparison.baseline}
    for role in (role for role, score in scores.items() if score is not None):
        console.print(f"{role:<9} {sources[role]}", highlight=False, markup=False, soft_wrap=True)
    rows = [(role, score) for role, score in scores.items() if score is not None]
    console.print(score_tables.score_table(rows, "model", arguments.split))
    if comparison.is_cut:
        console.print(f"Only the first {comparison.entries:,} entries of the vocabulary count: the rest is padding.\n")
    console.print(score_tables.distillation_table(comparison.figures))
    if comparison.baseline is not None and DISTILL_GAP_CLOSED not in comparison.figures:
        console.print("The baseline is no worse than the teacher, so there is no gap to close.\n")
    console.print(score_tables.speculation_table(comparison.speculation))


def main() -> None:
    arguments = parse(sys.argv[1:], Arguments)
    check_output_file(arguments.json)
    result, comparison = evaluate(arguments)
    show(arguments, result, comparison)
    if arguments.json:
        from gpt2lab.atomic_files import write_json

        sources = {"teacher": arguments.teacher, "baseline": arguments.baseline}
        write_json(Path(arguments.json), score_tables.as_json(result, comparison, sources))


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{__doc__}\n{describe(Arguments)}")
        sys.exit(0)
    end(main)
