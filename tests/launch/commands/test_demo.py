"""The demo: four train.py commands and one table; a failing stage ends it with the exit code of that stage."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from launch.commands import demo


def test_the_two_students_differ_in_the_teacher_alone(tmp_path: Path) -> None:
    plan = {stage.name: set(stage.arguments) for stage in demo.stages(tmp_path)}
    assert plan["distilled"] ^ plan["scratch"] == {"task=distill", "task=pretrain", f"teacher={tmp_path / 'teacher'}"}


def test_a_failing_stage_ends_the_demo_with_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "TEACHER_STEPS", -1)
    output = io.StringIO()
    assert demo.run_demo(tmp_path, Console(file=output)) == 2
    assert "stage 1 of 4, teacher, ended with exit code 2" in output.getvalue()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_ends_with_a_table_samples_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TEACHER_STEPS", "STUDENT_STEPS", "FINETUNE_STEPS"):
        monkeypatch.setattr(demo, name, 4)
    output = io.StringIO()
    assert demo.run_demo(tmp_path, Console(file=output, width=200)) == 0
    printed = output.getvalue()
    for stage in ("teacher", "distilled", "scratch", "finetuned"):
        assert str(tmp_path / stage / "report.html") in printed
    assert "ROUGE-L" in printed
    assert "nats below" in printed
