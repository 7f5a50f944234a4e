"""A full disk: the message names the file and the intact checkpoint, and the run continues once there is space."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest

from gpt2lab.storage.report_json import read_report
from tests.conftest import Train

pytestmark = pytest.mark.chaos
SIZE = 40_000_000  # bytes; a tiny run is refused below 21 MB


class Fill(lightning.Callback):
    """Fills the run's disk after `step` steps, or at the end of training."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_unused: Any) -> None:
        if trainer.global_step == self.step and not (disk_of(trainer) / "filler").exists():
            fill(disk_of(trainer))

    def on_train_end(self, trainer: Any, *_unused: Any) -> None:
        if trainer.global_step == self.step:
            fill(disk_of(trainer))


def disk_of(trainer: Any) -> Path:
    return Path(trainer.default_root_dir).parent


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 40 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]).returncode:
        pytest.skip("mounting a small disk takes root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


KEY = "+callbacks.fill"
# file that cannot be written: (keys, step at which the disk is full, intact checkpoint)
FILES: dict[str, tuple[list[str], int, str]] = {
    "checkpoints/step-000008.ckpt": (["checkpoint_every=4", "log_every=10"], 5, "step-000004.ckpt"),
    "samples.jsonl": (["checkpoint_every=4", "log_every=10", "sample_every=1"], 5, "step-000004.ckpt"),
    "metrics.csv": (["checkpoint_every=130", "validate_every=1000", "log_every=1"], 2, ""),
}


@pytest.mark.parametrize("file", FILES)
def test_run_stopped_by_a_full_disk_resumes_with_free_space(
    tmp_path: Path, tiny: list[str], train_here: Train, disk: Path, file: str
):
    keys, step, intact = FILES[file]
    steps = 130 if file == "metrics.csv" else 12
    own = [key for key in tiny if not key.startswith("callbacks")] if file == "samples.jsonl" else tiny
    sampling = ["callbacks.samples.max_new_tokens=24"] if file == "samples.jsonl" else []
    own = [*own, *keys, *sampling, f"steps={steps}", "callbacks.checkpoint.verify_export=false"]
    assert train_here(*own, "run_dir=unbroken").code == 0
    answer = train_here(*own, f"run_dir={disk}/run", f"{KEY}._target_={__name__}.Fill", f"{KEY}.step={step}")
    assert answer.code == 2, answer.stderr
    lines = answer.stderr.strip().splitlines()[-5:]
    assert "Traceback" not in answer.stderr
    assert "No space left to write" in answer.stderr
    assert f"{disk}/run/{file}" in answer.stderr
    (disk / "filler").unlink()
    if not intact:
        assert lines[-1] == "The run has no checkpoint yet. Free some space and start it again."
        return
    assert f"{disk}/run/checkpoints/{intact} is intact." in lines
    assert lines[-1] == f"Free some space and continue: python train.py resume={disk}/run"
    (disk / "filler").write_bytes(b"")  # so that the callback of the stored configuration does not fill it again
    answer = train_here(f"resume={disk}/run", f"allow_targets=[{__name__}]")
    assert answer.code == 0, answer.stderr
    weights = [folder / "hf" / "model.safetensors" for folder in (disk / "run", tmp_path / "unbroken")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_full_disk_after_the_last_step_leaves_a_complete_run(tiny: list[str], train_here: Train, disk: Path):
    for logger in ("none", "tensorboard"):
        own = [
            *(key for key in tiny if key != "logger=none"),
            f"logger={logger}",
            "steps=4",
            f"run_dir={disk}/{logger}",
        ]
        answer = train_here(*own, f"{KEY}._target_={__name__}.Fill", f"{KEY}.step=4")
        assert answer.code == 0, answer.stderr
        assert "The report of this run could not be written" in answer.stderr
        assert "Traceback" not in answer.stderr
        (disk / "filler").unlink()
    (disk / "filler").write_bytes(b"")
    answer = train_here(f"resume={disk}/none", f"allow_targets=[{__name__}]")
    assert answer.code == 0, answer.stderr
    assert read_report(disk / "none")["status"] == "finished"


@pytest.mark.parametrize("place", ["cache_dir", "hydra.sweep.dir"])
def test_a_full_disk_for_data_or_a_sweep_is_named(tiny: list[str], train_here: Train, disk: Path, place: str):
    fill(disk)
    keys = ["-m", "seed=1,2"] if "sweep" in place else ["run_dir=run"]
    answer = train_here(*tiny, "steps=2", f"{place}={disk}/here", *keys)
    assert answer.code in (1, 2), answer.stderr
    assert f"{disk}/here" in answer.stderr
    assert "No space left" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert len(answer.stderr.strip().splitlines()) <= 5, answer.stderr
