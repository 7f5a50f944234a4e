"""Upload to the Hub: checked before training, complete on the server, and never the end of a finished run."""

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from gpt2lab.storage.report_json import read_report
from launch.run import hub_upload
from tests.conftest import Train
from tests.support.hub_uploads import OID, TOKEN, Uploads

RUN = ("steps=2", "validate_every=2", "callbacks.checkpoint.verify_export=false", "run_dir=run")


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[Uploads]:
    """A server in place of the Hub, for this process and its children, and a token for it."""
    with Uploads() as uploads:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        for name, value in {"HF_ENDPOINT": uploads.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}.items():
            monkeypatch.setenv(name, value)
        yield uploads


@pytest.fixture
def push(train_here: Train, tiny: list[str], online: Uploads) -> Train:
    """Run with an upload."""
    return lambda *words: train_here(*tiny, *RUN, "hub.push=user/tiny", *words)


def test_finished_run_is_uploaded_as_it_is_in_hf(push: Train, online: Uploads, tmp_path: Path) -> None:
    ended = push("hub.private=true", "hub.revision=v1", "hub.license=mit", "data.languages=[code,en]")
    assert ended.code == 0, ended.stderr
    (made,) = online.created
    assert (made["organization"], made["name"], made["visibility"]) == ("user", "tiny", "private")
    assert online.branches == ["v1"]
    folder = tmp_path / "run" / "hf"
    written = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    assert online.files["user/tiny", "v1"] == written
    assert online.messages == ["Upload the model of step 2"]
    (card,) = online.cards
    assert ModelCard(card).data.license == "mit"
    assert ModelCard(card).data.language == ["code", "en"]
    assert 'folder = "user/tiny"' in card
    assert 'from_pretrained(folder, revision="v1")' in card
    assert "# tiny" in card
    uploaded = read_report(tmp_path / "run")["hub"]
    assert uploaded == {
        "repository": "user/tiny",
        "revision": "v1",
        "url": f"{online.url}/user/tiny/commit/{OID}",
        "commit": OID,
    }
    assert "Uploaded: " in ended.stderr


FAULTS = {
    "refused": ({"/api/repos/create": 403}, 300.0, "403"),
    "card": ({"/api/validate-yaml": 400}, 300.0, "Invalid metadata"),
    "broken": ({"/commit/main": 500}, 300.0, "500"),
    "silent": ({"/preupload/main": 0}, 8.0, "longer than 8 seconds"),
}


@pytest.mark.parametrize(
    "name", ["refused", *(pytest.param(name, marks=pytest.mark.slow) for name in list(FAULTS)[1:])]
)
def test_failed_upload_leaves_a_finished_run_and_a_command(
    name: str, push: Train, online: Uploads, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    online.refused, seconds, reason = FAULTS[name]
    monkeypatch.setattr(hub_upload, "BASE_SECONDS", seconds)
    ended = push("hub.private=true")
    assert ended.code == 0, ended.stderr
    assert "finished" in ended.stdout
    assert reason in ended.stderr
    assert "hf upload user/tiny run/hf . --private" in ended.stderr
    report = read_report(tmp_path / "run")
    assert report["status"] == "finished"
    assert "hub" not in report


@pytest.mark.slow
def test_finished_run_can_be_uploaded_by_resuming_it(
    train_here: Train, tiny: list[str], online: Uploads, tmp_path: Path
) -> None:
    assert train_here(*tiny, *RUN).code == 0
    assert not online.created
    ended = train_here("resume=run", "hub.push=user/later")
    assert ended.code == 0, ended.stderr
    assert ("user/later", "main") in online.files
    assert 'folder = "user/later"' in (tmp_path / "run" / "hf" / "README.md").read_text()


def test_stopped_run_is_not_uploaded(online: Uploads, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    for status in ("stopped", "failed", "pruned"):
        (tmp_path / "report.json").write_text(json.dumps({"status": status}))
        hub_upload.upload_finished(hub_upload.HubSettings("user/tiny"), tmp_path)
    assert not online.created


ERRORS = [
    (["hub.push=tiny"], "hub.push=tiny is no name of a repository"),
    (["hub.push=user/a/b"], "hub.push=user/a/b is no name of a repository"),
    (["hub.push=user/.tiny"], "is no name of a repository"),
    (["hub.push=user/tiny", "hub.revision=a..b"], "hub.revision=a..b is no name of a branch"),
    (["hub.push=user/tiny", "callbacks.checkpoint=null"], "hub.push uploads hf/"),
    (["hub.private=true"], "does not read hub.private"),
    (["hub.license=MIT License"], "hub.license=MIT License is no license of the Hub"),
    (["data.languages=[english]"], "english is no language code"),
]


@pytest.mark.parametrize(("words", "message"), ERRORS)
def test_upload_that_cannot_succeed_ends_before_training(
    words: list[str], message: str, online: Uploads, train_here: Train, tiny: list[str], tmp_path: Path
) -> None:
    ended = train_here(*tiny, *RUN, *words)
    assert ended.code == 2
    assert message in ended.stderr
    assert len(ended.stderr.strip().splitlines()) <= 5
    assert not (tmp_path / "run").exists()


def test_upload_needs_a_token_and_the_network(
    train_here: Train, tiny: list[str], online: Uploads, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    ended = train_here(*tiny, *RUN, "hub.push=user/tiny")
    assert (ended.code, "hf auth login" in ended.stderr) == (2, True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    ended = train_here(*tiny, *RUN, "hub.push=user/tiny")
    assert (ended.code, "HF_HUB_OFFLINE is set" in ended.stderr) == (2, True)


@pytest.mark.parametrize(
    "words",
    [
        ["hub.push=user/tiny", "seed=1,2"],
        ["hub.push=user/a,user/b", "seed=1,2"],
        ["hub.push=user/tiny", "hparams_search=optuna", "seed=range(1,3)"],
    ],
)
def test_jobs_of_a_sweep_do_not_share_a_repository(
    words: list[str], train_here: Train, tiny: list[str], online: Uploads
) -> None:
    ended = train_here("-m", *tiny, "steps=2", *words)
    assert (ended.code, "one repository" in ended.stderr) == (2, True), ended.stderr
    assert not online.created


@pytest.mark.slow
def test_jobs_of_a_sweep_upload_under_names_that_differ(train_here: Train, tiny: list[str], online: Uploads) -> None:
    ended = train_here("-m", *tiny, "steps=2", "hub.push=user/tiny-${seed}", "seed=1,2")
    assert ended.code == 0, ended.stderr
    assert {name for name, _ in online.files} == {"user/tiny-1", "user/tiny-2"}
