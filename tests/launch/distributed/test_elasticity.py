"""Without dropout a run may change devices, strategy and micro-batch; with it, a resume that changes them warns."""

import json
from pathlib import Path

import pytest

from gpt2lab.storage.metrics_csv import read_metrics
from tests.conftest import Train

RUN = ("log_every=1", "validate_every=2", "optimizer=adamw", "schedule=constant", "schedule.warmup_steps=1")


MUON = (*(key for key in RUN if not key.startswith("optimizer")), "optimizer=muon", "optimizer.lr=1e-3")


def losses(run: Path) -> list[float]:
    return [float(row[name]) for row in read_metrics(run) for name in ("train/loss", "val/loss") if row.get(name)]


ONE, TWO = ("devices=1", "strategy=auto"), ("devices=2", "strategy=ddp")
SHARDED, ALONE = ("devices=2", "strategy=fsdp"), ("devices=1", "strategy=fsdp")


@pytest.mark.parametrize(
    "stages",
    [
        pytest.param([("micro_batch=2",), ("micro_batch=3",)], id="micro-batch 2 to 3"),
        pytest.param([ONE, TWO, ONE], id="ddp 1 to 2 to 1", marks=pytest.mark.slow),
        pytest.param([SHARDED, ALONE, SHARDED], id="fsdp 2 to 1 to 2", marks=pytest.mark.slow),
        pytest.param([TWO, SHARDED, ONE], id="ddp to fsdp to one device", marks=pytest.mark.slow),
    ],
)
def test_without_dropout_losses_do_not_depend_on_the_machine(
    stages: list[tuple[str, ...]], train_here: Train, tiny: list[str]
):
    """Compare two steps on each machine with two steps on one device with whole batches."""
    assert train_here(*tiny, *RUN, f"steps={2 * len(stages)}", "micro_batch=8", "run_dir=whole").code == 0
    for number, keys in enumerate(stages, 1):
        start = (*tiny, *RUN, "run_dir=moved") if number == 1 else ("resume=moved",)
        answer = train_here(*start, f"steps={2 * number}", *keys)
        assert answer.code == 0, answer.stderr
        assert "dropout masks" not in answer.stderr
    whole, moved = losses(Path("whole")), losses(Path("moved"))
    assert len(whole) == 3 * len(stages)
    assert moved == pytest.approx(whole, abs=2e-5)


@pytest.mark.slow
def test_muon_continues_on_one_two_and_one_device(train_here: Train, tiny: list[str]) -> None:
    """Newton–Schulz in bf16 amplifies the rounding of gradients, so the losses agree less closely than AdamW's."""
    stages = [ONE, TWO, SHARDED, ONE]
    assert train_here(*tiny, *MUON, f"steps={2 * len(stages)}", "micro_batch=8", "run_dir=whole").code == 0
    for number, keys in enumerate(stages, 1):
        start = (*tiny, *MUON, "run_dir=moved") if number == 1 else ("resume=moved",)
        answer = train_here(*start, f"steps={2 * number}", *keys)
        assert answer.code == 0, answer.stderr
    assert losses(Path("moved")) == pytest.approx(losses(Path("whole")), abs=2e-3)


def test_a_resume_that_changes_dropout_masks_warns_once(train_here: Train, tiny: list[str], tmp_path: Path):
    (tmp_path / "pairs.tsv").write_text("\n".join(["source\ttarget", *(f"{n}\t{n * 7}" for n in range(200))]) + "\n")
    pairs = ["task=finetune", "init=run0", "data=pairs", f"path={tmp_path / 'pairs.tsv'}", "batch_sequences=8"]
    pairs += ["context=32", "task.text.examples=0", "task.text.max_new_tokens=8", "task.lora.rank=2", "precision=fp32"]
    pairs += ["logger=none", "callbacks=minimal"]
    rows: list[tuple[list[str], list[tuple[str, str]]]] = [
        ([*tiny, "model.dropout=0.1"], [("workers=1", ""), ("micro_batch=2", "model.dropout=0.1: ")]),
        ([*tiny, "layer_drop=0.5"], [("micro_batch=4", "layer_drop=0.5: ")]),
        ([*pairs, "task.lora.dropout=0.2"], [("micro_batch=8", ""), ("micro_batch=2", "task.lora.dropout=0.2: ")]),
    ]
    for number, (keys, changes) in enumerate(rows):
        assert train_here(*keys, "micro_batch=8", "steps=1", f"run_dir=run{number}").code == 0
        for steps, (change, warning) in enumerate(changes, 2):
            answer = train_here(f"resume=run{number}", f"steps={steps}", change)
            assert answer.code == 0, answer.stderr
            warnings = [line for line in answer.stderr.splitlines() if "dropout masks" in line]
            assert [line.startswith(warning) for line in warnings] == [True] * bool(warning), (change, answer.stderr)
            assert json.loads(Path(f"run{number}/report.json").read_text())["steps"] == steps
