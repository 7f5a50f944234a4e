"""Files from untrusted sources run no code: stored configurations, checkpoints, model folders and tokenizers."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

import evaluate
import generate
import train
from gpt2lab.storage.checkpoint_ledger import commit_checkpoint, newest_good_checkpoint, scratch_file
from gpt2lab.storage.sharded_checkpoint import OPTIMIZER, optimizer_by_name, write_shards
from launch import exit_codes
from launch.commands import consolidate
from tests.conftest import SHRUNK, Answer, Train

COMMANDS = {"train": train.command_line, "evaluate": evaluate.main, "generate": generate.main}
COMMANDS["consolidate"] = lambda: consolidate._program(sys.argv[1:])
FOREIGN = """
import pathlib, lightning
MARK = pathlib.Path({mark!r})
MARK.touch()
class Watch(lightning.Callback):
    def __init__(self, says="built", inner=()):
        MARK.write_text("".join([MARK.read_text() for one in inner] + [says]))
"""


class RunsCode:
    """An object with a pickle that calls a function when it is loaded."""

    def __init__(self, function: Callable[..., Any], *arguments: str) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return self.call


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path, sources: Path) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    keys = [*SHRUNK, f"path={sources}", "steps=2", "checkpoint_every=1", f"run_dir={folder / 'run'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2LAB_CACHE", str(cache))
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train.py", *keys])
        assert exit_codes.exit_code(train.command_line) == 0
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run in the working directory, which tests tamper with."""
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """The file that foreign code writes."""
    return tmp_path / "code-was-run"


@pytest.fixture(autouse=True)
def foreign(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package that can be imported and is not this project's."""
    (tmp_path / "packages" / "foreign").mkdir(parents=True)
    (tmp_path / "packages" / "foreign" / "__init__.py").write_text(FOREIGN.format(mark=str(mark)))
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    yield
    sys.modules.pop("foreign", None)


@pytest.fixture
def command(train_here: Train, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Train:
    """Runs any of the commands in this process, in an empty folder."""

    def run(name: str, *words: str) -> Answer:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))  # the input to a prompt of a library
        capfd.readouterr()
        code = exit_codes.exit_code(COMMANDS[name])
        return Answer(code, *capfd.readouterr())

    return run


def tamper(run: Path, place: str, node: dict[str, Any], **others: Any) -> None:
    """Put a node into a stored configuration."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    parent = config["config"]
    *parents, last = place.split(".")
    for key in parents:
        parent = parent[key]
    parent[last] = node
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "config": {**config["config"], **others}}))


def refused(ended: Answer, mark: Path, *words: str) -> None:
    assert ended.code == 2, ended.stderr
    lines = ended.stderr.strip().splitlines()
    assert 1 <= len(lines) <= 5, ended.stderr
    assert all(word in ended.stderr for word in words), ended.stderr
    assert "Traceback" not in ended.stderr
    assert not mark.exists(), "foreign code was run"


def shell(mark: Path) -> dict[str, Any]:
    return {"args": ["touch", str(mark)]}


def some_slow(kinds: Iterable[str], *quick: str) -> list[Any]:
    """Return all kinds as parameters; `make test` runs the quick ones."""
    return [kind if kind in quick else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


# target → its keys; `mark` is the file that the code would write
TARGETS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "subprocess.Popen": shell,
    "os.system": lambda mark: {"command": f"touch {mark}"},
    "builtins.exec": lambda mark: {"source": f"open({str(mark)!r}, 'w')"},
    "foreign.Watch": lambda mark: {},
    "foreign.nothing": lambda mark: {},
    "callbacks.loggers.metrics_csv.os.system": lambda mark: {"command": f"touch {mark}"},
    "gpt2lab.reports.run_report.subprocess.Popen": shell,
    "gpt2lab.reports.run_report.subprocess": shell,
    "callbacks.report.Path": lambda mark: {},
    "callbacks.throughput.outside_training_time": lambda mark: {},
    "lightning_modules.language_model.torch": lambda mark: {},
    "lightning.pytorch.callbacks.timer.timedelta": lambda mark: {},
    "lightning.pytorch.cli.LightningCLI": lambda mark: {},
    "lightning.Trainer": lambda mark: {},
    "callbacks": lambda mark: {},
    "": lambda mark: {},
    "../foreign.Watch": lambda mark: {},
    "callbacks.loggers.protocols.TakesSamples": lambda mark: {},
    "callbacks.interrupt.StoppedNowError": lambda mark: {},
    "lightning.pytorch.loggers.CSVLogger": lambda mark: {"save_dir": str(mark)},
}
QUICK = (
    "subprocess.Popen",
    "callbacks.loggers.metrics_csv.os.system",
    "callbacks.report.Path",
    "lightning.Trainer",
    "",
)
QUICK += ("lightning.pytorch.callbacks.timer.timedelta", "callbacks.loggers.protocols.TakesSamples")


@pytest.mark.parametrize(
    ("place", "target"),
    [
        *(pytest.param("callbacks.x", target, marks=[pytest.mark.slow] * (target not in QUICK)) for target in TARGETS),
        *((place, "foreign.Watch") for place in ("logger", "task", "data")),
        pytest.param("data", "callbacks.final_validation.FinalValidation", marks=pytest.mark.slow),
        pytest.param("logger", "lightning.pytorch.callbacks.Timer", marks=pytest.mark.slow),
    ],
)
def test_resume_builds_no_foreign_class(place: str, target: str, command: Train, run: Path, mark: Path):
    tamper(run, place, {"_target_": target, **TARGETS.get(target, lambda _: {})(mark)})
    refused(command("train", f"resume={run}", "steps=3"), mark, f"{place}._target_={target}")


# name → (key, the node of a stored configuration at this key, words of the message)
ARGUMENTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "another run": (
        "callbacks.checkpoint",
        {"_target_": "callbacks.checkpoint.Checkpoint", "run_dir": "RUN"},
        "There is no key callbacks.checkpoint.run_dir",
    ),
    "another run's logger": (
        "logger",
        {"_target_": "callbacks.loggers.tensorboard.TensorBoard", "run_dir": "RUN"},
        "is outside the run directory",
    ),
    "another run's metrics.csv": (
        "logger.x",
        {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "RUN", "name": "", "version": ""},
        "allow_targets=[lightning.pytorch.loggers.CSVLogger]",
    ),
    "a way out of the run directory": (
        "logger.x",
        {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "run", "name": "../../other", "version": ""},
        "logger.x.name=../../other is outside",
    ),
    "a file name with an expression": (
        "callbacks.x",
        {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "filename": "{step].__class__.__name__[0:.<2.0}/x"},
        "contains an expression",
    ),
    "a file name with a variable": (
        "logger.x",
        {"_target_": "lightning.pytorch.loggers.TensorBoardLogger", "save_dir": "run", "sub_dir": "$HOME/x"},
        "contains an expression",
    ),
    "positional arguments": (
        "callbacks.x",
        {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "_args_": ["RUN"]},
        "callbacks.x._args_ is not supported",
    ),
    "git's program": (
        "logger",
        {"_target_": "lightning.pytorch.loggers.WandbLogger", "offline": True, "settings": {"git_root": "RUN"}},
        "allow_targets=[lightning.pytorch.loggers.WandbLogger]",
    ),
    "wrong value": (
        "callbacks.x",
        {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val/loss", "mode": "?"},
        "`mode`",
    ),
    "ModelCheckpoint in another run": (
        "callbacks.x",
        {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "dirpath": "RUN"},
        "callbacks.x.dirpath=",
    ),
    "name that fills the terminal": ("callbacks.a\n\n\n\n\n" + "b" * 999, {"_target_": "os.system"}, "[os]"),
}


@pytest.mark.parametrize("name", some_slow(ARGUMENTS, "another run", "git's program", "another run's metrics.csv"))
def test_a_stored_argument_neither_runs_code_nor_deletes(name: str, command: Train, run: Path, mark: Path):
    other = shutil.copytree(run, run.with_name("other"), symlinks=True)
    before = {file: file.stat().st_mtime_ns for file in other.rglob("*")}
    subprocess.run(["git", "init", "-q", run], check=True)
    subprocess.run(["git", "-C", run, "config", "core.fsmonitor", f"touch {mark}; false"], check=True)
    place, node, words = ARGUMENTS[name]
    text = json.dumps(node).replace('"git_root": "RUN"', f'"git_root": "{run}"').replace('"RUN"', f'"{other}"')
    node = json.loads(text)
    tamper(run, place, node)
    refused(command("train", f"resume={run}", "steps=3"), mark, words)
    assert {file: file.stat().st_mtime_ns for file in other.rglob("*")} == before


NESTED: dict[str, Callable[[Path], Any]] = {
    "an object": lambda mark: {"_target_": "foreign.Watch"},
    "in a list in a dictionary": lambda mark: {"a": [{"_target_": "subprocess.Popen", **shell(mark)}]},
    "a partial": lambda mark: {"_target_": "os.system", "_partial_": True, "command": f"touch {mark}"},
    "Hydra itself": lambda mark: {"_target_": "hydra.utils.instantiate", "config": {"_target_": "foreign.Watch"}},
    "Hydra's methods": lambda mark: {"_target_": "hydra.utils.get_method", "path": "os.system"},
    "a callback of Lightning": lambda mark: {"_target_": "lightning.pytorch.callbacks.Timer"},
}


@pytest.mark.parametrize("name", some_slow(NESTED, "an object", "in a list in a dictionary"))
def test_a_target_inside_an_argument_needs_a_permission(name: str, command: Train, run: Path, mark: Path):
    tamper(run, "callbacks.x", {"_target_": "lightning.pytorch.callbacks.LambdaCallback", "setup": NESTED[name](mark)})
    refused(command("train", f"resume={run}", "steps=3"), mark, "callbacks.x.setup", "allow_targets=[")


def test_an_object_inside_an_argument_is_built_with_a_permission(command: Train, run: Path, mark: Path):
    watch = {"_target_": "foreign.Watch", "says": "${oc.env:HOME}"}
    tamper(run, "callbacks.x", {"_target_": "foreign.Watch", "says": "outer", "inner": [watch]})
    refused(command("train", f"resume={run}", "steps=3"), mark, "allow_targets=[foreign]")
    ended = command("train", f"resume={run}", "steps=3", "allow_targets=[foreign]")
    assert ended.code == 0, ended.stderr
    assert mark.read_text() == "${oc.env:HOME}outer"


@pytest.mark.parametrize("target", ["subprocess.Popen", "foreign.Watch", "gpt2lab.reports.run_report.subprocess.Popen"])
def test_evaluate_builds_no_foreign_class(target: str, command: Train, run: Path, mark: Path):
    tamper(run, "data", {"_target_": target, **TARGETS[target](mark)})
    refused(command("evaluate", f"checkpoint={run}"), mark, f"data._target_={target}")


def test_only_the_command_line_permits_a_class(command: Train, run: Path, mark: Path):
    tamper(run, "callbacks.x", {"_target_": "foreign.Watch"}, allow_targets=["foreign"])
    refused(command("train", f"resume={run}", "steps=3"), mark, "allow_targets=[foreign]")
    refused(command("train", f"resume={run}", "allow_targets=[foreig,foreign.Other]"), mark, "allow_targets=[foreign]")
    for given in ("", "[a b]", "[/x]", "[foreign.]", "[[foreign]]", "[foreign,]"):
        refused(command("train", f"resume={run}", f"allow_targets={given}"), mark, "allow_targets=")
    ended = command("train", f"resume={run}", "steps=3", "allow_targets=[foreign]")
    assert ended.code == 0, ended.stderr
    assert mark.read_text() == "built"
    assert "allow_targets" not in yaml.safe_load((run / "config.yaml").read_text())["config"]
    mark.unlink()
    tamper(run, "data", {"_target_": "foreign.Watch"})
    refused(command("evaluate", f"checkpoint={run}"), mark, "allow_targets=[foreign]")
    ended = command("evaluate", f"checkpoint={run}", "allow_targets=[foreign]")
    assert mark.exists()


def test_only_the_command_line_permits_a_plugin(command: Train, run: Path, mark: Path):
    tamper(run, "plugins", ["foreign"])
    refused(command("train", f"resume={run}", "steps=3"), mark, "allow_targets=[foreign]")
    refused(command("train", f"resume={run}", "steps=3", "allow_targets=[foreig]"), mark, "allow_targets=[foreign]")
    refused(command("evaluate", f"checkpoint={run}"), mark, "allow_targets=[foreign]")
    for permission in ("plugins=[foreign]", "allow_targets=[foreign]"):
        ended = command("train", f"resume={run}", "steps=3", permission)
        assert ended.code == 0, ended.stderr
        assert mark.exists(), "the plugin was not imported"
        stored = yaml.safe_load((run / "config.yaml").read_text())["config"]
        assert stored["plugins"] == ["foreign"]
        mark.unlink()
        sys.modules.pop("foreign")


@pytest.mark.slow
@pytest.mark.parametrize("keys", [["devices=2"], ["launcher=slurm", "launcher.executor=local", "accelerator=cpu"]])
def test_a_permission_reaches_every_process(keys: list[str], command: Train, run: Path, mark: Path):
    tamper(run, "callbacks.x", {"_target_": "foreign.Watch"})
    ended = command("train", f"resume={run}", "steps=3", *keys)
    assert ended.code == 2
    assert "allow_targets=[foreign]" in ended.stderr
    assert not mark.exists()
    ended = command("train", f"resume={run}", "steps=3", "allow_targets=[foreign]", *keys)
    assert ended.code == 0, ended.stderr
    assert mark.read_text() == "built"


def as_shards(run: Path, folder: Path) -> None:
    """The sharded checkpoint of the run."""
    newest = newest_good_checkpoint(run)
    assert newest is not None
    checkpoint = torch.load(newest, weights_only=True)
    count = sum(len(group["params"]) for group in checkpoint[OPTIMIZER][0]["param_groups"])
    checkpoint[OPTIMIZER] = [optimizer_by_name(checkpoint[OPTIMIZER][0], [f"p{number}" for number in range(count)])]
    write_shards(checkpoint, folder, rank=0)


def save(content: Any, file: Path) -> None:
    torch.save(content, file)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def bytes_for_a_tensor(folder: Path, evil: RunsCode) -> None:
    """Turn a tensor of the metadata into bytes, at the offset where a shard has a pickle."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    name = next(iter(metadata.state_dict_metadata))
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    stream = io.BytesIO()
    torch.save(evil, stream)
    for index, place in metadata.storage_data.items():
        if index.fqn == name:
            place.offset, place.length = 0, len(stream.getvalue())
            (folder / place.relative_path).write_bytes(stream.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


# name → change of a single-file checkpoint by an object that runs code
ONE_FILE: dict[str, Callable[[Path, RunsCode], None]] = {
    "torch.save": lambda file, evil: save({"state_dict": evil}, file),
    "torch.save before 1.6": lambda file, evil: torch.save(evil, file, _use_new_zipfile_serialization=False),
    "pickle": lambda file, evil: file.write_bytes(pickle.dumps(evil)) and None,
    "module": lambda file, evil: save(torch.nn.Linear(2, 2), file),
    "other tensors": lambda file, evil: save({"weight": torch.ones(2)}, file),
    "list": lambda file, evil: save([1, 2], file),
    "empty": lambda file, evil: file.write_bytes(b"") and None,
    "cut": lambda file, evil: cut(file),
}
# … and of a sharded one
IN_PARTS: dict[str, Callable[[Path, RunsCode], None]] = {
    "metadata": lambda folder, evil: (folder / ".metadata").write_bytes(pickle.dumps(evil)) and None,
    "metadata cut": lambda folder, evil: cut(folder / ".metadata"),
    "rest": lambda folder, evil: save({OPTIMIZER: evil}, folder / "rest.pt"),
    "rest cut": lambda folder, evil: cut(folder / "rest.pt"),
    "shard": lambda folder, evil: save(evil, folder / "__0_0.distcp"),
    "shard cut": lambda folder, evil: cut(folder / "__0_0.distcp"),
    "bytes": bytes_for_a_tensor,
}


def planted(run: Path, kind: str, mark: Path) -> Path:
    """Make a checkpoint of this kind the run's newest, with its hash in the ledger."""
    scratch, evil = scratch_file(run, 2), RunsCode(os.system, f"touch {mark}")
    if kind in IN_PARTS:
        as_shards(run, scratch)
        IN_PARTS[kind](scratch, evil)
    else:
        newest = newest_good_checkpoint(run)
        assert newest is not None
        shutil.copy(newest, scratch)
        ONE_FILE[kind](scratch, evil)
    return commit_checkpoint(run, 2, keep_last=1)


@pytest.mark.parametrize("kind", some_slow([*ONE_FILE, *IN_PARTS], "torch.save", "metadata", "bytes"))
def test_a_checkpoint_runs_no_code(kind: str, command: Train, run: Path, mark: Path):
    file = planted(run, kind, mark)
    keys = {"resume": ("train", f"resume={run}", "steps=3")}
    if kind in IN_PARTS:
        keys["consolidate"] = ("consolidate", str(run))
    for words in keys.values():
        ended = command(*words)
        refused(ended, mark, str(file.name))
        assert "weights_only" not in ended.stderr
    assert not (run / "consolidated" / "hf").exists()


def weights_as_pickle(hf: Path, change: Callable[[Path], None]) -> None:
    state = load_file(hf / "model.safetensors")
    (hf / "model.safetensors").unlink()
    torch.save(state, hf / "pytorch_model.bin")
    change(hf / "pytorch_model.bin")


def adapter(hf: Path, mark: Path) -> None:
    imports = {"peft_type": "LORA", "base_model_name_or_path": str(hf), "megatron_config": {"a": 1}}
    (hf / "adapter_config.json").write_text(json.dumps({**imports, "megatron_core": "foreign"}))
    torch.save(RunsCode(os.system, f"touch {mark}"), hf / "adapter_model.bin")


def in_config(hf: Path, **keys: Any) -> None:
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, **keys}))


FOLDERS: dict[str, Callable[[Path, Path], None]] = {
    **{
        f"pytorch_model.bin, {kind}": lambda hf, mark, change=change: weights_as_pickle(
            hf, lambda file: change(file, RunsCode(os.system, f"touch {mark}"))
        )
        for kind, change in ONE_FILE.items()
        if kind not in ("other tensors", "list", "module")
    },
    "adapter_config.json": adapter,
    "more layers than weights": lambda hf, mark: in_config(hf, n_layer=10**9),
    "endless size": lambda hf, mark: in_config(hf, n_embd=float("inf")),
    "deep config.json": lambda hf, mark: (hf / "config.json").write_text("[" * 10**5) and None,
    "a list as header": lambda hf, mark: (hf / "model.safetensors").write_bytes(b"\4\0\0\0\0\0\0\0[1] ") and None,
}


@pytest.mark.parametrize(
    "kind", some_slow(FOLDERS, "pytorch_model.bin, torch.save", "adapter_config.json", "more layers than weights")
)
def test_a_model_folder_runs_no_code(kind: str, command: Train, run: Path, mark: Path, tiny: list[str]):
    FOLDERS[kind](run / "hf", mark)
    without_sizes = [key for key in tiny if not key.startswith(("model.", "vocab_size"))]
    started = [*without_sizes, "model=auto", f"init={run}", "steps=1", "run_dir=new"]
    for words in (
        ("evaluate", f"checkpoint={run}"),
        ("generate", f"checkpoint={run}", "prompt=a", "max_new_tokens=1"),
        ("train", *started),
        ("train", *tiny, "task=distill", f"teacher={run}", "steps=1", "run_dir=new"),
    ):
        ended = command(*words)
        refused(ended, mark, str(run / "hf"))
        assert "weights_only" not in ended.stderr
        assert not Path("new").exists()


def test_tokenizer_folder_runs_no_code(command: Train, run: Path, mark: Path, tiny: list[str]):
    """No input on stdin permits it: transformers would prompt there."""
    folder = run / "hf"
    (folder / "config.json").unlink()
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **own}))
    keys = [key for key in tiny if not key.startswith("vocab_size")]
    refused(command("train", *keys, "tokenizer=hub", f"tokenizer.source={folder}", "steps=1"), mark, str(folder))
