"""Pages of results in Chromium: no horizontal scrolling, no small text, no errors, hover and zoom, at three widths."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gpt2lab.analysis.sweep_runs import group_runs
from gpt2lab.reports import page, report_html, run_texts, sweep_html
from gpt2lab.reports.samples_jsonl import Sample
from tests.support.chromium import PROGRAM, Browser, faults, show_file
from tests.support.pages import metrics, result_pages, run_page, sweep_runs

needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="needs chromium: apt install chromium")
LARGEST_PAGE = 2_000_000  # bytes, of a run
UPLOT = {  # SHA-256 of the files in the npm package uplot 1.6.32
    "uplot.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uplot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("browser"))
    yield found
    found.close()


def drag(browser: Browser, selector: str, start: float, end: float) -> None:
    """Drag over an element, from and to a share of its width."""
    box = browser.value(
        f"(() => {{ const one = document.querySelector({selector!r}); one.scrollIntoView({{block: 'center'}});"
        "const {x, y, width, height} = one.getBoundingClientRect(); return {x, y, width, height}; })()"
    )
    y = box["y"] + box["height"] / 2
    for kind, share in (("mouseMoved", start), ("mousePressed", start), ("mouseMoved", end), ("mouseReleased", end)):
        button = {"button": "left", "buttons": 1, "clickCount": 1} if kind != "mouseMoved" or share == end else {}
        place = {"type": kind, "x": box["x"] + share * box["width"], "y": y}
        browser.call("Input.dispatchMouseEvent", {**place, **button})


@needs_chromium
def test_run_page_fits_a_phone_and_zooms(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "run.html").write_text(result_pages()["run"])
    show_file(browser, tmp_path / "run.html", 390)
    assert faults(browser, 390) == {}
    plot = "document.querySelector('figure.plot').plot"
    assert browser.value(f"[{plot}.scales.x.min, {plot}.scales.x.max]") == [10, 400]
    drag(browser, "figure.plot .u-over", 0.25, 0.75)
    low, high = browser.value(f"[{plot}.scales.x.min, {plot}.scales.x.max]")
    assert 50 < low < 150 < 250 < high < 350
    assert "validation" in browser.value("document.querySelector('figure.plot .u-legend').innerText")
    select = "document.getElementById('x-axis')"
    browser.value(f"{select}.value = 'seconds'; {select}.dispatchEvent(new Event('input'))")
    assert browser.value(f"[{plot}.scales.x.min, {plot}.scales.x.max]") == [5, 200], (
        "5,000 tokens each 10 steps at 1,000/s"
    )


@needs_chromium
@pytest.mark.slow
def test_controls_change_the_curves_and_survive_a_reload(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "run.html").write_text(run_page())
    show_file(browser, tmp_path / "run.html", 1440)
    plot = "document.querySelector('figure.plot').plot"
    last = browser.value(f"{plot}.data[1].at(-1)")
    for name, change in (("log-x", "checked = true"), ("log-y", "checked = true"), ("smoothing", "value = 0.9")):
        control = f"document.getElementById('{name}')"
        browser.value(f"{control}.{change}; {control}.dispatchEvent(new Event('input'))")
    for _ in range(2):
        assert browser.value(f"[{plot}.scales.x.min, {plot}.scales.x.max, {plot}.scales.x.distr]") == [10, 400, 3]
        assert browser.value(f"{plot}.scales.y.distr") == 3
        labels = browser.value(f"{plot}.series.map(one => one.label)")
        assert labels[1:4] == ["training", "training, smoothed", "validation"]
        assert browser.value(f"{plot}.data[2].at(-1)") > last, "the average of falling values lies above the last"
        assert faults(browser, 1440) == {}
        show_file(browser, tmp_path / "run.html", 1440)


@needs_chromium
@pytest.mark.slow
def test_page_of_a_killed_run_shows_how_to_resume_it(browser: Browser, tmp_path: Path) -> None:
    report = {"status": "running", "task": "pretrain", "model": "nano", "steps": 10}
    for name, patience, is_late in (("late", -1.0, True), ("current", 1e6, False)):
        run = report_html.RunFiles(metrics(10), folder="runs/pretrain/a b", patience=patience)
        (tmp_path / f"{name}.html").write_text(report_html.render(name, report, run))
        show_file(browser, tmp_path / f"{name}.html", 390)
        assert faults(browser, 390) == {}
        shown = browser.value("document.body.innerText")
        assert "last update" in shown
        assert ("later than expected" in shown) == is_late
        assert ("python train.py resume='runs/pretrain/a b'" in shown) == is_late


def test_unfinished_sweep_shows_when_it_was_updated() -> None:
    runs = sweep_runs()
    waiting = replace(runs[0], number=12, status="waiting", error="")
    text = sweep_html.render("sweep", group_runs([*runs, waiting], []))
    assert 'http-equiv="refresh"' in text
    assert 'data-patience="244"' in text, "a minute and three times the longest job"
    assert page.AGE not in sweep_html.render("sweep", group_runs(runs, []))


def test_tall_texts_are_folded_and_repeated_lines_counted() -> None:
    lines = "\n".join(f"line {number}" for number in range(40))
    assert "times" not in run_texts.samples_html([Sample(1, "a", "x = 1\n1\n1\n1\n2", "greedy")])
    page = run_texts.samples_html([Sample(1, "def f(", "\n" * 50 + "x = 1", "greedy"), Sample(1, "a", lines, "top_k")])
    assert page.count("\n") < 60
    assert "50 times" in page
    assert "26 more lines</summary>line 14" in page


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 768, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_fits_every_width(browser: Browser, tmp_path: Path, width: int, scheme: str) -> None:
    for name, text in result_pages().items():
        (tmp_path / f"{name}.html").write_text(text)
        show_file(browser, tmp_path / f"{name}.html", width, scheme)
        assert (name, faults(browser, width)) == (name, {})
        assert browser.value("getComputedStyle(document.body).backgroundColor") == (
            "rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 24, 30)"
        )


def test_every_page_is_small_and_runs_no_text_of_a_user() -> None:
    for name, text in {**result_pages(), "long run": run_page(steps=4000)}.items():
        assert len(text.encode()) < LARGEST_PAGE, name
        assert "<script>alert" not in text, name
        assert "<!--" not in text, name


def test_the_chart_library_is_unchanged_and_has_its_licence() -> None:
    folder = Path(page.__file__).parent
    for name, digest in UPLOT.items():
        header, _, content = (folder / name).read_text().partition("*/\n")
        assert "MIT" in header
        assert hashlib.sha256(content.removesuffix("\n" * name.endswith(".css")).encode()).hexdigest() == digest
    assert "Permission is hereby granted" in page.render_page("", "", "", page.PLOT)
