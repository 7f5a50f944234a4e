"""The files of a run directory: written atomically, resumed without duplicates, readable after a crash."""

import json
import math
import re
import signal
import subprocess
import sys
import time
from collections import OrderedDict, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2lab.analysis.sweep_axes import override_value
from gpt2lab.errors import InputError
from gpt2lab.number_format import column_decimals, fixed, significant
from gpt2lab.reports.report_html import RunFiles, render
from gpt2lab.reports.row_plot import round_ticks
from gpt2lab.reports.run_report import build_report, write_report
from gpt2lab.reports.run_texts import Example
from gpt2lab.reports.samples_jsonl import Sample, append_samples, drop_samples_after, read_samples
from gpt2lab.storage.atomic_files import input_error_when_full, replaced_folder, write_text
from gpt2lab.storage.checkpoint_ledger import (
    checkpoint_folder,
    commit_checkpoint,
    newest_good_checkpoint,
    read_entries,
    scratch_file,
)
from gpt2lab.storage.metrics_csv import MetricsFile, read_metrics, series
from gpt2lab.storage.report_json import read_report
from gpt2lab.storage.tensor_file import CHECKPOINT_KEYS, read_checkpoint_file, without_objects
from tests.support.pages import charts_of


def save(run_dir: Path, step: int, keep_last: int = 2) -> Path:
    checkpoint_folder(run_dir).mkdir(parents=True, exist_ok=True)
    scratch_file(run_dir, step).write_bytes(bytes([step]) * 1000)
    return commit_checkpoint(run_dir, step, keep_last)


# Checkpoints


def test_a_checkpoint_is_written_without_what_is_not_read_back(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    kept = {"number": 1, "nested": [(1.5, None, b"x"), OrderedDict(a=torch.ones(1))], "type": torch.half, "set": {1}}
    lost = {"array": np.ones(2), "path": Path("x"), "function": lambda: 1, "inner": [{"a": defaultdict(list)}]}
    required = dict.fromkeys(CHECKPOINT_KEYS, 0)
    written = without_objects({**required, **kept, **lost, "callbacks": {**kept, **lost}})
    assert (written.keys(), written["callbacks"].keys()) == ({*required, *kept, "callbacks"}, kept.keys())
    torch.save(written, tmp_path / "file")
    assert read_checkpoint_file(tmp_path / "file")["callbacks"] == kept
    assert all(f"state of {name}:" in caplog.text for name in lost)


def test_newest_checkpoint_is_found_and_the_last_two_are_kept(tmp_path):
    for step in (10, 20, 30):
        newest = save(tmp_path, step)
    assert newest_good_checkpoint(tmp_path) == newest
    assert (checkpoint_folder(tmp_path) / "last").resolve() == newest.resolve()
    names = sorted(path.name for path in checkpoint_folder(tmp_path).iterdir())
    assert names == ["index.json", "last", "step-000020.ckpt", "step-000030.ckpt"]


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_damaged_checkpoint_falls_back_to_the_previous_one(tmp_path, caplog, damage):
    before, newest = save(tmp_path, 10), save(tmp_path, 20)
    if damage == "cut":
        newest.write_bytes(newest.read_bytes()[:500])
    elif damage == "changed":
        newest.write_bytes(b"x" + newest.read_bytes()[1:])
    else:
        newest.unlink()
    assert newest_good_checkpoint(tmp_path) == before
    assert "damaged or missing" in caplog.text


def test_file_missing_in_the_ledger_is_no_checkpoint(tmp_path):
    before = save(tmp_path, 10)
    (checkpoint_folder(tmp_path) / "step-000020.ckpt").write_bytes(b"renamed, but the process died before the ledger")
    assert newest_good_checkpoint(tmp_path) == before
    assert newest_good_checkpoint(tmp_path / "elsewhere") is None


def test_saving_keeps_files_that_are_not_checkpoints_of_the_run(tmp_path):
    save(tmp_path, 10)
    own = ("step-000010-copy.ckpt", "step-best.ckpt", ".step-mine.tmp", "mine.ckpt")
    for name in own:
        (checkpoint_folder(tmp_path) / name).write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    scratch_file(tmp_path, 15).symlink_to(tmp_path / "elsewhere")
    for step in (20, 30, 40):
        save(tmp_path, step)
    assert {path.name for path in checkpoint_folder(tmp_path).iterdir()} >= set(own)
    assert not scratch_file(tmp_path, 15).is_symlink()
    assert (tmp_path / "elsewhere").is_dir()


def test_saving_from_an_older_step_drops_later_checkpoints(tmp_path):
    for step in (10, 20):
        save(tmp_path, step)
    save(tmp_path, 15)
    assert [entry.step for entry in read_entries(tmp_path)] == [10, 15]


SAVING_WITHOUT_END = """
import sys
from pathlib import Path
from gpt2lab.storage.checkpoint_ledger import checkpoint_folder, commit_checkpoint, scratch_file
run = Path(sys.argv[1])
checkpoint_folder(run).mkdir(parents=True, exist_ok=True)
for step in range(1, 100000):
    scratch_file(run, step).write_bytes(str(step).encode() * 20000)
    commit_checkpoint(run, step, 2)
    if step == 1:
        print("saved", flush=True)
"""


@pytest.mark.chaos
def test_kill_while_saving_leaves_a_good_checkpoint(tmp_path):
    for attempt in range(25):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVING_WITHOUT_END, str(tmp_path / str(attempt))], stdout=subprocess.PIPE
        )
        process.stdout.readline()
        time.sleep(0.003 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        newest = newest_good_checkpoint(tmp_path / str(attempt))
        assert newest is not None
        step = int(newest.stem.removeprefix("step-"))
        assert newest.read_bytes() == str(step).encode() * 20000
        assert step >= read_entries(tmp_path / str(attempt))[-1].step  # and it is the newest in the ledger


# Folders and files


def test_a_folder_is_replaced_whole_and_stays_when_writing_fails(tmp_path):
    folder = tmp_path / "hf"
    for content in ("first", "second"):
        with replaced_folder(folder) as scratch:
            (scratch / "file").write_text(content)

    def fail() -> None:
        with replaced_folder(folder) as scratch:
            (scratch / "file").write_text("third")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert (folder / "file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


REPLACING_WITHOUT_END = """
import itertools, sys
from pathlib import Path
from gpt2lab.storage.atomic_files import replaced_folder
for number in itertools.count():
    with replaced_folder(Path(sys.argv[1])) as scratch:
        for name in ("a", "b"):
            (scratch / name).write_text(str(number))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="folders change names in one step on Linux only")
def test_a_link_in_place_of_the_scratch_folder_is_removed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").touch()
    (tmp_path / ".hf.tmp").symlink_to(tmp_path / "elsewhere")
    with replaced_folder(tmp_path / "hf") as scratch:
        (scratch / "new").touch()
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["new"]
    assert (tmp_path / "elsewhere" / "mine").exists()


def test_reader_never_sees_a_missing_or_partial_folder(tmp_path):
    folder = tmp_path / "hf"
    process = subprocess.Popen([sys.executable, "-c", REPLACING_WITHOUT_END, str(folder)])
    try:
        while not folder.exists():
            assert process.poll() is None
        seen, versions = 0, set()
        while seen < 200 or len(versions) < 50:
            assert process.poll() is None
            before = folder.stat()
            versions.add((before.st_ino, before.st_mtime_ns))
            names = sorted(path.name for path in folder.iterdir())
            after = folder.stat()
            if (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns):  # not replaced while listed
                assert names == ["a", "b"]
                seen += 1
    finally:
        process.kill()
        process.wait()


def test_full_disk_error_has_two_lines(tmp_path):
    with pytest.raises(InputError) as caught, input_error_when_full("the checkpoint", "The one of step 10 is intact."):
        raise OSError(28, "No space left on device")
    assert str(caught.value).splitlines() == [
        "No space left to write the checkpoint: No space left on device.",
        "The one of step 10 is intact.",
    ]


# metrics.csv and samples.jsonl


def test_metrics_of_a_step_share_a_row_and_columns_may_be_added(tmp_path):
    file = MetricsFile(tmp_path)
    file.write(10, {"train/loss": 5.0})
    file.write(20, {"train/loss": 4.0, "tokens": 81_920})
    file.write(20, {"val/loss": 4.5})
    file.write(30, {"train/loss": 3.25})
    assert (tmp_path / "metrics.csv").read_text() == (
        "step,train/loss,tokens,val/loss\n10,5,,\n20,4,81920,4.5\n30,3.25,,\n"
    )
    assert series(read_metrics(tmp_path), "train/loss") == [(10, 5.0), (20, 4.0), (30, 3.25)]


def test_resumed_metrics_have_each_step_once_after_a_torn_line(tmp_path):
    first = MetricsFile(tmp_path)
    for step in (10, 20, 30, 40):
        first.write(step, {"train/loss": float(step)})
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("50,3.1")  # killed here
    second = MetricsFile(tmp_path)  # resumes from a checkpoint at step 20
    for step in (30, 40):
        second.write(step, {"train/loss": step + 0.5})
    losses = series(read_metrics(tmp_path), "train/loss")
    assert losses == [(10, 10.0), (20, 20.0), (30, 30.5), (40, 40.5)]


def test_samples_beyond_the_resumed_step_are_dropped(tmp_path):
    for step in (100, 200):
        append_samples(tmp_path, [Sample(step, "def f(", "):\n    return 'ä'", "greedy")])
    drop_samples_after(tmp_path, 100)
    assert [sample.step for sample in read_samples(tmp_path)] == [100]
    keys = set(json.loads((tmp_path / "samples.jsonl").read_text()))
    assert keys == {"step", "prompt", "completion", "method"}


# Report


def test_report_of_a_failed_run_has_its_error_and_progress(tmp_path):
    file = MetricsFile(tmp_path)
    for step in (10, 20, 30):
        speed = 900.0 if step == 10 else 1000.0
        file.write(step, {"train/loss": 50 / step, "tokens_per_second": speed})
    write_report(tmp_path, build_report(tmp_path, "failed", {"task": "pretrain"}, error="ValueError: <no>"))
    report = read_report(tmp_path)
    assert (report["status"], report["error"], report["val_loss"]) == ("failed", "ValueError: <no>", None)
    assert report["tokens_per_second"] == 1000.0  # the first interval is warm-up
    assert "ValueError: &lt;no&gt;" in (tmp_path / "report.html").read_text()


def test_html_report_is_self_contained_with_curve_and_samples():
    rows = [{"step": str(s), "train/loss": str(9 / s), "val/loss": str(10 / s)} for s in (1, 2, 3)]
    samples = [Sample(3, "if x<", "1: pass", "greedy"), Sample(3, "import <|mask|>, re", "import os, re", "fill")]
    page = render("run", {"status": "finished", "val_loss": 3.3}, RunFiles(rows, samples))
    assert "</span>\n→ import os, re</pre>" in page, "a filled gap does not run on from its prompt"
    assert not re.search(r'(?:src|href)="(?!data:,)', page), "nothing is loaded"
    assert [line["name"] for line in charts_of(page)[0]["lines"]] == ["training", "validation"]
    assert charts_of(page)[0]["lines"][1]["points"] == [[1, 10], [2, 5], [3, 3.333333]]
    assert "if x&lt;</span>1: pass" in page


HOSTILE = "</script><script>alert(1)</script><!--"


def test_html_report_escapes_every_text(tmp_path):
    report = {"status": HOSTILE, "task": HOSTILE, "error": HOSTILE, "command": HOSTILE, "metrics": {HOSTILE: 1.0}}
    report |= {"teacher": {"source": HOSTILE, "val_loss": 3.0}, "data": {"name": HOSTILE, "hash": HOSTILE}}
    report |= {"seconds_by_phase": {HOSTILE: 1.0}, "events": [[2, HOSTILE]], "stopped_by": HOSTILE, "steps": 3}
    rows = [{"step": "1", "train/loss": "nan", f"val/{HOSTILE}": "1"}, {"step": "2", "train/loss": "3", "val/x": "inf"}]
    example = Example(HOSTILE, HOSTILE, HOSTILE, HOSTILE, 1.0)
    run = RunFiles(rows, [Sample(1, HOSTILE * 20, HOSTILE, HOSTILE)], [example], [HOSTILE], [HOSTILE], HOSTILE)
    page = render(HOSTILE, report, replace(run, pages={HOSTILE: (HOSTILE, HOSTILE)}, folder=HOSTILE))
    assert "<script>alert" not in page
    assert "<!--" not in page
    assert charts_of(page)[0]["levels"] == [["teacher", 3, "teacher"]]
    assert charts_of(page)[0]["lines"][0]["points"] == [[2, 3]], "NaN is no point"


@pytest.mark.parametrize(("low", "high"), [(0, 300), (3.9, 8.3), (-1e-9, 1e-9), (2.5, 2.6), (1e-5, 3e-5), (0, 10**6)])
def test_ticks_are_round_few_and_inside_the_axis(low, high):
    marks = round_ticks(low, high)
    assert low <= marks[0] < marks[-1] <= high
    assert 2 <= len(marks) <= 9
    assert len({f"{mark:g}" for mark in marks}) == len(marks)


def test_numbers_on_pages_have_three_significant_digits():
    shown = [significant(value) for value in (3.98765, 0.0123456, 12345.6, 999.96, 0, -2.5, 1.23456e-5, 1234567.8)]
    assert shown == ["3.99", "0.0123", "12,300", "1,000", "0", "−2.50", "1.23e-5", "1.23e6"]
    values = {"0.00031234567": "0.000312", "1e-3": "1e-3", "3.14159e-05": "3.14e-5", "nano": "nano", "0.1": "0.1"}
    assert {value: override_value(value) for value in values} == values


@pytest.mark.parametrize(
    ("values", "lower_is_better", "shown"),
    [
        ([3.2314, 3.3291], True, ["3.23", "3.33"]),
        ([3.2314, 3.2291], True, ["3.231", "3.229"]),  # the two best differ in the third decimal
        ([3.2314, 3.2291, 3.5], False, ["3.23", "3.23", "3.50"]),  # of scores the highest is the best
        ([3.23141, 3.23142], True, ["3.2314", "3.2314"]),
        ([3.5, 3.5, 3.5001], True, ["3.5000", "3.5000", "3.5001"]),
        ([20.46, 18.1], False, ["20.5", "18.1"]),
        ([0.5123], True, ["0.512"]),
        ([0.0, -0.25], False, ["0.00", "−0.25"]),
        ([math.nan, math.inf, 12.34], True, ["nan", "inf", "12.3"]),
        ([], True, []),
    ],
)
def test_column_has_the_digits_that_tell_the_best_apart(values, lower_is_better: bool, shown: list[str]):
    decimals = column_decimals(values, lower_is_better)
    assert [fixed(value, decimals) for value in values] == shown


def test_writing_a_text_leaves_no_scratch_file(tmp_path):
    write_text(tmp_path / "report.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
