"""Standard errors and intervals equal the plain formulas and have their nominal coverage."""

import math

import numpy as np
import pytest
import torch
from sacrebleu.metrics import CHRF

from gpt2lab.data.document_groups import WindowDocuments, document_sums
from gpt2lab.evaluation.bootstrap import resampled_scores, text_differences, text_scores
from gpt2lab.evaluation.document_losses import DocumentLosses
from gpt2lab.evaluation.jackknife import TOKENS, GroupedSums, Sums, interval_factor, mean_error, standard_errors
from gpt2lab.generation.decoding_speed import median_with_error
from tests.support.text_values import text_metrics


def mean_of(sums: Sums) -> dict[str, float]:
    return {"mean": (sums["sum"] / sums[TOKENS]).item()}


def sums_of(values: torch.Tensor) -> Sums:
    return {"sum": values, TOKENS: torch.ones(len(values))}


def test_jackknife_error_of_a_mean_equals_the_formula() -> None:
    values = torch.randn(150, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = standard_errors(sums_of(values), mean_of)["mean"]
    assert found == pytest.approx(values.std().item() / math.sqrt(150), rel=1e-9)
    assert mean_error(values, torch.ones(150)) == pytest.approx(found, rel=1e-9)


def test_targets_of_one_group_count_as_one() -> None:
    values = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grouped = GroupedSums()
    for part in torch.arange(2000).split(64):  # 2,000 targets with the information of 200
        groups = part // 10
        grouped.add({"sum": values[groups], TOKENS: torch.ones(len(part))}, groups)
    found = standard_errors(grouped.scored(), mean_of)["mean"]
    assert found == pytest.approx(values.std().item() / math.sqrt(200), rel=1e-9)


def test_one_group_has_no_error() -> None:
    assert standard_errors(sums_of(torch.ones(1)), mean_of) == {}
    assert mean_error(torch.ones(1), torch.ones(1)) is None


@pytest.mark.parametrize(
    ("documents", "spread"),
    [  # of lengths, as of their logarithm
        (20, 0.0),
        (20, 0.7),
        (20, 1.2),
        (60, 0.7),
        (60, 1.2),
        pytest.param(1500, 0.7, marks=pytest.mark.slow),  # more than there are groups
    ],
)
def test_intervals_cover_the_mean_of_clustered_text(documents: int, spread: float) -> None:
    """300 texts in windows of 64 tokens: document effects as large as the noise of a token, lognormal lengths."""
    random, covered = np.random.default_rng(documents), 0
    for _ in range(300):
        lengths = np.maximum(np.exp(random.normal(3 if documents < 100 else 1, spread, documents)), 2).astype(int)
        tokens = np.ones((lengths + 1).sum(), int)
        tokens[np.cumsum(lengths + 1) - lengths - 1] = 0
        effects = 3 + random.normal(0, 1, documents).repeat(lengths + 1)
        losses = torch.from_numpy((effects + random.normal(0, 1, len(tokens)))[1:])
        starts = np.arange(0, len(tokens) - 1, 64)
        places = starts[:, None] + np.arange(64)
        kept = torch.from_numpy(places < len(tokens) - 1)
        inputs = torch.from_numpy(tokens[np.minimum(places, len(tokens) - 1)])
        groups = WindowDocuments(tokens, 0, "synthetic").target_groups(starts, inputs, kept)
        found = DocumentLosses.of(*document_sums(losses, groups).values())
        assert found.standard_error is not None
        mean = sum(found.nats) / sum(found.targets)
        covered += abs(mean - 3) < found.standard_error * interval_factor(torch.tensor(found.targets))
    assert 0.92 <= covered / 300 <= 0.98


PREDICTIONS = [f"return the {word} of a list" for word in ("first", "last", "sum", "length", "name", "copy") * 8]
REFERENCES = [f"return {word} of the list" for word in ("first", "end", "sum", "size", "name", "copy") * 8]


def test_values_are_those_without_an_interval_and_lie_in_it() -> None:
    names = ["rouge1", "rougeL", "bleu", "chrf", "exact", "f1", "compiles"]
    plain = text_metrics(names, PREDICTIONS, REFERENCES)
    found = text_scores(names, PREDICTIONS, REFERENCES)
    for name in names:
        assert found[name].value == pytest.approx(plain[name], abs=1e-9)
        low, high = found[name].low, found[name].high
        assert low - 1e-9 <= found[name].value <= high + 1e-9
    assert "nc:6" in found["chrf"].signature


@pytest.mark.parametrize("name", ["rougeL", "bleu", "chrf", "exact", "f1"])
def test_difference_of_texts_is_paired_by_document(name: str) -> None:
    better = [*REFERENCES[:30], *PREDICTIONS[30:]]
    ours, theirs = (resampled_scores([name], texts, REFERENCES) for texts in (better, PREDICTIONS))
    found = text_differences(ours, theirs)[name]
    assert found.value == pytest.approx(ours[name].value - theirs[name].value)
    assert 0 < found.low < found.value < found.high
    grouped = (resampled_scores([name], PREDICTIONS, REFERENCES, groups=[n // 4 for n in range(48)]) for _ in range(2))
    same = text_differences(*grouped)[name]
    assert same.value == same.low == same.high == 0


def test_single_text_has_no_interval() -> None:
    for score in text_scores(["rougeL", "chrf", "f1"], ["a b"], ["a c"]).values():
        assert score.standard_error is score.low is score.high is None


def test_bootstrap_error_of_a_mean_equals_the_formula() -> None:
    found = text_scores(["exact"], ["a", "b", "c", "x"] * 50, ["a", "b", "c", "d"] * 50)["exact"]
    expected = 100 * math.sqrt(0.75 * 0.25 / 200)
    assert found.standard_error == pytest.approx(expected, rel=0.1)
    assert found.high - found.low == pytest.approx(2 * 1.96 * expected, rel=0.1)


def test_chrf_intervals_equal_a_plain_bootstrap() -> None:
    ours = text_scores(["chrf"], PREDICTIONS, REFERENCES)["chrf"]
    draws = np.random.default_rng(1)
    drawn = []
    for _ in range(300):
        places = draws.integers(0, len(REFERENCES), len(REFERENCES))
        again = [PREDICTIONS[place] for place in places], [REFERENCES[place] for place in places]
        drawn.append(CHRF().corpus_score(again[0], [again[1]]).score)
    assert ours.standard_error == pytest.approx(float(np.std(drawn)), rel=0.2)


def test_texts_of_one_document_are_resampled_together() -> None:
    predictions, references = ["a", "b", "c", "x"] * 10, ["a", "b", "c", "d"] * 10
    alone = text_scores(["exact", "chrf"], predictions, references)
    repeated = [text for text in predictions for _ in range(4)], [text for text in references for _ in range(4)]
    together = text_scores(["exact", "chrf"], *repeated, groups=[n // 4 for n in range(160)])
    for name in alone:
        assert together[name].standard_error == pytest.approx(alone[name].standard_error, rel=0.15)


def test_median_error_equals_the_exact_bootstrap() -> None:
    # Of five draws three or more are the outlier with probability 0.05792; then the median is 100, else 1.
    share = sum(math.comb(5, k) * 0.2**k * 0.8 ** (5 - k) for k in (3, 4, 5))
    median, error = median_with_error([1.0, 1.0, 100.0, 1.0, 1.0])
    assert median == 1
    assert error == pytest.approx(99 * math.sqrt(share * (1 - share)), rel=0.2)
    assert median_with_error([7, 7, 7]) == (7, 0)
