"""Data sets of the Hub, from a local server: scripts, partial conversions, gated sets, retries, the cache."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from datamodules.hub_loading import CONVERTED
from gpt2lab.errors import InputError
from gpt2lab.storage import hub as hub_storage
from gpt2lab.storage.damaged_files import warn_once
from tests.conftest import ROOT
from tests.datamodules.test_corpora import text_data
from tests.datamodules.test_pair_sources import make, pairs_of
from tests.support.hub_server import TOKEN, Hub

STORIES = [f"The lamp by river number {number} counts the stones. " * 9 for number in range(60)]
CARD = b"---\nlicense: mit\n---\n"


def parquet(texts: list[str]) -> bytes:
    label = datasets.ClassLabel(names=["calm", "wild"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    rows = datasets.Dataset.from_dict({"text": texts, "label": [len(text) % 2 for text in texts]}, features)
    stream = io.BytesIO()
    pq.write_table(rows.data.table, stream)
    return stream.getvalue()


def converted(*folders: str) -> dict[str, bytes]:
    return {f"{folder}/0000.parquet": parquet(STORIES) for folder in folders}


def fill(hub: Hub) -> Hub:
    """Add a set of each kind; `script` and the like have a loading script."""
    hub.add("org/plain", {"README.md": CARD, "data/train-00000-of-00001.parquet": parquet(STORIES)})
    conversions = {
        "script": converted("default/train", "default/validation"),
        "parts": {
            "default/train-part0/0000.parquet": parquet(STORIES[:30]),
            "default/train-part1/0000.parquet": parquet(STORIES[30:]),
        },
        "named": converted("en/train", "de/train"),
        "partial": converted("default/partial-train", "default/partial-validation"),
        "bare": None,
    }
    for name, files in conversions.items():
        hub.add(f"org/{name}", {"README.md": CARD, f"{name}.py": b"import datasets\n"})
        if files:
            hub.add(f"org/{name}", files, CONVERTED)
    whole = "data/train-00000-of-00001.parquet"
    hub.add("org/cut", {"README.md": CARD, whole: parquet(STORIES)[:99]})
    hub.add("org/json", {"README.md": CARD, "train.jsonl": b'{"text": "a"}\n{"text": \n'})
    hub.add("org/zero", {"README.md": CARD, "train.jsonl": b""})
    hub.add("org/card", {"README.md": b"---\nconfigs: [\n---\n", whole: parquet(STORIES)})
    both = "\n".join(f"- config_name: {name}\n  data_files: {whole}" for name in ("de", "en"))
    hub.add("org/two", {"README.md": f"---\nconfigs:\n{both}\n---\n".encode(), whole: parquet(STORIES)})
    hub.sets["org/script"]["v1"] = hub.sets["org/script"]["main"]
    hub.gated.add("org/gated")
    hub.add("org/gated", {"README.md": CARD, "train.jsonl": json.dumps({"text": STORIES[0]}).encode()})
    return hub


def forget_sessions() -> None:
    """Discard connections and answers of an earlier server or mode."""
    huggingface_hub.HfFileSystem.clear_instance_cache()
    huggingface_hub.close_session()
    hub_storage.hub_is_reachable.cache_clear()
    warn_once.cache_clear()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The server in place of the Hub, an empty Hugging Face cache, and retries without waiting."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub_storage, "RETRY_AFTER", (0, 0, 0))
    with fill(Hub()) as hub:
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf" / "datasets")
        set_offline(monkeypatch, False)
        yield hub
    forget_sessions()


def set_offline(monkeypatch: pytest.MonkeyPatch, value: bool) -> None:
    """Do what HF_HUB_OFFLINE does when the libraries are imported."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", value)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", value)
    forget_sessions()


Read = Callable[..., list[str]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Prepare a corpus in an empty cache, and return its training texts; keys are those of the data node."""

    def texts(name: str, cache: str = "cache", **keys: object) -> list[str]:
        corpus = text_data(tmp_path, tmp_path / cache, source="hub", dataset=f"org/{name}", **keys).corpus()
        return [document.text for document in corpus.documents()]

    return texts


READABLE = [
    ("plain", {}, STORIES),
    ("script", {}, STORIES),
    ("script", {"streaming": True}, STORIES),
    ("script", {"split": "validation[:10]"}, STORIES[:10]),
    ("script", {"revision": CONVERTED, "config": "default"}, STORIES),
    ("parts", {}, STORIES),
    ("named", {"config": "de"}, STORIES),
]


@pytest.mark.parametrize(("name", "keys", "expected"), READABLE)
def test_repository_with_a_script_is_read_as_parquet(hub: Hub, read: Read, caplog, name, keys, expected) -> None:
    assert read(name, **keys) == expected
    notices = [text for text in caplog.messages if "loading script" in text]
    assert len(notices) == (name != "plain" and "revision" not in keys)
    assert all("\n" not in notice and f"org/{name}" in notice for notice in notices)


REFUSED = [
    ("partial", {}, "is partial: its split train ends after 5 GB"),
    ("partial", {"streaming": True}, "is partial: its split train ends after 5 GB"),
    ("partial", {"revision": CONVERTED}, "is partial: its split train ends after 5 GB"),
    ("bare", {}, "the Hub has no parquet conversion"),
    ("named", {}, "Allowed: de, en."),
    ("named", {"config": "fr"}, "data.config=fr does not exist"),
    ("script", {"revision": "v1"}, "is that of its main branch, not of data.revision=v1"),
    ("script", {"split": "test"}, "has no split 'test'; it has: train, validation"),
    ("gated", {}, r"Accept the conditions on http://127.0.0.1:\d+/datasets/org/gated, and set HF_TOKEN"),
    ("plain", {"split": "nope"}, r"'train'.*\nGive data.split=NAME"),
    ("plain", {"split": "train[:1]", "streaming": True}, "data.streaming=false"),
    ("plain", {"config": "nope"}, r"'default'.*\nGive data.config=NAME"),
    ("plain", {"revision": "v9"}, r"Revision 'v9' doesn't exist.*\nGive data.revision=NAME"),
    ("two", {}, r"available configs: \['de', 'en'\]\nGive data.config=NAME"),
    ("cut", {}, r"not a parquet file.*\nIts files are damaged"),
    ("json", {}, r"JSON parse error.*\nIts files are damaged"),
    ("zero", {}, r"a file contains no data\nIts files are damaged"),
    ("card", {}, "parsing a flow node"),
    ("missing", {}, "doesn't exist on the Hub or cannot be accessed"),
]


@pytest.mark.parametrize(("name", "keys", "message"), REFUSED)
def test_data_set_that_cannot_be_read_ends_with_the_reason(hub: Hub, read: Read, name, keys, message) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(name, **keys)
    assert f"org/{name}" in str(caught.value)
    assert 2 <= len(str(caught.value).splitlines()) <= 4


@pytest.mark.parametrize("address", ["https://huggingface.co/datasets/org/plain", "datasets/org/plain"])
def test_address_of_a_data_set_names_its_id(address: str, tmp_path: Path) -> None:
    corpus = text_data(tmp_path, tmp_path / "cache", source="hub", dataset=address).corpus()
    with pytest.raises(InputError, match=r"Give its Hub id: data.dataset=org/plain$"):
        list(corpus.documents())


def test_gated_set_is_read_with_the_token(hub: Hub, read: Read, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(InputError, match="The account of HF_TOKEN has no access: accept the conditions on"):
        read("gated")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert read("gated") == STORIES[:1]


@pytest.mark.parametrize("name", ["plain", "script"])
def test_cached_set_is_read_offline(hub: Hub, read: Read, monkeypatch, tmp_path: Path, name: str) -> None:
    pairs = {"dataset": f"org/{name}", "source": "text", "target": "label"}
    whole = pairs_of(make("", tmp_path / "cache", pairs))
    assert len(whole) == len(STORIES)
    set_offline(monkeypatch, True)
    hub.requests.clear()
    assert read(name, "empty") == STORIES
    assert pairs_of(make("", tmp_path / "empty", pairs)) == whole
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set: load the data set once without it"):
        read("named", "empty", config="de")
    assert not hub.requests


def test_set_of_hf_download_is_read_offline(hub: Hub, read: Read, monkeypatch) -> None:
    huggingface_hub.HfApi().snapshot_download("org/plain", repo_type="dataset")
    huggingface_hub.HfApi().snapshot_download("org/script", repo_type="dataset", revision=CONVERTED)
    set_offline(monkeypatch, True)
    assert read("plain") == read("plain", streaming=True) == STORIES
    assert read("script") == read("script", streaming=True) == STORIES


FAULTS = [
    ("GET .parquet", "plain", [503, 500, "cut"], {}),
    ("GET .parquet", "plain", [429, "reset"], {}),
    ("HEAD README.md", "plain", [503, 500], {}),
    ("HEAD README.md", "plain", ["reset"], {}),
    ("HEAD .parquet", "plain", [502], {}),
    ("GET .parquet", "script", [503, "cut"], {}),
    ("HEAD .py", "script", [503], {}),
    ("GET .parquet", "script", ["cut", "reset"], {"streaming": True}),
]


@pytest.mark.parametrize(("requests", "name", "faults", "keys"), FAULTS)
def test_broken_connection_is_retried(hub: Hub, read: Read, monkeypatch, requests, name, faults, keys) -> None:
    monkeypatch.setattr("time.sleep", lambda _seconds: None)  # the libraries wait too
    method, ending = requests.split()
    hub.faults, hub.faulty = list(faults), (method, ending)
    assert read(name, **keys) == STORIES
    assert hub.faults == []


def test_connection_that_stays_broken_ends_after_retries(hub: Hub, read: Read, caplog) -> None:
    hub.faults, hub.faulty = [503] * 99, ("GET", ".parquet")
    with pytest.raises(InputError, match=r"503.*\nCheck the name and the network"):
        read("plain")
    assert len(hub.faults) == 99 - 4
    assert len([text for text in caplog.messages if "next attempt in" in text]) == 3


def test_waiting_time_before_a_retry_doubles(monkeypatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    with pytest.raises(ConnectionResetError):
        hub_storage.retried("The data set", lambda: (_ for _ in ()).throw(ConnectionResetError("reset")))
    assert waited == [1, 2, 4, 8, 16]
    with pytest.raises(FileNotFoundError):
        hub_storage.retried("The data set", lambda: Path("/nowhere/at/all").read_text())
    assert len(waited) == 5


@pytest.mark.slow
def test_train_and_check_presets_read_the_hub_of_hf_endpoint(tmp_path: Path) -> None:
    hub = Hub()
    hub.add("Skylion007/openwebtext", {"openwebtext.py": b"import datasets\n"})
    hub.add("Skylion007/openwebtext", converted("plain_text/train"), CONVERTED)
    hub.add("EdinburghNLP/xsum", converted("default/partial-train"), CONVERTED)
    hub.add("HuggingFaceFW/fineweb-edu", {"README.md": CARD, "sample/10BT/train.parquet": parquet(STORIES)})
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "GPT2LAB_CACHE": str(tmp_path / "cache")}
    environment |= {"WANDB_MODE": "offline", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0"}

    def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *words]
        given = {**environment, "HF_ENDPOINT": hub.url, **variables}
        return subprocess.run(command, cwd=tmp_path, env=given, capture_output=True, text=True, check=False)

    tiny = ("model.n_layer=1", "model.n_head=2", "model.n_embd=32", "model.n_positions=64", "context=32", "steps=2")
    tiny += ("data=openwebtext", "tokenizer=bpe", "vocab_size=300", "batch_tokens=256", "precision=fp32")
    tiny += ("logger=none", "callbacks=minimal", "compile=false")
    with hub:
        done = run(str(ROOT / "train.py"), *tiny, "run_dir=online")
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("has a loading script; the Hub's parquet conversion of it is read.") == 1
        table = run("-m", "launch.commands.check_presets")
    assert table.returncode == 1
    lines = {line.split()[0]: line for line in table.stdout.splitlines()[1:] if line[:1].strip()}
    assert set(lines) == {path.stem for path in (ROOT / "conf" / "data").glob("*.yaml")}
    assert " read " in lines["openwebtext"]
    assert " read " in lines["stdlib"]
    assert " UNREADABLE " in lines["wmt14_de_en"]
    assert "is partial" in " ".join(table.stdout.split())
    again = run(str(ROOT / "train.py"), *tiny, "run_dir=offline", f"cache_dir={tmp_path / 'new'}", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
