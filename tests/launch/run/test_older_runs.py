"""Runs of an older version: what their files lack takes its default, and a resume reads only what the run reads."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gpt2lab.errors import InputError
from gpt2lab.settings import LoraSettings
from gpt2lab.storage.checkpoint_ledger import newest_good_checkpoint
from gpt2lab.storage.report_json import read_report
from launch.commands.compare import _configuration
from launch.config import run_spec
from launch.config.known_keys import check_nodes
from launch.run.card_facts import recipe
from tests.conftest import Train
from tests.support.configurations import composed, prepared, resolved

NEW = ("profile", "hub")  # keys and groups that older programs did not have


def make_older(run: Path) -> None:
    """Remove from a run what the newest versions have added to config.yaml and to checkpoints."""
    stored: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
    config = stored["config"]
    for name in NEW:
        del config[name]
    del config["invocation"]["groups"]["hub"], config["data"]["languages"], config["callbacks"]["profile"]
    config["invocation"]["references"] = {
        place: key for place, key in config["invocation"]["references"].items() if "profile" not in place
    }
    (run / "config.yaml").write_text(yaml.safe_dump(stored))
    checkpoint = newest_good_checkpoint(run)
    assert checkpoint is not None
    state = torch.load(checkpoint, weights_only=True)
    (best,) = [part for part in state["callbacks"].values() if "errors" in part]
    del best["errors"]
    torch.save(state, checkpoint)


REMOVED = {  # part of config.yaml that no version leaves out → message
    "config.invocation.groups.task": "invocation.groups lacks task",
    "config.invocation.groups": "invocation.groups lacks",
    "config.invocation": "invocation.groups lacks",
    "config.task._target_": "has no _target_",
    "config.optimizer.lr": "lr",
    "resolved.machine": "machine",
    "prepared": "prepared",
}


@pytest.mark.parametrize("place", REMOVED)
def test_config_without_a_needed_part_is_refused(place: str) -> None:
    tree = yaml.safe_load(run_spec.to_yaml(prepared(resolved(composed("model=nano", "teacher=x", "task=distill")))))
    *outer, name = place.split(".")
    node = tree
    for part in outer:
        node = node[part]
    del node[name]
    with pytest.raises(InputError, match=re.escape(REMOVED[place])):
        check_nodes(run_spec.from_yaml(run_spec.PreparedSpec, yaml.safe_dump(tree), "config.yaml").config.target_nodes)


LACKING = {  # keys of the task that an older version did not store → adapters
    "rank": LoraSettings(0, 16.0, 0.1),
    "alpha": LoraSettings(4, 32.0, 0.1),
    "dropout": LoraSettings(4, 16.0, 0.0),
}


@pytest.mark.parametrize("key", LACKING)
def test_keys_that_a_stored_task_lacks_have_their_defaults(key: str) -> None:
    given = ("task.lora.rank=4", "task.lora.alpha=16.0", "task.lora.dropout=0.1")
    tree = yaml.safe_load(run_spec.to_yaml(prepared(resolved(composed("task=finetune", "model=nano", *given)))))
    del tree["config"]["task"]["lora"][key]
    spec = run_spec.from_yaml(run_spec.PreparedSpec, yaml.safe_dump(tree), "config.yaml")
    assert spec.config.lora == LACKING[key]
    assert ("LoRA" in recipe(spec)) == (key != "rank")


REFUSED = {
    "hub.private=true": "hub=default does not read hub.private",
    "sample_every=1": "does not read sample_every",
}


def test_run_of_an_older_version_is_resumed(train_here: Train, tiny: list[str], tmp_path: Path) -> None:
    words = (*tiny, "steps=2", "callbacks.checkpoint.verify_export=false", "run_dir=run")
    assert train_here(*words).code == 0
    newer = _configuration(tmp_path / "run")
    make_older(tmp_path / "run")
    assert run_spec.load(tmp_path / "run" / "config.yaml").config.hub.revision == "main"
    older = _configuration(tmp_path / "run")
    assert older == {
        name: newer[name] for name in newer if not name.startswith(("data.languages", "callbacks.profile"))
    }
    for word, message in REFUSED.items():
        answer = train_here("resume=run", "steps=4", word)
        assert answer.code == 2, word
        assert message in answer.stderr
    answer = train_here("resume=run", "steps=4", "profile=3:1")  # its callbacks had no profiler
    assert answer.code == 0, answer.stderr
    assert read_report(tmp_path / "run")["steps"] == 4
    assert (tmp_path / "run" / "profile" / "operations-rank0.txt").is_file()
    answer = train_here("resume=run", "steps=5", "profile=9:1")
    assert "begins after the last step, 5" in answer.stderr
