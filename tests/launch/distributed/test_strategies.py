"""strategy=auto chooses a strategy that fits and logs it in one line; keys of sharding are refused without it."""

import json
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from transformers import GPT2Config, GPT2Model

from gpt2lab.errors import InputError
from gpt2lab.settings import StrategySettings
from launch import logging_setup
from launch.checks import checks, sharding
from launch.config.groups import precision_named
from launch.config.run_spec import Machine
from launch.distributed import multi_node
from launch.memory import device_memory
from launch.rank_environment import TORCHRUN_VARIABLES
from launch.run import auto_settings, build, resume
from tests.conftest import Train
from tests.support.configurations import composed, prepared, resolved

XL_STATE = 16 * 1_557_686_400  # bytes: weights, gradients and two moments in fp32
SIZES = {"xl": (48, 25, 1600), "distil": (6, 12, 768)}  # layers, heads, width


def machine_of(*overrides: str) -> Machine:
    return resolved(composed(*overrides, "accelerator=cpu", "precision=fp32")).machine


def test_a_model_too_large_for_one_of_several_devices_is_sharded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(auto_settings, "cpu_cores", lambda: 8)
    logging_setup.configure_logging()
    assert machine_of("model=nano", "devices=1").strategy == "auto"
    assert machine_of("model=nano", "devices=2").strategy == "ddp"
    for gigabytes, strategy in ((40, "ddp"), (32, "fsdp")):
        monkeypatch.setattr(device_memory, "device_bytes", lambda config, machine, size=gigabytes: size * 1e9)
        capsys.readouterr()
        found = machine_of("model=xl", "devices=4", "context=1024")
        assert found.strategy == strategy
        assert found.checkpoint_format == ("sharded" if strategy == "fsdp" else "single")
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == (strategy == "fsdp")
    assert "24.9 GB, too much for one device's 32.0 GB" in lines[0]
    assert machine_of("model=nano", "devices=2", "strategy=fsdp").checkpoint_format == "single"


@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_layer_drop_is_refused_where_the_ranks_shard(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_settings, "cpu_cores", lambda: 8)
    monkeypatch.setattr(device_memory, "device_bytes", lambda config, machine: 32e9)
    with pytest.raises(InputError, match="layer_drop skips other blocks on each rank"):
        machine_of("model=xl", "devices=4", "context=1024", "layer_drop=0.1", f"strategy={strategy}")


def test_estimate_counts_state_kept_between_steps() -> None:
    for keys, share in ((), 1), (("ema=0.9",), 20 / 16), (("ema=0.9", "precision=bf16_true"), 12 / 16):
        spec = resolved(composed("model=xl", "context=1024", "accelerator=cpu", "devices=1", *keys))
        expected = pytest.approx(XL_STATE * share, rel=1e-4)
        assert device_memory.state_bytes(spec.config, spec.resolved, spec.machine) == expected
    assert device_memory.teacher_bytes(spec.config, spec.resolved, spec.machine) == 0


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """Folders of large GPT-2s with sparse weight files in bf16: a plan reads names and sizes alone."""
    for size, (layers, heads, width) in SIZES.items():
        config = GPT2Config(n_layer=layers, n_head=heads, n_embd=width)
        config.save_pretrained(tmp_path / size)
        with torch.device("meta"):
            tensors = GPT2Model(config).state_dict()
        described, end = {}, 0
        for name, tensor in tensors.items():
            start, end = end, end + 2 * tensor.numel()
            described[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
        header = json.dumps(described).encode()
        with (tmp_path / size / "model.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + end)
    return tmp_path


@pytest.mark.parametrize(
    ("size", "gigabytes", "more", "strategy", "splits"),
    [
        ("distil", 4, (), "ddp", False),  # 2.0 GB of a student in training and 0.2 of its teacher
        ("xl", 8, (), "ddp", False),  # 2.0 and 3.1
        ("xl", 6, (), "fsdp", False),  # a quarter of 2.0 and 3.1
        ("xl", 4, (), "fsdp", True),
        ("xl", 4, ("strategy.shard_teacher=false",), "fsdp", False),
        ("xl", 4.5, (), "fsdp", True),
        ("xl", 4.5, ("num_nodes=2", "batch_tokens=8192"), "fsdp", False),  # an eighth of 2.0 and 3.1
        ("xl", 4, ("teacher_cache=sampled",), "ddp", False),  # which is not loaded while the student trains
        ("distil", 4, ("strategy=fsdp",), "fsdp", False),
        ("distil", 4, ("strategy=fsdp", "strategy.shard_teacher=true"), "fsdp", True),
    ],
)
def test_large_teacher_shards_the_student_and_itself_if_needed(
    size: str, gigabytes: float, more: tuple[str, ...], strategy: str, splits: bool, teacher: Path
) -> None:
    keys = ("task=distill", f"teacher={teacher / size}", "model=small", "context=1024", "precision=bf16", *more)
    config = composed(*keys, "accelerator=gpu", "devices=4", "plan=true", f"plan_memory={gigabytes}")
    machine = resolved(config).machine
    assert (machine.strategy, machine.shard_teacher) == (strategy, splits)


@pytest.mark.slow
def test_plan_explains_sharding_and_counts_a_teacher_shard(teacher: Path, train_here: Train, tiny: list[str]) -> None:
    keys = [key for key in tiny if not key.startswith(("model", "context", "precision", "vocab", "batch"))]
    keys += ["task=distill", f"teacher={teacher / 'xl'}", "model=small", "context=1024", "preflight=warn"]
    keys += ["plan=true", "accelerator=gpu", "devices=4", "plan_memory=4", "batch_tokens=65536"]
    reason = "strategy=fsdp: model, optimizer and teacher take 5.1 GB, too much for one device's 4.0 GB"
    embeddings, block, blocks = (50_257 + 1024) * 1600, 12 * 1600**2, XL_STATE / 16 - (50_257 + 1024) * 1600
    parts = 2 * (embeddings + blocks / 4 + 2 * block)  # bytes in bf16, with the gathered weights of two blocks
    for splits, weights in (("auto", parts / 1e9), ("false", XL_STATE / 8e9)):
        answer = train_here(*keys, f"strategy.shard_teacher={splits}")
        assert answer.code == 0, answer.stderr
        assert answer.stderr.count(reason) == 1, answer.stderr
        assert "strategy=fsdp; micro_batch=" in answer.stdout
        (planned,) = re.findall(r"^teacher weights +([\d.]+)", answer.stdout, re.MULTILINE)
        assert float(planned) == pytest.approx(weights, abs=0.01)
        assert ("a device's part of its blocks" in answer.stdout) == (splits == "auto")


def test_keys_of_ddp_reach_lightning() -> None:
    for words, kept in {
        (): {"bucket_cap_mb": 25, "gradient_as_bucket_view": True, "find_unused_parameters": False},
        ("layer_drop=0.1",): {"find_unused_parameters": True},
        ("strategy.bucket_cap_mb=50", "strategy.gradient_as_bucket_view=false"): {
            "bucket_cap_mb": 50,
            "gradient_as_bucket_view": False,
        },
        ("strategy.find_unused_parameters=true",): {"find_unused_parameters": True},
    }.items():
        spec = prepared(resolved(composed("strategy=ddp", "devices=2", "accelerator=cpu", *words)))
        strategy = build.strategy(spec)
        assert isinstance(strategy, DDPStrategy)
        assert {name: strategy._ddp_kwargs[name] for name in kept} == kept


def test_a_resumed_run_keeps_the_options_of_its_strategy() -> None:
    """A new device count keeps the options, a key changes one, and another strategy has its own defaults."""
    stored = prepared(resolved(composed("strategy=ddp", "devices=2", "accelerator=cpu", "strategy.bucket_cap_mb=50")))
    for words, expected in {
        ("resume=x", "devices=1"): StrategySettings("ddp", bucket_cap_mb=50),
        ("resume=x", "strategy.bucket_cap_mb=9"): StrategySettings("ddp", bucket_cap_mb=9),
        ("resume=x", "strategy=fsdp"): StrategySettings("fsdp"),
    }.items():
        assert resume._changed(stored, composed(*words)).config.strategy == expected


def test_a_resumed_run_reads_the_keys_of_the_launcher_given_now() -> None:
    stored = prepared(resolved(composed("accelerator=cpu")))
    changed = resume._changed(stored, composed("resume=x", "launcher=slurm", "launcher.executor=local")).config
    assert changed.launcher == stored.config.launcher  # which is not stored with the run
    with pytest.raises(InputError, match=r"launcher=processes does not read launcher\.executor"):
        resume._changed(stored, composed("resume=x", "launcher.executor=local"))


@pytest.mark.parametrize(("ranks", "per_machine"), [(1, 1), (2, 2), (4, 2)])
def test_a_resumed_run_has_the_ranks_that_torchrun_started(monkeypatch, ranks: int, per_machine: int) -> None:
    stored = prepared(resolved(composed("devices=1", "accelerator=cpu", "batch_tokens=4096")))
    world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(per_machine)}
    for name in TORCHRUN_VARIABLES:
        monkeypatch.setenv(name, world.get(name, "1"))
    machine = resume._changed(stored, multi_node.with_started_world(composed("resume=x"))).machine
    assert (machine.devices, machine.num_nodes, machine.world_size) == (per_machine, ranks // per_machine, ranks)
    assert machine.micro_batch * machine.accumulate * ranks == 16


def test_a_run_of_two_machines_resumes_on_one() -> None:
    stored = prepared(resolved(composed("devices=2", "num_nodes=2", "accelerator=cpu", "strategy=ddp")))
    assert resume._changed(stored, composed("resume=x", "num_nodes=1")).machine.world_size == 2


def test_a_run_of_two_machines_is_not_resumed_by_one_process(train_here: Train, tiny: list[str]) -> None:
    assert train_here(*tiny, "steps=2", "accelerator=cpu", "devices=1", "run_dir=run").code == 0
    file = Path("run/config.yaml")
    text = file.read_text()
    assert text.count("num_nodes: 1") == 2
    file.write_text(text.replace("num_nodes: 1", "num_nodes: 2"))
    answer = train_here("resume=run", "steps=4")
    assert answer.code == 2
    assert "num_nodes=2: start the run on every machine" in answer.stderr
    assert train_here("resume=run", "steps=4", "num_nodes=1").code == 0


def test_ranks_of_several_machines_each_need_a_sequence() -> None:
    settings = composed("context=1024", "batch_tokens=4096", "devices=4", "num_nodes=2")
    with pytest.raises(InputError, match=r"(?s)4 sequences .* by devices=4 of num_nodes=2.*batch_tokens=8192 or more"):
        checks.check_batch(settings)


@pytest.mark.parametrize("key", ["strategy.offload=true", "checkpoint_format=sharded", "strategy.shard_teacher=true"])
def test_keys_of_sharding_need_strategy_fsdp(key: str) -> None:
    config = composed("task=distill", "teacher=x", key, "strategy=ddp")
    with pytest.raises(InputError, match=f"{key}: with strategy=ddp every device holds the whole model"):
        sharding.check(config, "cpu", precision_named("fp32"), "ddp")


def test_offload_needs_a_gpu_and_fsdp_refuses_fp16(train_here: Train, tiny: list[str]) -> None:
    answer = train_here(*tiny, "strategy=fsdp", "strategy.offload=true", "accelerator=cpu")
    assert answer.code == 2
    assert "everything is in host memory already" in answer.stderr
    with pytest.raises(InputError, match="precision=fp16 needs a gradient scaler"):
        sharding.check(composed("strategy=fsdp"), "gpu", precision_named("fp16"), "fsdp")


def test_key_that_the_strategy_does_not_read_is_refused(train_here: Train, tiny: list[str]) -> None:
    for keys in (("strategy=ddp", "strategy.offload=true"), ("strategy.shard_teacher=true",)):
        answer = train_here(*tiny, *keys)
        assert answer.code == 2
        assert "does not read" in answer.stderr
