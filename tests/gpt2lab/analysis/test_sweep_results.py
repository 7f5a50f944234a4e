"""Results of a sweep: the winner, the table, the CSV file and the page."""

import csv
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from benchmarks.simulate_sweeps import SEEDS, SETTINGS, share_found, share_with_winner, share_wrong, simulate
from gpt2lab import metric_names
from gpt2lab.analysis.hyperparameter_importance import importances
from gpt2lab.analysis.setting_comparison import Comparison, Runs, compare
from gpt2lab.analysis.sweep_axes import VariedKey
from gpt2lab.analysis.sweep_runs import summarize
from gpt2lab.reports.run_report import build_report, write_report
from gpt2lab.reports.sweep_charts import _labels, _readable
from gpt2lab.storage.metrics_csv import MetricsFile
from gpt2lab.storage.report_json import read_report
from launch.sweep import results
from launch.sweep.jobs import Job
from tests.support.chromium import PROGRAM, Browser
from tests.support.pages import charts_of

REPETITIONS = 1500
# Sampling error of a share of 5 % in so many simulations: three standard errors above it are chance in 1 of 700 cases.
CHANCE = 3 * math.sqrt(0.05 * 0.95 / REPETITIONS)


def job(
    folder: Path, number: int, overrides: str, value: float | None, metric: str = "val/loss", status: str = ""
) -> Job:
    """A finished job with the files of its run; without a value the job failed before it wrote any."""
    given = shlex.split(overrides)
    made = Job(number, given, folder / str(number), status or ("failed" if value is None else "finished"))
    if made.status == "failed":
        made.error = "it went wrong"
    if value is None:
        return made
    made.folder.mkdir(parents=True)
    metrics = MetricsFile(made.folder)
    for step in (10, 20, 30, 40):
        metrics.write(step, {"val/loss": 3.0 + 40 / step, metric: value + (4 - step / 10), "tokens_per_second": 1000.0})
    command = f"python train.py {shlex.join(given)}"
    facts = {"task": "pretrain", "command": command, "seconds": 10.0 + number, "watched_metric": metric}
    write_report(made.folder, build_report(made.folder, made.status, facts))
    made.watched = value if made.status == "finished" else None
    return made


def swept(folder: Path, values: Mapping[str, float | Sequence[float | None]], metric: str = "val/loss") -> list[Job]:
    """A sweep of settings; several values of a setting are its seeds 1, 2, …"""
    given = [
        (setting, value) if isinstance(own, float) else (f"{setting} seed={seed}", value)
        for setting, own in values.items()
        for seed, value in enumerate([own] if isinstance(own, float) else own, start=1)
    ]
    return [job(folder, number, f"steps=40 {words}", value, metric) for number, (words, value) in enumerate(given)]


def sentences(folder: Path, jobs: list[Job]) -> list[str]:
    return [summarize(group) for group in results.collect_results(folder, jobs).groups]


def best_mean_wins(runs: Runs) -> Comparison:
    order = sorted(runs, key=lambda setting: np.mean([value for _, value in runs[setting]]))
    return Comparison(order, order[:1], {})


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("seeds", SEEDS)
def test_equal_settings_have_no_winner(settings: int, seeds: int):
    """The share of simulated sweeps with a winner is at most 5 %, for any common effect of a seed on all settings."""
    assert share_with_winner(simulate([0.0] * settings, seeds, REPETITIONS)) <= 0.05 + CHANCE


def test_the_best_mean_alone_would_always_win():
    """The naive rule fails the test above, which shows that the test can fail."""
    assert share_with_winner(simulate([0.0] * 4, 3, 100, rule=best_mean_wins)) == 1


@pytest.mark.parametrize("worse", [1.0, 4.0, 30.0])
def test_settings_as_good_as_the_best_are_not_called_worse(worse: float):
    """Settings that are worse are removed first; the same error and tolerance as above."""
    means = [0.0, 0.0, worse, worse]
    assert share_wrong(simulate(means, 3, REPETITIONS), means) <= 0.05 + CHANCE


def test_a_real_difference_is_found():
    assert share_found(simulate([0.0, 8.0, 8.0, 8.0], 3, 200), "0") > 0.95


def test_a_noisy_setting_far_off_does_not_hide_the_winner():
    good = {name: [("1", base), ("2", base + 0.01), ("3", base - 0.01)] for name, base in (("a", 3.9), ("b", 4.2))}
    good["b"][0] = ("1", 4.205)
    found = compare({**good, "far": [("1", 7.0), ("2", 8.5), ("3", 9.0)]}, lower_is_better=True)
    assert found.winner == "a"
    assert found.order == ["a", "b", "far"]


def test_common_effect_of_a_seed_is_not_noise():
    """Runs 0.05 apart within a seed, seeds a whole nat apart; a setting that lacks a seed is judged by the others."""
    base = {"1": 4.0, "2": 5.0, "3": 3.0}
    runs = {
        "a": list(base.items()),
        "b": [(seed, value + 0.05 + 0.001 * int(seed)) for seed, value in base.items()],
        "c": [(seed, value + 0.1 + 0.001 * int(seed)) for seed, value in base.items() if seed != "2"],
    }
    found = compare(runs, lower_is_better=True)
    assert found.order == ["a", "b", "c"], "by its own mean c, without the bad seed, would be best"
    assert found.winner == "a"


def test_repeated_run_counts_once(tmp_path: Path):
    """Two copies of one seed have no noise, so that any difference would be significant."""
    jobs = [job(tmp_path, n, f"lr={lr} seed=1", 3.0 + lr) for n, lr in enumerate([0.1, 0.1, 0.2, 0.2])]
    (line,) = sentences(tmp_path, jobs)
    assert line.startswith("Best seen: lr=0.1")
    assert "one seed each" in line


def test_settings_without_common_seeds_are_independent_runs():
    runs = {"a": [("1", 1.0), ("2", 1.01), ("3", 1.02)], "b": [("4", 2.0), ("5", 2.01), ("6", 2.02)]}
    assert compare(runs, lower_is_better=True).winner == "a"
    assert compare(runs, lower_is_better=False).winner == "b"


def test_one_seed_each_names_no_winner(tmp_path: Path):
    jobs = swept(tmp_path, {"optimizer.lr=1e-3": 3.9, "optimizer.lr=3e-3": 3.5})
    (line,) = sentences(tmp_path, jobs)
    assert line.startswith("Best seen: lr=3e-3 (val/loss 3.50)")
    assert "one seed each" in line


def test_the_winner_of_a_score_is_the_highest(tmp_path: Path):
    values = {"optimizer.lr=1e-3": [10.0, 11.0, 10.5], "optimizer.lr=3e-3": [20.0, 21.0, 20.4]}
    (line,) = sentences(tmp_path, swept(tmp_path, values, metric="val/rougeL"))
    assert line.startswith("Winner: lr=3e-3 (val/rougeL 20.5")
    assert metric_names.lower_is_better("val/loss")


def test_tie_is_reported_as_a_tie(tmp_path: Path):
    values = {"model=nano": [3.5, 3.6, 3.7], "model=micro": [3.6, 3.59, 3.62], "model=mini": [9.1, 9.2, 9.3]}
    jobs = swept(tmp_path, values)
    (line,) = sentences(tmp_path, jobs)
    assert line.startswith("A tie, no winner: best seen is model=nano")
    assert "not significantly better than model=micro; 1 setting is worse" in line
    shown = results.format_results(tmp_path, jobs)
    assert [line.split()[0] for line in shown.splitlines()[1:3]] == ["best", "tie"]


def test_lost_runs_are_reported_and_the_rest_is_compared(tmp_path: Path):
    """Lost runs are those that failed, diverged, were pruned or finished with NaN."""
    values = {
        "model=nano": [3.5, 3.6, None, float("nan")],
        "model=micro": [3.9, 4.01, 4.0, 3.95],
        "model=mini": [None] * 4,
    }
    jobs = [*swept(tmp_path, values), job(tmp_path, 90, "steps=40 model=small seed=1", 5.0, status="pruned")]
    (line,) = sentences(tmp_path, jobs)
    assert line.startswith("Winner: model=nano")
    assert line.endswith("2 of its 4 runs gave no value.")
    shown = results.format_results(tmp_path, jobs)
    assert "2 finished, 1 failed, 1 no number" in shown
    assert "4 failed" in shown
    assert "pruned" in shown
    assert "python train.py steps=40 model=nano seed=1" in shown


def test_losses_of_different_tokens_are_not_compared(tmp_path: Path):
    jobs = swept(tmp_path, {"vocab_size=300": 3.9, "vocab_size=500": 4.4, "model=nano": 4.0})
    lines = sentences(tmp_path, jobs)
    assert len(lines) == 3
    assert all("Only one setting" in sentence for sentence in lines)
    scores = swept(tmp_path / "scores", {"vocab_size=300": 3.9, "vocab_size=500": 4.4}, metric="val/rougeL")
    assert len(sentences(tmp_path / "scores", scores)) == 1


def test_sweep_without_a_finished_run_has_no_winner(tmp_path: Path):
    jobs = [job(tmp_path, 0, "model=nano", None), Job(1, ["model=micro"], tmp_path / "1")]
    results.write(tmp_path, jobs)
    page = (tmp_path / "sweep.html").read_text()
    assert "No run has finished yet." in page
    assert 'http-equiv="refresh"' in page
    assert "waiting" in results.format_results(tmp_path, jobs)


def test_the_csv_has_a_column_for_each_varied_key(tmp_path: Path):
    jobs = [*swept(tmp_path, {"model=nano optimizer.lr=1e-3": [3.5, 3.6], "model=micro": [3.7, None]})]
    results.write(tmp_path, jobs)
    with (tmp_path / "sweep.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["model"], row["optimizer.lr"], row["seed"]) for row in rows] == [
        ("nano", "1e-3", "1"),
        ("nano", "1e-3", "2"),
        ("micro", "", "1"),
        ("micro", "", "2"),
    ]
    assert "steps" not in rows[0]
    assert [row["watched"] for row in rows] == ["3.5", "3.6", "3.7", ""]
    assert rows[3]["error"] == "it went wrong"


def test_the_csv_has_the_command_that_runs_each_job_again(tmp_path: Path):
    """A command can be pasted into a shell, both for a trained job and for one that failed before."""
    done = job(tmp_path, 0, "'name=a b' optimizer.lr=1e-3 n_jobs=2", 3.5)
    failed = job(tmp_path, 1, "'name=a b' optimizer.lr=1e-2 n_jobs=2 resume=auto", None)
    results.write(tmp_path, [done, failed])
    with (tmp_path / "sweep.csv").open() as stream:
        trained, planned = (row["command"] for row in csv.DictReader(stream))
    assert trained == read_report(tmp_path / "0")["command"]
    assert shlex.split(planned) == ["python", "train.py", "name=a b", "optimizer.lr=1e-2"]


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects the text and the links of a page."""

    VOID = ("meta", "br", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.links += [value or "" for name, value in attrs if name in ("href", "src") and value != "data:,"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_shows_every_setting_and_needs_no_network(tmp_path: Path):
    """Names are escaped; links exist for the existing reports alone."""
    words = [
        f"optimizer.lr={lr} model={model}" for lr, model in product(("1e-4", "1e-3", "1e-2"), ("nano", "mi<b>cro"))
    ]
    values: dict[str, list[float | None]] = {
        setting: [3.5 + 0.2 * number, 3.51 + 0.2 * number, None] for number, setting in enumerate(words)
    }
    results.write(tmp_path, swept(tmp_path, values))
    text = (tmp_path / "sweep.html").read_text()
    page = Page(text)
    assert page.links
    assert all((tmp_path / link).is_file() for link in page.links)
    assert "mi&lt;b&gt;cro" in text
    assert "mi<b>cro" not in text
    assert "Winner: lr=1e-4 model=nano" in text
    assert 'http-equiv="refresh"' not in text
    assert "python train.py steps=40 optimizer.lr=1e-4 model=nano seed=1" in text
    of_winner = [tag for tag, attributes in page.found if attributes.get("data-s") == "0"]
    assert of_winner == ["tr", "div"], "its row of the table, and of the means"
    drawn = [sum(line["setting"] == 0 for line in chart["lines"]) for chart in charts_of(text)]
    assert drawn == [2, 1, 1, 1], "two curves, its line over the keys, and a dot for each key"
    assert len(text) < 120_000


def test_page_has_a_bar_per_key_and_a_line_per_job(tmp_path: Path):
    """The learning rate has nearly all of the effect, the model hardly any; one seed each, so a setting is a job."""
    grid = list(product(("1e-4", "1e-3", "1e-2"), ("nano", "micro")))
    effects = {"1e-4": 0.4, "1e-3": 0.0, "1e-2": 0.2, "nano": 0.02, "micro": 0.0}
    losses = [3.5 + effects[lr] + effects[model] for lr, model in grid]
    words = [f"optimizer.lr={lr} model={model}" for lr, model in grid]
    results.write(tmp_path, swept(tmp_path, dict(zip(words, losses, strict=True))))
    page = (tmp_path / "sweep.html").read_text()

    bars = re.findall(
        r'<div class="row( chance)?"><span>([^<]*)</span>.*?class="share" style="left:0;width:(.*?)%"', page
    )
    assert [(key, bool(pale)) for pale, key, _ in bars] == [("optimizer.lr", False), ("model", True)], "largest first"
    assert float(bars[0][2]) > 95
    assert float(bars[1][2]) == 0

    (chart,) = [chart for chart in charts_of(page) if chart["kind"] == "parallel"]
    assert [name for name, _ in chart["axes"]] == ["lr", "model", "val/loss"]
    assert sorted(line["setting"] for line in chart["lines"]) == [0, 1, 2, 3, 4, 5]
    found = [re.match("lr=(.+?) model=(.+?): ", line["name"]) for line in chart["lines"]]
    names = [match.groups() for match in found if match]
    at = dict(zip(names, ([height for _, height in line["points"]] for line in chart["lines"]), strict=True))
    assert sorted(at) == sorted(grid)
    for (lr, model), (_, of_model, _) in at.items():
        assert at[lr, "nano"][0] == at[lr, "micro"][0], "settings with the same value meet on its axis"
        assert of_model == at["1e-4", model][1]
    assert at["1e-4", "nano"][0] < at["1e-3", "nano"][0] < at["1e-2", "nano"][0], "the largest value is on top"
    by_loss = [setting for _, setting in sorted(zip(losses, grid, strict=True))]
    assert sorted(at, key=lambda setting: -at[setting][2]) == by_loss, "the best is on top"
    ends = [text for _, text in chart["axes"][-1][1]]
    assert ends == ["3.920", "3.500"], "the ends of the axis are values of runs"


def test_outlier_is_at_the_edge_and_keeps_its_number(tmp_path: Path):
    values = {f"optimizer.lr={lr}": loss for lr, loss in (("1e-4", 3.5), ("1e-3", 3.6), ("1e-2", 3.7), ("1", 9.9))}
    results.write(tmp_path, swept(tmp_path, {**values, "optimizer.lr=2e-3": 3.55, "optimizer.lr=0.000123456": 3.8}))
    page = (tmp_path / "sweep.html").read_text()
    (chart,) = [chart for chart in charts_of(page) if chart["kind"] == "parallel"]
    assert [text for _, text in chart["axes"][-1][1]] == ["≥ 3.800", "3.500"]
    assert '<span class="value">9.90</span>' in page
    assert "lr=0.000123<" in page, "three significant digits"
    few = tmp_path / "few"
    results.write(few, swept(few, {"optimizer.lr=1": 3.5, "optimizer.lr=2": 3.6, "optimizer.lr=3": 4.1}))
    (chart,) = [one for one in charts_of((few / "sweep.html").read_text()) if one["kind"] == "parallel"]
    assert [text for _, text in chart["axes"][-1][1]] == ["4.100", "3.500"], "the worst of three is no outlier"


LABELS = {  # values of a searched key → those beside its axis
    "apart": (["1", "2", "3"], ["1", "2", "3"]),
    "near the end": (["1", "2", "2.95", "3"], ["1", "2", "3"]),
    "near each other": (["1", "2", "2.05", "3"], ["1", "2", "3"]),
    "two": (["1", "1.1"], ["1", "1.1"]),
    "one": (["1"], ["1"]),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_an_axis_do_not_cover_each_other(kind: str) -> None:
    values, expected = LABELS[kind]
    assert [text for _, text in _readable(_labels(VariedKey(values)))] == expected


def test_table_of_a_search_fits_a_terminal_and_has_short_numbers(tmp_path: Path) -> None:
    values = {f"optimizer.lr={0.004004814616573204 * n} optimizer.weight_decay=0.1{n}": 4.0 + n for n in range(3, 6)}
    jobs = swept(tmp_path, values)
    shown = results.format_results(tmp_path, jobs, 60).splitlines()
    whole = [line for line in shown if not line.startswith(("  python", str(tmp_path)))]
    assert max(map(len, whole)) <= 60
    assert "optimizer.lr=0.012" in "".join(whole)
    assert "0.0120144" in next(line for line in shown if line.startswith("  python")), "a command has all digits"


def test_failed_sweep_names_its_jobs_and_is_over(tmp_path: Path):
    results.write(tmp_path, [job(tmp_path, 0, "model=nano", None)])
    page = (tmp_path / "sweep.html").read_text()
    assert "No run has a result." in page
    assert "folder\N{NO-BREAK SPACE}0 (failed)</a>" in page


def test_key_without_effect_has_no_importance():
    draws = np.random.default_rng(0)
    grid = list(product(("1e-4", "1e-3", "1e-2", "1e-1"), ("nano", "micro"), ("0.0", "0.1", "0.2")))
    keys = {name: [point[column] for point in grid] for column, name in enumerate(("lr", "model", "dropout"))}
    results = [abs(math.log10(float(lr)) + 2) + 0.01 * draws.normal() for lr, _, _ in grid]
    first, *rest = importances(keys, results)
    assert (first.key, first.is_significant) == ("lr", True)
    assert first.share > 0.99
    assert all(not one.is_significant and one.share < 0.1 for one in rest)


def test_key_without_effect_is_rarely_significant():
    """A key is significant in 5 % of random searches; three standard errors of 400 simulations are 3.3 %."""
    draws, significant = np.random.default_rng(0), 0
    for _ in range(400):
        rates = 10 ** draws.uniform(-4, -1, 20)
        keys = {"lr": [f"{rate:.5g}" for rate in rates], "model": [str(model) for model in draws.integers(2, size=20)]}
        significant += any(
            one.key == "model" and one.is_significant for one in importances(keys, list(np.abs(np.log10(rates) + 2.5)))
        )
    assert significant / 400 <= 0.05 + 0.033


def test_more_seeds_do_not_make_a_key_significant(tmp_path: Path):
    """Seeds of one setting are no evidence on a key: a value with one setting has no importance, at three seeds too."""
    values: dict[str, list[float | None]] = {
        f"model={name}": [4.0 + 0.3 * number + 0.01 * seed for seed in range(3)]
        for number, name in enumerate(("nano", "micro", "mini", "distil"))
    }
    results.write(tmp_path, swept(tmp_path, values))
    assert "Too few settings to estimate the importance of keys." in (tmp_path / "sweep.html").read_text()


def test_randomly_sampled_values_have_importances():
    """No two settings share a learning rate: neighbours are binned. The other key has a third of the effect."""
    draws = np.random.default_rng(0)
    rates = 10 ** draws.uniform(-4, -1, 60)
    models = draws.integers(2, size=60)
    results = list(np.abs(np.log10(rates) + 2.5) + 0.6 * models)
    found = {
        one.key: one for one in importances({"lr": [str(r) for r in rates], "model": [str(m) for m in models]}, results)
    }
    assert found["lr"].is_significant
    assert 0.4 < found["lr"].share < 0.8
    assert 0.2 < found["model"].share < 0.6


def test_too_few_settings_have_no_importances():
    assert importances({"model": ["nano", "micro", "mini"]}, [1.0, 2.0, 3.0]) == []
    assert importances({"model": ["a", "b", "c", "d"]}, [2.0] * 4) == []
    assert importances({"model": ["a", "b", "c", "d"]}, [1.0, 2.0, 3.0, 4.0]) == [], (
        "each setting has a word of its own"
    )


def test_values_over_several_magnitudes_use_a_log_axis():
    assert VariedKey(["1e-4", "1e-3", "1e-2"]).positions == pytest.approx([0, 0.5, 1])
    assert VariedKey(["0.001", "0.01"]).is_log
    assert VariedKey(["1", "2", "5"]).positions == pytest.approx([0, 0.25, 1])
    assert VariedKey(["adamw", "muon", "adamw"]).positions == [0, 1, 0]
    unset = VariedKey(["", "0.1", "0.2"]).positions
    assert unset[0] == 0
    assert 0 < unset[1] < unset[2] == 1


@pytest.mark.skipif(PROGRAM is None, reason="needs chromium: apt install chromium")
def test_pointing_at_a_setting_shows_it_in_every_plot(tmp_path: Path):
    results.write(
        tmp_path, swept(tmp_path, {"model=nano": [3.5, 3.6], "model=micro": [3.9, 4.1], "model=mini": [5, 5]})
    )
    browser = Browser(tmp_path / "browser")
    try:
        browser.open((tmp_path / "sweep.html").as_uri())
        browser.point("tr[data-s='1'] td.number")
        browser.wait("document.body.classList.contains('hot')")
        assert browser.value("[...document.querySelectorAll('.on')].map(one => one.dataset.s)") == ["1"] * 3
        marked = browser.value("[...document.querySelectorAll('figure.plot')].map(one => one.dataset.on)")
        assert marked == ["1", "1", "1"], "curves, keys and results, slice"
        assert not [event for event in browser.events if event.get("method") == "Runtime.exceptionThrown"]
    finally:
        browser.close()
