"""The demo: its commands, estimate, page and results; stages are reused; the commands at its end work as printed."""

import io
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from gpt2lab.errors import InputError
from gpt2lab.evaluation.document_losses import DocumentLosses, share_of_gap
from gpt2lab.reports import demo_html
from gpt2lab.reports.samples_jsonl import Sample, append_samples
from gpt2lab.storage.report_json import read_report
from launch.commands import demo, demo_results
from launch.commands.demo_clock import Clock, in_minutes, remaining_seconds
from launch.commands.demo_page import DemoPage
from launch.commands.demo_stages import FULL, QUICK, TRAINED, choose_folder, read_text, stages
from launch.exit_codes import exit_code
from tests.conftest import ROOT
from tests.launch.commands.test_compare import stored
from tests.support.chromium import PROGRAM, Browser

DATA = ("data=stdlib",)


@pytest.mark.parametrize("sizes", [FULL, QUICK], ids=["full", "quick"])
def test_students_differ_in_teacher_and_initial_weights(sizes: demo.Sizes, tmp_path: Path) -> None:
    plan = {stage.name: set(stage.arguments) for stage in stages(tmp_path, sizes, DATA)}
    own = {name: {f"run_dir={tmp_path / name}"} for name in plan}
    taught = {"task=distill", f"teacher={tmp_path / 'teacher'}", f"baseline={tmp_path / 'scratch'}"}
    apart = plan["distilled"] ^ plan["scratch"]
    assert apart == {"task=pretrain"} | taught | own["distilled"] | own["scratch"]
    apart = plan["from_layers"] ^ plan["distilled"]
    assert apart == {"init=teacher_layers"} | own["distilled"] | own["from_layers"]


def test_better_student_is_fine_tuned(tmp_path: Path) -> None:
    stored(tmp_path / "from_layers", 0.1)
    stored(tmp_path / "distilled", -0.1)
    chosen = stages(tmp_path, QUICK, DATA, demo.best_student(tmp_path))
    assert f"init={tmp_path / 'distilled'}" in chosen[4].arguments


def test_failing_stage_names_what_remains_and_how_to_continue(tmp_path: Path) -> None:
    output = io.StringIO()
    sizes = replace(QUICK, steps=(-1, 1, 1))
    assert demo.run_demo(tmp_path, sizes, ("data=text", "path=my notes"), Console(file=output, width=200)) == 2
    printed = output.getvalue()
    assert "stage teacher ended with exit code 2; scratch, distilled, from_layers, finetuned, scores did" in printed
    assert "Continue with: make demo-quick DATA='my notes'" in printed
    assert printed.startswith(f"All runs on one page, updated while they train: {tmp_path.as_uri()}/demo.html")
    page = (tmp_path / "demo.html").read_text()
    assert "teacher ended with exit code 2" in page
    assert 'http-equiv="refresh"' not in page


def test_estimate_scales_the_usual_times_by_the_measured_step(tmp_path: Path) -> None:
    plan = stages(tmp_path, FULL, DATA)
    usual = sum(stage.seconds for stage in plan[1:]) + (plan[0].steps - 10) * plan[0].step_seconds
    assert remaining_seconds(plan[0], plan, 2.0) == pytest.approx(2 * usual)
    line = Clock(plan).first_estimate(plan[0], 2 * plan[0].step_seconds)
    took = f"one took {2 * plan[0].step_seconds:.2f} s, on an idle"
    assert line.startswith(f"Estimate: about {in_minutes(2 * usual)} in total: after 10 steps, {took}")


@pytest.mark.parametrize("bars", [1, 2])
def test_estimate_is_not_overwritten_by_bars_of_a_stage(bars: int) -> None:
    """The stage moves up by its bars, less one, and erases each row before it draws them again."""
    rows = ("Estimate: about 4 min in total" + demo.ABOVE_BARS).split("\n")
    kept = rows[: len(rows) - bars]
    assert kept[0].startswith("Estimate: about 4 min")


@pytest.mark.parametrize(("active", "is_printed"), [("", True), ("/clone/.venv", False)])
def test_end_names_the_environment_to_activate(
    folder: Path, monkeypatch: pytest.MonkeyPatch, active: str, is_printed: bool
) -> None:
    monkeypatch.setenv("VIRTUAL_ENV", active)
    output = io.StringIO()
    page = DemoPage(folder.parent, Path(folder.name), stages(Path(folder.name), FULL, DATA))
    monkeypatch.setattr(demo, "HOME", folder.parent)
    demo.print_results(Path(folder.name), page, Console(file=output, width=100))
    assert ("source .venv/bin/activate" in output.getvalue()) == is_printed
    assert max(map(len, output.getvalue().partition("nucleus")[0].splitlines())) <= 100


def test_estimate_is_corrected_by_the_stages_that_ended(tmp_path: Path) -> None:
    plan = stages(tmp_path, FULL, DATA)
    clock = Clock(plan)
    assert clock.end_stage(plan[0], 5.0, is_whole=False) == "", "a resumed stage measures nothing"
    left = 3 * sum(stage.seconds for stage in plan[2:])
    assert f"About {in_minutes(left)} left" in clock.end_stage(plan[1], 3 * plan[1].seconds, is_whole=True)
    other_start = stages(tmp_path, FULL, DATA, "distilled")[4]
    assert "finetuned took 9 s" in clock.end_stage(other_start, 9.0, is_whole=True)
    assert clock.end_stage(plan[-1], 1.0, is_whole=True) == ""


@pytest.mark.parametrize(("seconds", "text"), [(8, "8 s"), (61, "1½ min"), (120, "2 min"), (470, "8 min")])
def test_minutes_are_rounded_up_to_halves(seconds: float, text: str) -> None:
    assert in_minutes(seconds) == text


def test_demo_continues_in_its_folder_and_others_get_their_own(tmp_path: Path) -> None:
    first = choose_folder(tmp_path, FULL, DATA, "")
    assert first == Path("runs/demo")
    assert choose_folder(tmp_path, FULL, DATA, "") == first
    assert choose_folder(tmp_path, QUICK, DATA, "") == Path("runs/demo-quick")
    own = ("data=text", "path=notes")
    second = choose_folder(tmp_path, FULL, own, "abc")
    assert second == Path("runs/demo-2")
    assert choose_folder(tmp_path, FULL, own, "abc") == second
    assert choose_folder(tmp_path, FULL, own, "changed") == Path("runs/demo-3")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["path=nowhere"], "path=nowhere: no such file or folder"),
        (["path=short.txt"], "DATA=short.txt has 3,000 characters of text; make demo needs 200,000 or more"),
        (["path=short.txt", "quick=true"], "has 3,000 characters of text; make demo-quick needs 40,000 or more"),
        (["path=middle.txt"], "Give a folder with more text, or make demo-quick with 40,000"),
        (["path=data.bin"], "unknown kind of file"),
        (["steps=3"], "There is no key steps"),
    ],
)
def test_unusable_text_is_an_error_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("ab\n" * 1000)
    Path("middle.txt").write_text("ab\n" * 30_000)
    Path("data.bin").write_bytes(b"\0")
    monkeypatch.setattr(sys, "argv", ["demo", *words])
    monkeypatch.setattr(demo, "run_demo", lambda *_: pytest.fail("a stage was started"))
    with pytest.raises(InputError, match=re.escape(message)):
        demo.main()
    assert not Path("runs").exists()


def test_text_is_known_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("ab\n" * 30_000)
    before = read_text(str(file), QUICK)
    file.write_text("ac\n" * 30_000)
    assert read_text(str(file), QUICK) != before


def test_share_of_the_gap_has_an_error_between_documents() -> None:
    targets = [200, 50, 100]
    teacher, scratch, student = (
        DocumentLosses([0, 1, 2], [loss * count for count in targets], targets, "h") for loss in (3.0, 4.0, 3.25)
    )
    assert share_of_gap(student, scratch, teacher) == pytest.approx((0.75, 0.0), abs=1e-12)
    assert share_of_gap(student, replace(scratch, data="other"), teacher) is None
    assert share_of_gap(student, teacher, scratch) is None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A demo whose four models of running text are finished."""
    for name, shift in (("teacher", -0.5), ("scratch", 0.0), ("distilled", -0.2), ("from_layers", -0.4)):
        stored(tmp_path / name, shift)
        texts = ["greedy text", f"    return '{name}' and a line that is longer than a third of sixty columns\n" * 20]
        append_samples(
            tmp_path / name,
            [
                Sample(20, "def add(a, b):\n", text, kind)
                for text, kind in zip(texts, ("greedy", "nucleus"), strict=True)
            ],
        )
    return tmp_path


@pytest.mark.parametrize("width", [60, 100])
def test_results_fit_the_terminal(folder: Path, width: int) -> None:
    output = io.StringIO()
    console = Console(file=output, width=width)
    console.print(demo_results.results_table(demo_results.results_rows(folder, TRAINED[:4]), width))
    demo_results.print_samples(folder, console)
    printed = output.getvalue()
    assert max(map(len, printed.splitlines())) <= width
    assert "80 % ± 0 %" in printed, "the share of the gap that from_layers closes"
    assert "greedy text" not in printed
    heads = next(line for line in printed.splitlines() if "scratch" in line and "teacher" in line)
    assert heads.split() == ["teacher", "from_layers", "scratch"]


def test_page_shows_all_runs_and_reloads_until_the_end(folder: Path) -> None:
    page = DemoPage(folder.parent, Path(folder.name), stages(Path(folder.name), FULL, DATA))
    page.write("finetuned")
    content = (folder / "demo.html").read_text()
    assert 'http-equiv="refresh"' in content
    assert 'href="teacher/report.html"' in content
    assert "from_layers − scratch: −0.4000" in content
    assert content.count('"name":"from_layers"') >= 2, "curves of all stages"
    assert "<td>waiting</td>" in content or "<td>running</td>" in content
    assert content.index("<small>teacher</small>") < content.index("<small>scratch</small>")
    page.write(ended="All stages are finished")
    content = (folder / "demo.html").read_text()
    assert 'http-equiv="refresh"' not in content
    assert "make demo DATA=docs" in content


@pytest.mark.skipif(PROGRAM is None, reason="needs Chromium")
def test_open_page_follows_the_demo(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    page = DemoPage(folder.parent, Path(folder.name), stages(Path(folder.name), FULL, DATA))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_html, "RELOAD_SECONDS", 1)
        page.write("from_layers")
        browser = Browser(tmp_path_factory.mktemp("browser"))
        try:
            browser.open(page.address)
            assert _shows(browser, "from_layers is running")
            page.write("finetuned")
            assert _shows(browser, "finetuned is running")
        finally:
            browser.close()


def _shows(browser: Browser, text: str) -> bool:
    for _ in range(50):
        with suppress(AssertionError):  # while the page reloads, it has no content
            return bool(browser.wait(f"document.body.innerText.includes({text!r})"))
    return False


def paste(command: str) -> subprocess.Popen[str]:
    """Start a command as pasted into a shell in the checkout, with the environment activated."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.Popen(
        ["bash", "-c", f"exec {command}"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_quick_demo_continues_and_its_commands_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, sent = tmp_path / "demo-quick", []
    folder.mkdir()
    monkeypatch.setattr(demo, "choose_folder", lambda *_: folder)
    monkeypatch.setattr(sys, "argv", ["demo", "quick=true"])
    update = DemoPage.update

    def interrupted(page: DemoPage, running: str) -> None:
        update(page, running)
        if running == "scratch" and not sent and (folder / "scratch/metrics.csv").exists():
            sent.append(os.kill(os.getpid(), signal.SIGINT))

    monkeypatch.setattr(DemoPage, "update", interrupted)
    assert exit_code(demo.main) == 130
    printed = capsys.readouterr().out
    assert "Estimate: about " in printed
    assert "stage scratch ended with exit code 130; distilled, from_layers, finetuned, scores did not start" in printed
    assert exit_code(demo.main) == 0
    printed = capsys.readouterr().out
    assert "Finished before and not run again: teacher." in printed
    assert [read_report(folder / name)["steps"] for name in TRAINED] == [40, 30, 30, 30, 30]
    for part in ("gap closed", "from_layers − scratch: ", "first words", "nucleus samples", "docstring"):
        assert part in printed
    *models, own = demo_results.next_commands(folder, demo.best_student(folder)).values()
    assert all(command in printed for command in [*models, own])
    _check_commands(models)
    assert read_text(own.partition("DATA=")[2], FULL)
    subprocess.run(
        shlex.split(f"make --dry-run {own.removeprefix('make ')}"), cwd=ROOT, check=True, capture_output=True
    )


def _check_commands(commands: list[str]) -> None:
    """Run the commands; the playground until its page answers."""
    for command in commands:
        is_server = "serve=true" in command
        process = paste(f"{command} port=0" if is_server else command)
        assert process.stdout is not None
        if is_server:
            address = next(found[0] for line in process.stdout if (found := re.search(r"http://\S+:\d+", line)))
            assert b"<html" in urllib.request.urlopen(address).read()
            process.send_signal(signal.SIGINT)
        printed, _ = process.communicate()
        assert process.returncode in ((0, 130) if is_server else (0,)), printed


def test_estimate_leaves_out_the_steps_that_compile(tmp_path: Path) -> None:
    rows = {5: 41.0, 10: 42.0, 15: 99.0}
    for shown, found in {(): None, (5,): None, (5, 10): 0.2, (5, 10, 15): 0.2}.items():
        lines = [f"{step},{rows[step]}" for step in shown]
        (tmp_path / "metrics.csv").write_text("\n".join(["step,seconds", *lines, ""]))
        assert demo._seconds_per_step(tmp_path) == found
