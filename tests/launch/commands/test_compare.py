"""compare: one page for any runs, with intervals, overlaid curves and configuration differences."""

import re
import sys
from pathlib import Path

import pytest
import yaml

from gpt2lab.errors import InputError
from gpt2lab.evaluation.document_losses import DocumentLosses, write_document_losses
from gpt2lab.reports.run_report import build_report, write_report
from gpt2lab.storage.metrics_csv import MetricsFile
from gpt2lab.storage.report_json import read_report
from launch.commands.compare import compare_runs, main
from tests.support.pages import charts_of


def stored(folder: Path, shift: float, data: str = "abc", **config: object) -> Path:
    """Write the files of a finished run whose loss is `shift` nats higher on every document."""
    folder.mkdir(parents=True)
    content = {"name": folder.name, "seed": 1, "optimizer": {"name": "muon", "lr": 1e-3}, "teacher": None} | config
    (folder / "config.yaml").write_text(yaml.safe_dump({"config": content}))
    targets = [200, 50, 100]
    nats = [loss + shift * count for loss, count in zip((900.0, 100.0, 330.0), targets, strict=True)]
    write_document_losses(folder, DocumentLosses([0, 1, 2], nats, targets, data))
    file = MetricsFile(folder)
    for step in (10, 20):
        file.write(step, {"train/loss": 4 + shift, "val/loss": sum(nats) / sum(targets), "tokens": step * 9})
    facts = {"watched_metric": "val/loss", "steps": 20, "command": f"python train.py name={folder.name}"}
    write_report(folder, build_report(folder, "finished", {**facts, "data": {"name": "text", "hash": data}}))
    return folder


def test_comparison_pairs_documents_and_names_differences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = stored(tmp_path / "scratch", 0.0)
    second = stored(tmp_path / "<b>distilled", -0.25, teacher="runs/teacher", optimizer={"name": "adamw", "lr": 1e-3})
    out = tmp_path / "page.html"
    monkeypatch.setattr(sys, "argv", ["compare", str(first), str(second), f"out={out}"])
    main()
    printed, page = capsys.readouterr().out, out.read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert printed.startswith("Best seen: <b>distilled (val/loss 3.55)")
    assert "The runs differ in " in printed
    assert "python train.py 'name=<b>distilled'" in printed or "python train.py name=<b>distilled" in printed
    assert "0.250 (0.250 … 0.250)" in page, "the difference, paired by document"
    assert "&lt;b&gt;distilled" in page
    assert "<b>distilled" not in page
    curve = charts_of(page)[0]
    assert [(line["name"], line["points"]) for line in curve["lines"]] == [
        ("scratch", [[10, 3.8], [20, 3.8]]),
        ("<b>distilled", [[10, 3.55], [20, 3.55]]),
    ]
    keys = page.partition("<h2>Configuration differences</h2>")[2]
    assert re.findall(r">([^<>]+)</td>", keys)[:3] == ["optimizer", "muon", "adamw"]
    assert "optimizer.lr" not in keys
    assert 'href="scratch/report.html"' in page


def test_seeds_of_one_configuration_are_one_setting(tmp_path: Path) -> None:
    for number, (seed, lr, loss) in enumerate([(1, 1e-3, 0.0), (2, 1e-3, 0.01), (1, 1e-2, 0.5), (2, 1e-2, 0.52)]):
        stored(tmp_path / "sweep" / str(number), loss, seed=seed, optimizer={"name": "muon", "lr": lr})
    results, notes = compare_runs([tmp_path / "sweep"], tmp_path / "page.html")
    assert notes == []
    assert [setting.name for setting in results.settings] == ["lr=0.001", "lr=0.01"]
    assert results.groups[0].comparison.winner == "lr=0.001"


def test_losses_on_other_data_are_not_compared(tmp_path: Path) -> None:
    runs = [stored(tmp_path / "a", 0.0), stored(tmp_path / "b", 0.1, data="other")]
    results, notes = compare_runs(runs, tmp_path / "page.html")
    assert [len(group.settings) for group in results.groups] == [1, 1]
    assert notes[0].startswith("Runs with another metric, validation data or tokenizer are not compared")


def test_runs_of_unequal_length_are_compared_at_equal_tokens(tmp_path: Path) -> None:
    short, long = stored(tmp_path / "short", 0.0), tmp_path / "long"
    stored(long, 0.0, steps=60)
    file = MetricsFile(long)
    for step, value in ((10, 4.5), (20, 4.0), (40, 3.0), (60, 2.0)):
        file.write(step, {"train/loss": 4, "val/loss": value, "tokens": step * 9, "tokens_per_second": 5})
    write_report(long, build_report(long, "finished", {**read_report(long), "steps": 60}))
    file = MetricsFile(short)
    for step in (10, 20):
        file.write(step, {"train/loss": 4, "val/loss": 3.9, "tokens": step * 9, "tokens_per_second": 5})
    _, notes = compare_runs([short, long], tmp_path / "page.html")
    assert len(notes) == 1
    assert "trained on 180 to 540 tokens" in notes[0]
    assert "after 180 tokens: short 3.90, long 4.00" in notes[0]
    assert notes[0] in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Give at least two run directories"),
        (["a"], "Give at least two run directories"),
        (["a", "a"], "Give at least two run directories"),
        (["a", "nowhere"], "nowhere is neither a run directory nor a folder of runs"),
        (["a", "damaged"], "damaged/config.yaml is damaged"),
        (["a", "b", "out=nowhere/page.html"], "out=nowhere/page.html cannot be written"),
        (["a", "b", "to=page.html"], "There is no key to"),
    ],
)
def test_invalid_arguments_write_no_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    stored(Path("a"), 0.0)
    stored(Path("b"), 0.0)
    Path("damaged").mkdir()
    Path("damaged/config.yaml").write_text("config: [")
    monkeypatch.setattr(sys, "argv", ["compare", *words])
    with pytest.raises(InputError, match=message):
        main()
    assert not list(tmp_path.glob("*.html"))
