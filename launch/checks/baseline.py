"""Baseline checks: `baseline` must be a finished run of the same student without a teacher (for distill/gap_closed)."""

import json
import math
from pathlib import Path
from typing import Any

from gpt2lab.errors import InputError
from gpt2lab.settings import DataFacts
from gpt2lab.storage.damaged_files import read_file
from gpt2lab.storage.model_folder import read_shape, resolve_model_folder
from gpt2lab.storage.report_json import is_finished
from launch.config import run_spec
from launch.config.schema import ModelKeys, RunConfig

HINT = "Give a run directory of the same student trained on these data: baseline=RUN_DIR, or leave it out."

STUDENT_SIZES = ("n_layer", "n_head", "n_embd")


def check_run(config: RunConfig) -> None:
    """Check before data preparation that the baseline run exists, has finished and has the same context length.

    Raises:
        InputError: it does not.
    """
    if config.baseline is None:
        return
    _loss(config.baseline)
    if not config.is_unsized:
        check_context(config)


def check_context(config: RunConfig) -> None:
    """Check that the baseline run has the context length of this one.

    Raises:
        InputError: it has another.
    """
    if config.baseline is None:
        return
    theirs = run_spec.load(_folder(config.baseline) / "config.yaml").config
    if theirs.context != config.context:
        raise InputError(
            f"baseline={config.baseline} was validated with context={theirs.context}, this run has "
            f"context={config.context}: their losses cannot be compared.\n{HINT}"
        )


def baseline_loss(config: RunConfig, model: ModelKeys, facts: DataFacts) -> float | None:
    """Return the final val/loss of the baseline run; None without `baseline`.

    Raises:
        InputError: it has another model, tokenizer or other data.
    """
    if config.baseline is None:
        return None
    from gpt2lab.data.tokenizer import differing_tokens, load_tokenizer

    folder = _folder(config.baseline)
    shape = read_shape(resolve_model_folder(str(folder), "baseline"))
    sizes, own = ({name: source[name] for name in STUDENT_SIZES} for source in (shape, vars(model)))
    if sizes != own:
        raise InputError(f"baseline={config.baseline} is another model: {sizes}, this run's student {own}.\n{HINT}")
    different = differing_tokens(load_tokenizer(str(folder)), load_tokenizer(facts.tokenizer_folder))
    if different:
        raise InputError(f"baseline={config.baseline} has other token ids, for example {different}.\n{HINT}")
    data = _report(config.baseline).get("data")
    theirs = data.get("hash") if isinstance(data, dict) else None
    if theirs != facts.hash:
        raise InputError(
            f"baseline={config.baseline} was trained on other data (hash {theirs}, this run's {facts.hash}).\n{HINT}"
        )
    validated = _report(config.baseline).get("val_tokens", facts.val_tokens)
    if validated != facts.val_tokens:
        raise InputError(
            f"baseline={config.baseline} was validated on {validated} tokens, this run is on {facts.val_tokens}: their "
            f"losses cannot be compared.\nGive both the same validate_tokens."
        )
    return _loss(config.baseline)


def _loss(given: str) -> float:
    """val_loss of a finished run."""
    report = _report(given)
    if not is_finished(report):
        raise InputError(f"baseline={given} has not finished: report.json has status={report.get('status')}.\n{HINT}")
    loss = report.get("val_loss")
    if not isinstance(loss, float) or not math.isfinite(loss):
        raise InputError(f"baseline={given}: its report.json has no val_loss.\n{HINT}")
    return loss


def _report(given: str) -> dict[str, Any]:
    file = _folder(given) / "report.json"
    try:
        report = json.loads(read_file(file))
    except (OSError, ValueError, RecursionError) as error:
        reason = "no report.json" if not file.exists() else f"a report.json that cannot be read ({error})"
        raise InputError(f"baseline={given} has {reason}.\n{HINT}") from error
    if not isinstance(report, dict):
        raise InputError(f"baseline={given}: its report.json was not written by this program.\n{HINT}")
    return report


def _folder(given: str) -> Path:
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise InputError(f"baseline={given}: there is no such folder.\n{HINT}")
    return folder
