"""The teacher cache is written once, completely and without bias; a student learns from it as from the teacher."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from gpt2lab.data.batch import IGNORE_INDEX, Batch
from gpt2lab.data.data_order import uniforms
from gpt2lab.distillation.teacher_cache import CacheSide, cache_sides, record_type, systematic_sample
from gpt2lab.losses.dense_teacher import DenseTeacher
from gpt2lab.losses.lm_head_loss import lm_head_loss
from gpt2lab.losses.sampled_teacher import SampledTeacher
from gpt2lab.losses.top_k_teacher import TopKTeacher
from gpt2lab.settings import LossSettings, TeacherCacheSettings
from gpt2lab.storage.report_json import read_report
from tests.conftest import Answer, Distil, Train

VOCABULARY, WIDTH, LONGEST = 61, 8, 12


class TalkativePairs:
    """Samples of different lengths, with targets on their last positions only."""

    def __init__(self, samples: int = 40) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(VOCABULARY, (samples, LONGEST), generator=generator)
        self.counts = torch.randint(1, LONGEST, (samples,), generator=generator).numpy()

    def __len__(self) -> int:
        return len(self.ids)

    def target_counts(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.counts[rows]

    def batch(self, rows: NDArray[np.int64], target_tokens: int) -> Batch:
        labels = self.ids[rows].roll(-1, 1)
        for place, row in enumerate(rows):
            labels[place, : LONGEST - self.counts[row]] = IGNORE_INDEX
        return Batch(self.ids[rows], labels, target_tokens, torch.from_numpy(rows))


def teacher(batch: Batch) -> DenseTeacher:
    """Deterministic, and different for every token."""
    generator = torch.Generator().manual_seed(1)
    embedding = torch.randn(VOCABULARY, WIDTH, generator=generator)
    weight = torch.randn(VOCABULARY + 3, WIDTH, generator=generator)  # three padding tokens
    return DenseTeacher(embedding[batch.input_ids].flatten(0, 1), weight)


def batches(samples: TalkativePairs, rows: NDArray[np.int64], size: int = 4) -> Iterator[Batch]:
    for start in range(0, len(rows), size):
        yield samples.batch(rows[start : start + size], 0)


def written(folder: Path, settings: TeacherCacheSettings, temperature: float = 1.0) -> tuple[CacheSide, TalkativePairs]:
    samples, side = TalkativePairs(), CacheSide(folder, "train", settings, VOCABULARY)
    side.create(samples)
    side.write(batches(samples, side.missing(np.arange(len(samples)))), teacher, temperature)
    return side, samples


def probabilities(batch: Batch, temperature: float = 1.0) -> Tensor:
    """Return the teacher's probabilities (targets, V) without padding."""
    dense = teacher(batch)
    kept = batch.labels.flatten() != IGNORE_INDEX
    return (dense.hidden[kept] @ dense.weight[:VOCABULARY].T / temperature).softmax(1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_records_have_the_exact_tail(tmp_path, temperature) -> None:
    side, samples = written(tmp_path, TeacherCacheSettings("topk", k=5, dtype="float32"), temperature)
    batch = samples.batch(np.array([7, 3, 31]), 0)
    signal, p = side.signal(batch), probabilities(batch, temperature)
    assert isinstance(signal, TopKTeacher)
    torch.testing.assert_close(signal.logs[:, :-1].exp(), p.gather(1, signal.ids))
    assert torch.equal(signal.ids[:, 0], p.argmax(1))
    torch.testing.assert_close(signal.logs[:, -1].exp(), 1 - p.topk(5).values.sum(1), rtol=1e-4, atol=1e-6)


def test_without_its_tail_a_record_sums_to_one(tmp_path) -> None:
    side, samples = written(tmp_path, TeacherCacheSettings("topk", k=5, tail=False))
    signal = side.signal(samples.batch(np.array([7]), 0))
    torch.testing.assert_close(signal.logs[:, :-1].exp().sum(1), torch.ones(len(signal.ids)))
    assert not signal.logs[:, -1].exp().any()


def test_full_top_k_cache_gives_the_loss_of_the_online_teacher(tmp_path) -> None:
    side, samples = written(tmp_path, TeacherCacheSettings("topk", k=VOCABULARY, dtype="float32"))
    batch = samples.batch(np.arange(9), 0)
    kept = batch.labels.flatten() != IGNORE_INDEX
    labels, dense = batch.labels.flatten()[kept], teacher(batch)
    torch.manual_seed(2)
    hidden = torch.randn(len(labels), WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    for name in ("forward_kl", "reverse_kl", "jsd"):
        mix = LossSettings(name, hard_weight=0.3)
        live = DenseTeacher(dense.hidden[kept], dense.weight)
        losses = [
            lm_head_loss(hidden, weight, labels, teacher=signal, loss=mix).total
            for signal in (side.signal(batch), live)
        ]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)
        gradients = [torch.autograd.grad(loss, (hidden, weight)) for loss in losses]
        for cached, online in zip(*gradients, strict=True):
            assert (cached - online).norm() <= 1e-6 * online.norm()


def test_draws_are_unbiased_and_take_at_most_36_bytes_a_token() -> None:
    torch.manual_seed(0)
    p = torch.randn(5, 200).mul(2).softmax(1)
    rows, n = 40_000, 12
    counts = torch.zeros_like(p)
    for row in range(5):
        found = systematic_sample(p[row].expand(rows // 10, -1), n, np.arange(rows // 10) + row * rows, seed=3)
        counts[row] = found.flatten().bincount(minlength=200) / found.numel()
    error = (counts - p).abs() / (p / (n * rows / 10)).sqrt()  # in standard errors of independent draws
    assert error.max() < 5
    assert error.square().mean() < 1.1  # not above that of independent draws
    assert record_type(TeacherCacheSettings("sampled", n=12), 50_257).itemsize <= 36


def test_token_is_sampled_its_expected_count_rounded() -> None:
    p = torch.tensor([[0.75, 0.2, 0.05]])
    for number in range(50):
        found = systematic_sample(p, 12, np.array([number]), seed=0)
        assert (found == 0).sum() == 9
        assert 2 <= (found == 1).sum() <= 3


def test_draws_depend_on_seed_and_position_alone(tmp_path) -> None:
    settings = TeacherCacheSettings("sampled", n=6)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    side, samples = written(tmp_path / "a", settings)
    other = CacheSide(tmp_path / "b", "train", settings, VOCABULARY)
    other.create(samples)
    other.write(batches(samples, np.arange(len(samples))[::-1].copy(), size=7), teacher, 1.0)
    assert (tmp_path / "a" / "train.bin").read_bytes() == (tmp_path / "b" / "train.bin").read_bytes()
    signal = side.signal(samples.batch(np.array([2]), 0))
    assert isinstance(signal, SampledTeacher)
    p = probabilities(samples.batch(np.array([2]), 0))
    torch.testing.assert_close(signal.entropy, torch.special.entr(p).sum(1), rtol=1e-3, atol=0)
    assert not np.allclose(uniforms(np.arange(100), 0), uniforms(np.arange(100), 1))


def test_interrupted_cache_is_completed_without_rewriting(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("gpt2lab.distillation.teacher_cache.SAMPLES_OF_A_COMMIT", 8)
    for folder in ("whole", "stopped"):
        (tmp_path / folder).mkdir()
    settings = TeacherCacheSettings("topk", k=4)
    written(tmp_path / "whole", settings)
    samples, side = TalkativePairs(), CacheSide(tmp_path / "stopped", "train", settings, VOCABULARY)
    side.create(samples)

    def stopping() -> Iterator[Batch]:
        for number, batch in enumerate(batches(samples, np.arange(40))):
            if number == 5:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        side.write(stopping(), teacher, 1.0)
    left = side.missing(np.arange(40))
    assert 0 < len(left) < 40
    side.create(samples)  # the start of a second writer
    assert np.array_equal(side.missing(np.arange(40)), left)
    side.write(batches(samples, left), teacher, 1.0)
    for part in ("bin", "nats"):
        whole, stopped = ((tmp_path / folder / f"train.{part}").read_bytes() for folder in ("whole", "stopped"))
        assert whole == stopped


def test_truncated_cache_file_is_rewritten(tmp_path) -> None:
    side, samples = written(tmp_path, TeacherCacheSettings("topk", k=4))
    records = tmp_path / "train.bin"
    records.write_bytes(records.read_bytes()[:-1])
    side.create(samples)
    assert len(side.missing(np.arange(40))) == 40


def test_teacher_loss_is_stored_with_its_records(tmp_path) -> None:
    side, samples = written(tmp_path, TeacherCacheSettings("sampled"), temperature=2.0)
    batch = samples.batch(np.array([1, 5]), 0)
    kept = batch.labels.flatten() != IGNORE_INDEX
    expected = -probabilities(batch).gather(1, batch.labels.flatten()[kept][:, None]).log().sum()
    assert side.nats(np.array([1, 5])) == pytest.approx(expected.item(), rel=1e-5)


def test_validation_always_has_whole_distributions_to_compare(tmp_path) -> None:
    for name in ("topk", "sampled"):
        sides = cache_sides(tmp_path, TeacherCacheSettings(name, tail=False), VOCABULARY)
        assert sides["val"].settings.name == "topk"
        assert sides["val"].settings.tail


# Through train.py

PLAIN = ("optimizer=adamw", "optimizer.lr=1e-3")  # Muon orthogonalizes in bf16, which magnifies rounding
EXACT = (*PLAIN, "teacher_cache=topk", "teacher_cache.k=300", "teacher_cache.dtype=float32")


def test_cached_run_loads_no_teacher_and_trains_the_same(
    distil: Distil, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distil(*PLAIN, "run_dir=online")
    assert "the teacher reads" in distil(*EXACT, "run_dir=first").stderr
    monkeypatch.setattr("gpt2lab.distillation.teacher.load_backbone", None)  # loading a teacher fails now
    assert "the teacher reads" not in distil(*EXACT, "run_dir=second").stderr
    weights = [load_file(tmp_path / run / "hf" / "model.safetensors") for run in ("online", "first", "second")]
    for name, online in weights[0].items():
        assert torch.equal(weights[1][name], weights[2][name])
        assert (weights[1][name] - online).norm() <= 1e-4 * online.norm()
    teacher_losses = [read_report(tmp_path / run)["teacher"]["val_loss"] for run in ("online", "second")]
    assert teacher_losses[1] == pytest.approx(teacher_losses[0], rel=1e-5)


def test_cache_has_the_samples_of_a_run_and_grows_with_it(distil: Distil) -> None:
    sampled = ("teacher_cache=sampled", "run_dir=a")
    first = sequences_read(distil(*sampled, "steps=2"))
    assert sequences_read(distil("teacher_cache=sampled", "run_dir=b", "steps=5")) == 3 * 8
    assert first > 2 * 8  # validation text too
    assert sequences_read(distil("teacher_cache=sampled", "run_dir=c", "steps=2", "seed=2")) <= 2 * 8


def sequences_read(answer: Answer) -> int:
    found = re.search(r"the teacher reads (\d+) sequences", answer.stderr)
    return int(found.group(1)) if found else 0


OF_THE_KEY = ["loss.temperature=2", "teacher_cache.k=7"]
ALSO_OF_THE_KEY = ["teacher_cache.dtype=float32", "context=16", "teacher=entries", "teacher=weights"]


@pytest.mark.parametrize("changes", [OF_THE_KEY, pytest.param(ALSO_OF_THE_KEY, marks=pytest.mark.slow)], ids=len)
def test_cache_key_includes_everything_records_depend_on(
    changes: list[str], distil: Distil, train_here: Train, tiny: list[str], tmp_path: Path
) -> None:
    settings = ("teacher_cache=topk", "teacher_cache.k=5", "steps=1", "preflight=warn")
    for name, change in (("entries", "vocab_size=290"), ("weights", "seed=7")):
        if f"teacher={name}" in changes:
            assert train_here(*tiny, change, "steps=2", f"run_dir={name}").code == 0
    for caches, change in enumerate(("seed=1", *changes), 1):
        assert sequences_read(distil(*settings, change, f"run_dir=run{caches}")) > 0, change
        assert len(list((tmp_path / "cache" / "teachers").glob("*/key.json"))) == caches, change


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("teacher_cache=sampled", "loss=jsd"), "loss=forward_kl"),
        (("teacher_cache=topk", "loss=mse"), "another loss"),
        (("teacher_cache=topk", "loss=uld"), "loss=uld needs the teacher's"),
        (("teacher_cache=sampled", "loss=uld"), "loss=forward_kl"),
        (("teacher_cache=topk", "loss.hidden_cosine=1"), "hidden states"),
        (("teacher_cache=topk", "teacher_cache.n=3"), "teacher_cache=sampled reads it"),
        (("teacher_cache.k=3",), "teacher_cache=topk reads it"),
        (("teacher_cache=topk", "teacher_cache.dtype=int8"), "float16, float32"),
    ],
)
def test_loss_that_a_cache_cannot_serve_is_refused(
    train_here: Train, tiny: list[str], overrides: tuple[str, ...], words: str
) -> None:
    answer = train_here(*tiny, "task=distill", "teacher=somewhere", *overrides)
    assert answer.code == 2
    assert words in answer.stderr
