"""Earlier run: the time of a run by that of the newest finished one of the same kind on this machine."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2lab.errors import InputError
from gpt2lab.storage.report_json import is_finished, read_report
from gpt2lab.system.run_time import count_events
from launch.config import run_spec
from launch.config.run_dir import CONFIG, RUNS
from launch.config.run_spec import RunSpec

MOST = 20  # reports that are read
REPEATED = {"validate": "validate_every", "sample": "sample_every", "save": "checkpoint_every"}  # phase → key


@dataclass(frozen=True)
class Estimate:
    """Seconds of a run, and the folder of the run they are derived from."""

    seconds: float
    folder: Path


def estimate(spec: RunSpec, root: Path = RUNS) -> Estimate | None:
    """Return the time of a run like the newest one under `root` with the same work in a step; None without one."""
    reports = sorted(root.glob("*/*/report.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in reports[:MOST]:
        report = read_report(file.parent)
        if report.get("model") != spec.resolved.model_name or not is_finished(report):
            continue
        try:
            earlier = run_spec.load(file.parent / CONFIG)
        except InputError:
            continue
        if _work(earlier) == _work(spec) and (seconds := _scaled(report, earlier, spec)):
            return Estimate(seconds, file.parent)
    return None


def _work(spec: RunSpec) -> str:
    """Return all that the time of a step, a validation and a save follows from, and the machine."""
    config, machine = spec.config, vars(spec.machine)
    work: dict[str, Any] = {
        "machine": machine | {"precision": spec.machine.precision.name},
        "model": vars(spec.resolved.model),
        "teacher": spec.resolved.teacher_hash,
        "cache": config.teacher_cache.name,
        "task": config.task_name,
        "rows": (config.global_batch_rows, config.context, config.validate_tokens),
        "data": config.groups["data"],
        "callbacks": sorted(config.callbacks),
        "profiled": bool(config.profile or config.trainer.get("profiler")),
    }
    return json.dumps(work, default=str, sort_keys=True)


def _scaled(report: dict[str, Any], earlier: RunSpec, spec: RunSpec) -> float:
    """Return the seconds of the earlier run's phases at the number of steps and events of this one."""
    phases, steps = report.get("seconds_by_phase", {}), report.get("steps") or 0
    if not steps or "train" not in phases or earlier.config.steps != steps:  # resumed or ended early
        return 0.0
    seconds = phases["train"] / steps * spec.config.steps + phases.get("export", 0.0)
    for phase, key in REPEATED.items():
        before, now = (
            count_events(0, config.steps, int(vars(config)[key])) for config in (earlier.config, spec.config)
        )
        seconds += phases.get(phase, 0.0) * now / max(before, 1)
    return float(seconds)
