"""Pages of results without training: each with all of its parts and with hostile names; and the charts of a page."""

import json
import math
import re
from typing import Any

from gpt2lab.analysis.study_results import KD, LAYERS, SCRATCH, TOKENS, Arm, StudyResults, arm_result, contrasts
from gpt2lab.analysis.sweep_runs import SweepRun, group_runs
from gpt2lab.metric_names import DISTILLATION
from gpt2lab.reports import comparison_html, demo_html, report_html, scores_html, study_html, sweep_html
from gpt2lab.reports.run_texts import Example
from gpt2lab.reports.samples_jsonl import Sample

CHART = re.compile(r'<figure class="plot[^>]*>.*?<script type="application/json">(.*?)</script></figure>', re.DOTALL)
HOSTILE = "</script><script>alert(1)</script><!-- & 'a' \"b\""
LONG = "a_very_long_name_without_any_space_" * 8


def charts_of(page: str) -> list[dict[str, Any]]:
    return [json.loads(content) for content in CHART.findall(page)]


def metrics(steps: int = 40) -> list[dict[str, str]]:
    rows = []
    for step in range(1, steps + 1):
        loss = 3 + 4 * math.exp(-step / 10)
        row = {
            "step": str(10 * step),
            "train/loss": str(loss),
            "lr": "1e-3",
            "grad_norm": "1.5",
            "tokens": str(5000 * step),
        }
        row |= {"tokens_per_second": "1000", "memory_gb": "1.25", "val/loss": "", **dict.fromkeys(DISTILLATION, "")}
        if step % 5 == 0:
            row |= {"val/loss": str(loss + 0.1), **{name: str(1 / step) for name in DISTILLATION}}
        rows.append(row)
    return rows


def run_page(steps: int = 40) -> str:
    report: dict[str, Any] = {
        "status": "stopped",
        "task": "distill",
        "model": "nano",
        "steps": 400,
        "val_loss": 3.123456,
    }
    report |= {
        "val_loss_error": 0.0123,
        "parameters": 124_439_808,
        "seconds": 3725.0,
        "tokens_per_second": 53.7,
        "mfu": 0.4,
    }
    report |= {
        "teacher": {"source": LONG, "val_loss": 2.9},
        "init": {"source": HOSTILE},
        "error": f"ValueError: {LONG}",
    }
    report |= {"data": {"name": "text", "hash": "0123456789abcdef", "tokens": 12345678, "val_overlap": 0.012}}
    report |= {"seconds_by_phase": {"train": 3000.0, "validate": 500.0, "save": 225.0}, "stopped_by": "SIGTERM"}
    report |= {"events": [[200, "resumed"], [300, "loss spike, 9.1"]], "command": f"python train.py path={LONG}"}
    report["metrics"] = {"val/rougeL": 12.345, **dict.fromkeys(DISTILLATION, 0.123456)}
    samples = [Sample(step, f"def {LONG}", LONG, "greedy") for step in (100, 200)]
    example = Example("x = 1\n" * 200, HOSTILE, LONG, "rougeL", 41.23456)
    run = report_html.RunFiles(
        metrics(steps), samples, [example], ["inspect/step-1.html"], ["metrics.csv"], f"path: {LONG}"
    )
    return report_html.render(f"run {HOSTILE}", report, run)


def sweep_runs(count: int = 12) -> list[SweepRun]:
    runs = []
    for number in range(count):
        lr, model, seed = ("1e-4", "0.000312345678", "1e-2")[number % 3], ("nano", LONG)[number // 3 % 2], number // 6
        value = None if number == 0 else 3.5 + 0.1 * (number % 3) + 0.01 * number
        overrides = {"optimizer.lr": lr, "model": model, "seed": str(seed)}
        curve = [(step, 3 + 30 / step) for step in range(10, 101, 10)]
        outcome = ("failed", f"ValueError: {HOSTILE}") if value is None else ("finished", "")
        command = f"python train.py optimizer.lr={lr}"
        run = SweepRun(
            number, *outcome, f"{number}/report.html", overrides, "val/loss", value, 61.2, command, "h", curve
        )
        runs.append(run)
    return runs


def study_page() -> str:
    losses = {1: 3.5, 2: 3.6, 3: None}
    arms = [
        arm_result(
            Arm(init, learns_by), TOKENS, 1000, {seed: loss and loss + shift for seed, loss in losses.items()}, 1.0
        )
        for init, learns_by, shift in (
            (SCRATCH, "CE", 0.0),
            (SCRATCH, KD, -0.2),
            (LAYERS, "CE", 0.1),
            (LAYERS, KD, -0.3),
        )
    ]
    return study_html.render(LONG, StudyResults([1, 2, 3], LONG, 2.9, [], arms, contrasts(arms), [HOSTILE]))


def demo_page() -> str:
    stages = [{"stage": name, "state": "finished", "model": "nano 0.9M", "loss": "3.123"} for name in (LONG, HOSTILE)]
    texts = dict.fromkeys(("teacher", LONG, HOSTILE), f"    return {LONG}\n{HOSTILE}\n" * 5)
    content = demo_html.DemoContent(
        stages=stages,
        links={LONG: "teacher/report.html"},
        notes=[f"{LONG} − {HOSTILE}: −0.4000 nats"],
        scores=[("summary", "ROUGE-L"), (HOSTILE, "20.3 ± 1.1")],
        results=group_runs(sweep_runs(), []),
        rows=[metrics()] * 12,
        samples={f"def {LONG}(a):": texts},
        commands={"Own data": f"make demo DATA={LONG}"},
        is_over=True,
    )
    return demo_html.render(f"Demo {HOSTILE}", HOSTILE, content)


def result_pages() -> dict[str, str]:
    """Return one page of each kind."""
    results = group_runs(sweep_runs(), [f"path={LONG}"])
    bars = [scores_html.Bar(name, 3.1 + size, 3.0 + size, 3.3 + size) for size, name in enumerate((LONG, HOSTILE))]
    return {
        "run": run_page(),
        "sweep": sweep_html.render(LONG, results),
        "study": study_page(),
        "scores": scores_html.render(LONG, [scores_html.Panel("loss", "nats per token", "← better", bars)]),
        "comparison": comparison_html.render("Comparison", results, [metrics()] * 12),
        "demo": demo_page(),
    }
