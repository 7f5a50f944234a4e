"""Standard errors and intervals are those of the plain formulas, and cover what they promise to."""

import math

import numpy as np
import pytest
import torch
from sacrebleu.metrics import CHRF

from gpt2lab.decoding_speed import median_with_error
from gpt2lab.standard_errors import Sums, standard_errors
from gpt2lab.text_intervals import text_scores
from gpt2lab.text_metrics import text_metrics


def mean_of(sums: Sums) -> dict[str, float]:
    return {"mean": (sums["sum"] / sums["count"]).item()}


def rows_of(values: torch.Tensor) -> list[Sums]:
    return [{"sum": value, "count": torch.tensor(1)} for value in values]


def test_the_error_of_a_mean_of_equal_rows_is_that_of_the_textbook() -> None:
    values = torch.randn(150, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = standard_errors(rows_of(values), mean_of)["mean"]
    assert found == pytest.approx(values.std().item() / math.sqrt(150), rel=1e-9)


def test_neighbours_that_belong_together_count_as_one() -> None:
    values = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    repeated = values.repeat_interleave(10)  # 2,000 rows that say no more than 200
    found = standard_errors(rows_of(repeated), mean_of)["mean"]
    assert found == pytest.approx(values.std().item() / math.sqrt(200), rel=1e-9)


def test_one_row_tells_no_error() -> None:
    assert standard_errors(rows_of(torch.ones(1)), mean_of) == {}


def test_two_standard_errors_cover_a_ratio_19_times_in_20() -> None:
    draws, covered = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        counts = torch.randint(1, 9, (100,), generator=draws)
        noise = torch.randn(100, generator=draws, dtype=torch.float64) * counts
        rows = [{"sum": 2.0 * count + one, "count": count} for count, one in zip(counts, noise, strict=True)]
        total = {name: torch.stack([row[name].double() for row in rows]).sum() for name in ("sum", "count")}
        error = standard_errors(rows, mean_of)["mean"]
        covered += abs(mean_of(total)["mean"] - 2.0) < 1.96 * error
    assert 0.92 < covered / 400 < 0.98


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


def test_one_text_tells_no_interval() -> None:
    for score in text_scores(["rougeL", "chrf", "f1"], ["a b"], ["a c"]).values():
        assert score.standard_error is score.low is score.high is None


def test_the_bootstrap_error_of_a_mean_is_that_of_the_textbook() -> None:
    found = text_scores(["exact"], ["a", "b", "c", "x"] * 50, ["a", "b", "c", "d"] * 50)["exact"]
    expected = 100 * math.sqrt(0.75 * 0.25 / 200)
    assert found.standard_error == pytest.approx(expected, rel=0.1)
    assert found.high - found.low == pytest.approx(2 * 1.96 * expected, rel=0.1)


def test_chrf_intervals_are_as_wide_as_those_of_texts_drawn_by_hand() -> None:
    ours = text_scores(["chrf"], PREDICTIONS, REFERENCES)["chrf"]
    draws = np.random.default_rng(1)
    drawn = []
    for _ in range(300):
        places = draws.integers(0, len(REFERENCES), len(REFERENCES))
        again = [PREDICTIONS[place] for place in places], [REFERENCES[place] for place in places]
        drawn.append(CHRF().corpus_score(again[0], [again[1]]).score)
    assert ours.standard_error == pytest.approx(float(np.std(drawn)), rel=0.2)


def test_the_error_of_a_median_is_that_of_all_ways_to_draw_its_values_again() -> None:
    # Of five draws three or more are the outlier with probability 0.05792; then the median is 100, else 1.
    share = sum(math.comb(5, k) * 0.2**k * 0.8 ** (5 - k) for k in (3, 4, 5))
    median, error = median_with_error([1.0, 1.0, 100.0, 1.0, 1.0])
    assert median == 1
    assert error == pytest.approx(99 * math.sqrt(share * (1 - share)), rel=0.2)
    assert median_with_error([7, 7, 7]) == (7, 0)
