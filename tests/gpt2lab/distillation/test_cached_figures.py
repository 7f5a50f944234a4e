"""Distillation figures from a top-k cache equal those of the full teacher, or are bounds of them."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gpt2lab import metric_names as names
from gpt2lab.evaluation.distillation_metrics import distillation_sums, figures
from gpt2lab.losses.dense_teacher import DenseTeacher
from gpt2lab.losses.top_k_teacher import TopKTeacher
from gpt2lab.storage.metrics_csv import read_metrics, series
from gpt2lab.storage.report_json import read_report
from tests.conftest import Distil, Train
from tests.gpt2lab.evaluation.test_distillation_metrics import (
    ROWS,
    VOCABULARY,
    WIDTH,
    LargestTensor,
    example,
    target_count,
)

EXACT = (
    names.VAL_LOSS,
    names.DISTILL_TOP1_AGREEMENT,
    names.DISTILL_TOP5_AGREEMENT,
    names.DISTILL_ENTROPY_STUDENT,
    names.DISTILL_ECE,
    names.DISTILL_TEACHER_ECE,
)
BELOW = (names.DISTILL_KL, names.DISTILL_REVERSE_KL, names.DISTILL_TVD, names.DISTILL_ENTROPY_TEACHER)


def stored(teacher: DenseTeacher, labels: Tensor, k: int, dtype: torch.dtype | None = None) -> TopKTeacher:
    """Return the top-k record of the teacher at the targets, in this dtype."""
    p = (teacher.hidden @ teacher.weight.T)[labels != -100].softmax(1)
    top, ids = p.topk(k)
    rounded, tail = top.to(dtype or p.dtype).to(p.dtype), p.scatter(1, ids, 0.0).sum(1, keepdim=True)
    return TopKTeacher(ids, torch.cat([rounded, tail], 1).log())


def both(k: int, dtype: torch.dtype, of_records: torch.dtype | None = None) -> tuple[dict[str, float], ...]:
    """Return the figures from k tokens and those of the full teacher."""
    hidden, weight, labels, teacher = example(dtype)
    targets = target_count(labels)
    entries = stored(teacher, labels, k, of_records)
    return tuple(figures(distillation_sums(hidden, weight, labels, one), targets) for one in (entries, teacher))


@pytest.mark.parametrize("k", [VOCABULARY, VOCABULARY - 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_top_k_of_the_full_vocabulary_gives_every_figure(k, dtype, tolerance) -> None:
    found, whole = both(k, dtype)
    del whole[names.DISTILL_TEACHER_LOSS]  # stored with the record
    assert found == pytest.approx(whole, abs=tolerance)


@pytest.mark.parametrize("k", [5, 20, 64])
def test_small_top_k_gives_exact_figures_or_bounds(k) -> None:
    found, whole = both(k, torch.float64)
    for name in EXACT:
        assert found[name] == pytest.approx(whole[name], abs=1e-10), name
    for name in BELOW:
        assert 0 < found[name] < whole[name], name
    assert found[names.DISTILL_ACCEPTANCE] > whole[names.DISTILL_ACCEPTANCE]
    assert found.keys() | {names.DISTILL_TEACHER_LOSS} == whole.keys()


def test_larger_k_gives_tighter_bounds() -> None:
    rising = [both(k, torch.float64)[0] for k in (5, 20, 64, VOCABULARY)]
    for name in BELOW:
        values = [found[name] for found in rising]
        assert values == sorted(values), name


def test_records_in_float16_cost_no_more_than_their_rounding() -> None:
    found, whole = both(64, torch.float32, torch.float16)[0], both(64, torch.float32)[0]
    assert found == pytest.approx(whole, abs=2**-11)  # half a unit in the last of its eleven bits


@pytest.mark.parametrize("chunk_rows", [1, 7, 4096])
def test_chunk_size_changes_no_sum_and_bounds_every_tensor(chunk_rows) -> None:
    hidden, weight, labels, teacher = example(torch.float64)
    entries = stored(teacher, labels, 20)
    whole = distillation_sums(hidden, weight, labels, entries)
    with LargestTensor() as largest:
        found = distillation_sums(hidden, weight, labels, entries, chunk_rows=chunk_rows)
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value)
    assert largest.size <= max(min(chunk_rows, target_count(labels)) * VOCABULARY, VOCABULARY * WIDTH, ROWS * WIDTH)


@pytest.mark.slow
def test_the_compiled_chunk_gives_the_same() -> None:
    hidden, weight, labels, teacher = example(torch.float32)
    entries = stored(teacher, labels, 20)
    plain = distillation_sums(hidden, weight, labels, entries, chunk_rows=18)
    compiled = distillation_sums(hidden, weight, labels, entries, chunk_rows=18, compiled=True)
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-5, atol=1e-5)


def test_a_batch_without_targets_adds_nothing() -> None:
    hidden, weight, labels, teacher = example(torch.float32)
    none = torch.full_like(labels, -100)
    sums = distillation_sums(hidden, weight, none, stored(teacher, none, 20))
    assert not any(value.any() for value in sums.values())


def test_records_of_other_positions_are_refused() -> None:
    hidden, weight, labels, teacher = example(torch.float32)
    with pytest.raises(ValueError, match="one row per target, here 35"):
        distillation_sums(hidden, weight, labels, stored(teacher, torch.zeros_like(labels), 20))


# Through train.py

# Students trained on labels alone do not depend on the teacher, so only the figures can differ.
ALIKE = ("loss.hard_weight=1", "loss.temperature=2", "optimizer=adamw", "steps=8", "validate_every=4")


@pytest.mark.slow
def test_cached_run_logs_the_figures_of_an_online_run(
    distil: Distil,
    train_here: Train,
    tiny: list[str],
    tmp_path: Path,
) -> None:
    assert train_here(*tiny, "steps=2", "optimizer=adamw", "run_dir=baseline").code == 0
    kept = {
        "online": (),
        "every": ("teacher_cache=topk", "teacher_cache.k=300", "teacher_cache.dtype=float32"),
        "few": ("teacher_cache=sampled",),
    }
    stderr = {run: distil(*ALIKE, *keys, "baseline=baseline", f"run_dir={run}").stderr for run, keys in kept.items()}
    online, every, few = (
        {name: read_report(tmp_path / run)["metrics"].get(name) for name in (names.VAL_LOSS, *names.DISTILLATION)}
        for run in kept
    )
    assert every == pytest.approx(online, abs=1e-5)
    for name in (*EXACT, names.DISTILL_TEACHER_LOSS, names.DISTILL_GAP_CLOSED):
        assert few[name] == pytest.approx(online[name], abs=2**-11), name
    for name in BELOW:
        assert 0 < few[name] < online[name], name
    rows = read_metrics(tmp_path / "few")
    for name in names.DISTILLATION:
        assert [step for step, _ in series(rows, name)] == [4, 8], name
    seen_before = [re.findall(r"preflight: teacher \S+", stderr[run]) for run in ("online", "every")]
    assert seen_before[0] == seen_before[1] != []
