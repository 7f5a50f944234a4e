"""Curves of a run: losses, learning rate, speed, memory, scores and distillation metrics, from metrics.csv."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpt2lab import metric_names as names
from gpt2lab.reports.charts import Chart, Line, Points
from gpt2lab.storage.metrics_csv import STEP, series

Rows = Sequence[dict[str, str]]

MOST_POINTS = 1000  # of one line; a longer one is thinned
SIDE_CHARTS = {
    names.TRAIN_OBJECTIVE: "distillation loss",
    names.LEARNING_RATE: "learning rate",
    names.GRAD_NORM: "gradient norm",
    names.TOKENS_PER_SECOND: "target tokens per second",
    names.MFU: "model FLOP utilisation",
    names.MEMORY_GB: "peak memory, GB",
}
SMOOTHED = (names.TRAIN_OBJECTIVE, names.GRAD_NORM, names.TOKENS_PER_SECOND, names.MFU)
# title → {metric: (name of the line, colour)}
DISTILLATION_CHARTS = {
    "divergence, nats": {
        names.DISTILL_KL: ("KL(teacher ‖ student)", "val"),
        names.DISTILL_REVERSE_KL: ("KL(student ‖ teacher)", "train"),
    },
    "agreement with the teacher": {
        names.DISTILL_TOP1_AGREEMENT: ("top-1", "val"),
        names.DISTILL_TOP5_AGREEMENT: ("top-5", "train"),
        names.DISTILL_ACCEPTANCE: ("acceptance", "teacher"),
    },
    "entropy, nats": {
        names.DISTILL_ENTROPY_STUDENT: ("student", "val"),
        names.DISTILL_ENTROPY_TEACHER: ("teacher", "teacher"),
    },
    "calibration error": {names.DISTILL_ECE: ("student", "val"), names.DISTILL_TEACHER_ECE: ("teacher", "teacher")},
    "gap closed": {names.DISTILL_GAP_CLOSED: ("gap closed", "val")},
    "universal logit distance": {names.DISTILL_ULD: ("distance", "val")},
}


def run_clock(rows: Rows) -> dict[str, list[float]]:
    """Return steps, target tokens and seconds of training at the logged steps, as far as they are known.

    Seconds follow from tokens and speed, so they exclude validation, samples and saves.
    """
    known = [row for row in rows if row.get(names.TOKENS) and row.get(names.TOKENS_PER_SECOND)]
    clock = [(0.0, 0.0, 0.0)]
    for row in known:
        _, before, time = clock[-1]
        tokens, speed = float(row[names.TOKENS]), float(row[names.TOKENS_PER_SECOND])
        clock.append((float(row[STEP]), tokens, time + (max(tokens - before, 0.0) / speed if speed else 0.0)))
    kept = clock[1 :: -(-len(clock) // MOST_POINTS)] if known else []
    kept += clock[-1:] if known and kept[-1] != clock[-1] else []
    return {name: [row[column] for row in kept] for column, name in enumerate(("steps", "tokens", "seconds"))}


def value_at(curve: Points, clock: Mapping[str, Sequence[float]], tokens: float) -> float | None:
    """Return the value of a curve over steps after so many tokens, between its points by linear interpolation.

    None before its first point.
    """
    if not curve or not clock["steps"]:
        return None
    steps, values = zip(*curve, strict=True)
    step = float(np.interp(tokens, clock["tokens"], clock["steps"]))
    return float(np.interp(step, steps, values)) if step >= steps[0] else None


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """Return at most about `most` points, the last one included."""
    every = -(-len(points) // most)
    return points if every < 2 else [*points[:-1:every], points[-1]]


def loss_chart(rows: list[dict[str, str]], report: Mapping[str, Any], events: Sequence[tuple[float, str]]) -> Chart:
    """Return training and validation loss, with the losses of teacher and baseline as horizontal lines."""
    lines = [
        Line("training", thinned(series(rows, names.TRAIN_LOSS)), "train", is_smoothed=True),
        Line("validation", thinned(series(rows, names.VAL_LOSS)), "val", is_bold=True),
    ]
    levels = [
        (name, float(value["val_loss"]), name)
        for name in ("teacher", "baseline")
        if isinstance(value := report.get(name), Mapping) and isinstance(value.get("val_loss"), int | float)
    ]
    title = "loss, nats per target token"
    return Chart(title, [line for line in lines if line.points], levels=levels, events=events, is_wide=True)


def side_charts(rows: list[dict[str, str]]) -> list[Chart]:
    """Return learning rate, gradient norm, throughput, memory, scores of generated text, and benchmarks."""
    prefixes = (names.VALIDATION_PREFIX, names.BENCHMARK_PREFIX)
    logged = [name for name in rows[0] if name.startswith(prefixes)] if rows else []
    hidden = (*names.LOWER_IS_BETTER, *(name for name in logged if name.endswith(names.STANDARD_ERROR)))
    scores = {name: name for name in logged if name not in hidden}
    return [
        Chart(title, [Line(title, thinned(series(rows, name)), "val" if name in scores else "train", name in SMOOTHED)])
        for name, title in {**scores, **SIDE_CHARTS}.items()
    ]


def distillation_charts(rows: list[dict[str, str]]) -> list[Chart]:
    """Return the distillation metrics over time."""
    return [
        Chart(title, [Line(label, thinned(series(rows, name)), colour) for name, (label, colour) in group.items()])
        for title, group in DISTILLATION_CHARTS.items()
    ]
