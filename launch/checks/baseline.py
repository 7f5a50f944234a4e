"""Baseline: the run of the same student without a teacher, against which distill/gap_closed is measured."""

import json
import math
from pathlib import Path
from typing import Any

from gpt2lab.errors import InputError
from gpt2lab.settings import DataFacts
from gpt2lab.storage.model_folder import folder_of, read_shape
from launch.config import run_spec
from launch.config.schema import ModelKeys, RunConfig

CURE = "Give a run directory of the same student trained on these data: baseline=RUN_DIR, or leave it out."

STUDENT_SIZES = ("n_layer", "n_head", "n_embd")


def check_run(config: RunConfig) -> None:
    """What can be known before the data: there is such a run, it is finished, and its windows are as long.

    Raises:
        InputError
    """
    if config.baseline is None:
        return
    _loss(config.baseline)
    theirs = run_spec.load(_folder(config.baseline) / "config.yaml").config
    if theirs.context != config.context:
        raise InputError(
            f"baseline={config.baseline} was validated with context={theirs.context}, this run has "
            f"context={config.context}: their losses cannot be compared.\n{CURE}"
        )


def loss_of_baseline(config: RunConfig, model: ModelKeys, facts: DataFacts) -> float | None:
    """Its last val/loss, if it comes from the same validation tokens; None: there is no baseline.

    Raises:
        InputError: another model, tokenizer or other data.
    """
    if config.baseline is None:
        return None
    from gpt2lab.data.tokenizer import differing_tokens, load_tokenizer

    folder = _folder(config.baseline)
    shape = read_shape(folder_of(str(folder), "baseline"))
    sizes, own = ({name: of[name] for name in STUDENT_SIZES} for of in (shape, vars(model)))
    if sizes != own:
        raise InputError(f"baseline={config.baseline} is another model: {sizes}, this run's student {own}.\n{CURE}")
    different = differing_tokens(load_tokenizer(str(folder)), load_tokenizer(facts.tokenizer_folder))
    if different:
        raise InputError(f"baseline={config.baseline} numbers tokens differently, for example {different}.\n{CURE}")
    data = _report(config.baseline).get("data")
    theirs = data.get("hash") if isinstance(data, dict) else None
    if theirs != facts.hash:
        raise InputError(
            f"baseline={config.baseline} was trained on other data (hash {theirs}, this run's {facts.hash}).\n{CURE}"
        )
    return _loss(config.baseline)


def _loss(given: str) -> float:
    """val_loss of a finished run."""
    report = _report(given)
    if report.get("status") != "finished":
        raise InputError(f"baseline={given} is not finished: its report.json says {report.get('status')}.\n{CURE}")
    loss = report.get("val_loss")
    if not isinstance(loss, float) or not math.isfinite(loss):
        raise InputError(f"baseline={given}: its report.json has no val_loss.\n{CURE}")
    return loss


def _report(given: str) -> dict[str, Any]:
    file = _folder(given) / "report.json"
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = "no report.json" if not file.exists() else f"a report.json that cannot be read ({error})"
        raise InputError(f"baseline={given} has {reason}.\n{CURE}") from error
    if not isinstance(report, dict):
        raise InputError(f"baseline={given}: its report.json is none of ours.\n{CURE}")
    return report


def _folder(given: str) -> Path:
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise InputError(f"baseline={given}: there is no such folder.\n{CURE}")
    return folder
