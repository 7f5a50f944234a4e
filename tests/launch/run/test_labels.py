"""Labels of runs: readable names, tags and searchable values, from the configuration."""

from dataclasses import replace
from pathlib import Path

import pytest

from launch.run.labels import run_labels, searchable_values
from tests.support.configurations import composed, prepared, resolved

DISTILL = "task=distill teacher=gpt2 loss=jsd loss.temperature=2 seed=1"


@pytest.mark.parametrize(
    ("words", "name", "tags"),
    [
        ("seed=3", "pretrain-nano-s3", "pretrain nano stdlib clm"),
        (DISTILL, "distill-nano-jsd-T2-s1", "distill nano stdlib jsd"),
        ("task=finetune data=summarize model=nano", "finetune-nano-summarize-s1337", "finetune nano summarize clm"),
        ("objective=mlm model=micro", "pretrain-micro-s1337", "pretrain micro stdlib mlm"),
        ("name=mine", "FOLDER", "pretrain nano stdlib clm"),
        ("run_dir=runs/mine", "FOLDER", "pretrain nano stdlib clm"),
    ],
)
def test_a_run_has_a_readable_name_and_tags(words: str, name: str, tags: str, tmp_path: Path):
    spec = prepared(resolved(composed(*words.split())))
    labels = run_labels(spec, tmp_path)
    assert (labels.name, " ".join(labels.tags)) == (name.replace("FOLDER", tmp_path.name), tags)
    assert (labels.job_type, labels.group) == (spec.config.task_name, "")
    assert labels.data == (spec.config.groups["data"], "hash")
    assert labels.models == {"distill": ("gpt2",), "finetune": ("latest",)}.get(spec.config.task_name, ())


def test_a_job_of_a_sweep_or_study_is_in_its_group(tmp_path: Path):
    spec = prepared(resolved(composed(*DISTILL.split())))
    job = replace(spec, config=replace(spec.config, invocation=replace(spec.config.invocation, sweep="swept")))
    labels = run_labels(job, tmp_path / "3")
    assert (labels.name, labels.group) == ("distill-nano-jsd-T2-s1-job3", "swept")
    (tmp_path / "study.json").write_text("{}")
    assert run_labels(spec, tmp_path / "one").group == tmp_path.name


@pytest.mark.parametrize(
    ("words", "variable", "is_requested"),
    [
        ("", "", False),
        ("seed=2", "", False),
        ("logger=wandb", "", True),
        ("logger.project=mine", "", True),
        ("", "offline", True),
    ],
)
def test_wandb_is_silent_unless_it_was_requested(
    words: str, variable: str, is_requested: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WANDB_MODE", variable)
    assert run_labels(prepared(resolved(composed(*words.split()))), tmp_path).is_requested == is_requested


def test_searchable_values_have_groups_and_plain_keys_on_top():
    values = searchable_values(prepared(resolved(composed(*DISTILL.split(), "optimizer.lr=0.5"))))
    expected = {"task": "distill", "model": "nano", "loss": "jsd", "data": "stdlib", "optimizer": "muon", "seed": 1}
    assert expected.items() <= values.items()
    assert values["config"]["optimizer"]["lr"] == 0.5
    assert values["config"]["loss"]["temperature"] == 2
    assert values["lineage"] == {"data": "stdlib", "data_hash": "hash", "teacher": "gpt2", "init": "scratch"}
