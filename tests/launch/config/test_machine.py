"""Slots: concurrent jobs have separate cores and GPUs, and a job that requests more is refused."""

import pytest

from gpt2lab.errors import InputError
from launch.config import machine
from launch.config.machine import Slot, partition
from launch.run import auto_settings
from tests.support.configurations import composed, resolved


@pytest.mark.parametrize("cores", [2, 3, 7, 64])
@pytest.mark.parametrize("n_jobs", [2, 3, 5])
def test_cores_are_shared_out_evenly_without_overlap(n_jobs: int, cores: int):
    numbers = list(range(10, 10 + cores))
    if cores < n_jobs:
        with pytest.raises(InputError, match=f"there are {cores} cores"):
            partition(n_jobs, numbers, [])
        return
    parts = [slot.cores or () for slot in partition(n_jobs, numbers, [])]
    assert [core for part in parts for core in part] == numbers
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("visible", "n_jobs", "shown"),
    [
        ("0,1,2,3", 4, ["0", "1", "2", "3"]),
        ("0,1,2,3", 2, ["0,1", "2,3"]),
        ("4,6,7", 2, ["4", "6,7"]),
        ("GPU-aa,GPU-bb", 2, ["GPU-aa", "GPU-bb"]),
        ("MIG-1/2/0,MIG-1/3/0", 2, ["MIG-1/2/0", "MIG-1/3/0"]),
    ],
)
def test_every_gpu_is_shown_to_one_job(visible: str, n_jobs: int, shown: list[str], monkeypatch: pytest.MonkeyPatch):
    """GPUs have the names that this process uses, one or k for each job."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    parts = partition(n_jobs, list(range(8)), machine.usable_gpus())
    assert [part.environment() for part in parts] == [{"CUDA_VISIBLE_DEVICES": names} for names in shown]


def test_single_job_has_the_whole_machine():
    assert partition(1, [0, 1], ["0", "1"]) == [Slot(None, None)]
    assert Slot().environment() == {}


def test_more_jobs_than_gpus_are_refused():
    with pytest.raises(InputError, match="n_jobs=3: there are 2 GPUs") as error:
        partition(3, list(range(8)), ["0", "1"])
    assert "n_jobs=2 or fewer, or accelerator=cpu" in str(error.value)


def test_hidden_gpus_are_not_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.usable_gpus() == []


@pytest.mark.parametrize(("accelerator", "what"), [("gpu", "devices"), ("cpu", "cores to run a process on each")])
def test_more_devices_than_a_jobs_share_are_refused_with_a_fix(
    accelerator: str, what: str, monkeypatch: pytest.MonkeyPatch
):
    """Two jobs on four GPUs have two GPUs each."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(auto_settings, "cpu_cores", lambda: 2)
    keys = [f"accelerator={accelerator}", "n_jobs=2", "precision=fp32"]
    with pytest.raises(InputError) as error:
        resolved(composed(*keys, "devices=4"))
    assert str(error.value).splitlines() == [
        f"devices=4: there are 2 {what} (accelerator={accelerator}).",
        "Lower devices, or n_jobs: jobs that run at once share them out.",
    ]
