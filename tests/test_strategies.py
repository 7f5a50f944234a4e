"""strategy=auto takes what fits, in one line on stderr; what only sharding can do is refused elsewhere."""

import pytest
from conftest import Train
from test_configuration import composed

from gpt2lab.errors import InputError
from launch import noise
from launch.configuration import automatic, device_memory, sharding_checks
from launch.configuration.config import Config

XL_STATE = 16 * 1_557_686_400  # bytes: weights, gradients and two moments in fp32


def settled(*overrides: str) -> Config:
    settings = composed(*overrides, "accelerator=cpu", "precision=fp32")
    automatic.settle(settings)
    return settings


def test_a_model_too_large_for_one_of_several_devices_is_sharded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(automatic, "cpu_cores", lambda: 8)
    noise.settle_noise()
    assert settled("model=nano", "devices=1").strategy == "auto"
    assert settled("model=nano", "devices=2").strategy == "ddp"
    for gigabytes, strategy in ((40, "ddp"), (32, "fsdp")):
        monkeypatch.setattr(device_memory, "device_bytes", lambda config, size=gigabytes: size * 1e9)
        capsys.readouterr()
        found = settled("model=xl", "devices=4", "context=1024")
        assert found.strategy == strategy
        assert found.checkpoint_format == ("sharded" if strategy == "fsdp" else "single")
        said = capsys.readouterr().err.splitlines()
        assert len(said) == (strategy == "fsdp")
    assert "24.9 GB, too much for one device's 32.0 GB" in said[0]
    assert settled("model=nano", "devices=2", "strategy=fsdp").checkpoint_format == "single"


def test_the_estimate_counts_what_is_kept_from_step_to_step() -> None:
    xl = composed("model=xl", "context=1024")
    assert device_memory.state_bytes(xl) == pytest.approx(XL_STATE, rel=1e-4)
    averaged = composed("model=xl", "context=1024", "ema=0.9")
    assert device_memory.state_bytes(averaged) == pytest.approx(XL_STATE * 20 / 16, rel=1e-4)
    rounded = composed("model=xl", "context=1024", "ema=0.9", "precision=bf16_true")
    assert device_memory.state_bytes(rounded) == pytest.approx(XL_STATE * 12 / 16, rel=1e-4)
    assert device_memory.teacher_bytes(xl) == 0


@pytest.mark.parametrize("key", ["fsdp_offload=true", "checkpoint_format=sharded", "shard_teacher=true"])
def test_what_only_sharding_can_do_needs_it(key: str) -> None:
    settings = composed("task=distill", "teacher=x", key, "strategy=ddp")
    with pytest.raises(InputError, match=f"{key}: with strategy=ddp every device holds the whole model"):
        sharding_checks.check(settings)


def test_offloading_to_the_host_needs_a_gpu_and_sharding_has_no_gradient_scaler(
    train_here: Train, tiny: list[str]
) -> None:
    answer = train_here(*tiny, "strategy=fsdp", "fsdp_offload=true", "accelerator=cpu")
    assert answer.code == 2
    assert "host's memory already" in answer.stderr
    with pytest.raises(InputError, match="precision=fp16 needs a gradient scaler"):
        sharding_checks.check(composed("strategy=fsdp", "precision=fp16", "accelerator=gpu"))
    with pytest.raises(InputError, match="precision=fp8 is an experiment"):
        sharding_checks.check(composed("strategy=fsdp", "precision=fp8", "accelerator=gpu"))


def test_a_key_that_the_strategy_or_the_task_does_not_read_is_refused(train_here: Train, tiny: list[str]) -> None:
    for keys in (("strategy=ddp", "fsdp_offload=true"), ("shard_teacher=true",)):
        answer = train_here(*tiny, *keys)
        assert answer.code == 2
        assert "does not read" in answer.stderr
