"""plan=true prints the resources of a run and writes no file; the memory model counts the tensors of PyTorch."""

import cProfile
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config

from benchmarks.benchmark_memory_plan import DEFAULT_RUNS, Case, default_keys, measure, measure_default
from gpt2lab.errors import InputError
from gpt2lab.losses.lm_head_loss import _workspaces, lm_head_loss
from gpt2lab.model import short_attention
from gpt2lab.model.backbone import Backbone
from gpt2lab.optim.optimizers import build_optimizer
from gpt2lab.settings import ModelShape, OptimizerSettings, TokenizerChoice
from gpt2lab.system.free_memory import host_free_bytes
from launch.checks import sharding
from launch.config import run_spec
from launch.config.groups import precision_named
from launch.config.run_dir import check_name
from launch.memory import step_timing
from launch.memory.memory_options import memory_options
from launch.memory.memory_plan import largest_that_fits, memory_plan
from launch.memory.memory_terms import NEWTON_SCHULZ_BYTES, RunSizes, memory_terms, parameters, trained_parameters
from launch.memory.run_sizes import run_sizes
from launch.memory.step_timing import Speed, affordable_rows, fitting_rows
from launch.run import auto_settings, disk_space, plan_report
from tests.conftest import ROOT, Answer, Train, environment
from tests.support.configurations import composed, resolved

# Runs a command, and prints the peak resident kilobytes of it or of any process that it started
PEAK_OF = """
import resource, subprocess, sys

subprocess.run(sys.argv[1:], check=True)
sys.stderr.write(f"{resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}")
"""
SMALL = ModelShape(6, 4, 256, 1024, 4096)
GIGABYTE = 10**9


def succeeded(answer: Answer) -> str:
    assert answer.code == 0, answer.stderr
    return answer.stdout


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def left_behind(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Output


def test_a_plan_names_every_part_and_leaves_nothing_behind(
    train_here: Train, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("launch.memory.step_timing.TIMEOUT_SECONDS", 250.0)  # for slow machines
    printed = succeeded(train_here(*tiny, "steps=1000", "plan=true", "name=mine", "threads=1"))
    for word in ("parameters", "weights", "gradients", "optimizer state", "activations", "LM head", "process", "peak"):
        assert word in printed
    for word in ("micro_batch", "strategy=fsdp", "tokens/s", "checkpoints"):
        assert word in printed
    assert "measured: 3 micro-batches" in printed
    rate = float(re.findall(r"^tokens/s +([\d,]+) ", printed, re.MULTILINE)[0].replace(",", ""))
    ((shown, name),) = re.findall(r"^training +([\d.]+) (\w+)", printed, re.MULTILINE)
    (unit,) = (seconds for seconds, unit_name in plan_report.SECONDS if unit_name == name)
    rounding = 0.06 * unit + 1000 * 256 * 0.5 / rate**2  # one digit is shown of the time, and none of the rate
    assert float(shown) * unit == pytest.approx(1000 * 256 / rate, abs=rounding), "steps of 256 tokens"
    assert "2 of 0.3 MB and the exported model" in printed, "24,576 parameters with one moment, 12,544 with two"
    shape = ModelShape(2, 2, 32, 64, 300)
    assert f"{parameters(shape):,}" in printed
    monkeypatch.setitem(step_timing.FLOP_LIMITS, "cpu", 0)
    larger = "batch_tokens=8192"  # as many as a validation batch
    printed = succeeded(train_here(*tiny, larger, "plan=true", "threads=1"))
    assert "activation_checkpointing=true" in printed
    assert left_behind(tmp_path) == []


@pytest.mark.slow
def test_distill_and_finetune_are_planned_from_config_json(
    train_here: Train, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert train_here(*tiny, "model.n_embd=64", "steps=1", "run_dir=teacher", "threads=1").code == 0
    before = left_behind(tmp_path)
    distil = ("task=distill", "teacher=teacher", "plan=true", "threads=1")
    monkeypatch.setattr(step_timing, "TIMEOUT_SECONDS", 250.0)  # for slow machines
    printed = succeeded(train_here(*tiny, *distil))
    assert "measured: 3 micro-batches" in printed
    monkeypatch.setitem(step_timing.FLOP_LIMITS, "cpu", 0)  # measuring takes a process of seconds, and is tested above
    assert "teacher weights" in printed
    assert "teacher_cache=sampled" in printed
    assert "teacher cache" in succeeded(train_here(*tiny, *distil, "teacher_cache=sampled"))
    pairs = tmp_path.parent / f"{tmp_path.name}-pairs.jsonl"
    pairs.write_text(json.dumps({"source": "a", "target": "b"}))
    keys = ["task=finetune", "init=teacher", "data=pairs", f"path={pairs}", "context=32", "logger=none", "plan=true"]
    lora = ("callbacks=minimal", "task.lora.rank=2", "task.text.max_new_tokens=8", "threads=1")
    printed = succeeded(train_here(*keys, *lora))
    assert f"{16 * 2 * 64 * 2:,}" in printed  # the LoRA parameters of two layers of width 64
    assert left_behind(tmp_path) == before


def test_plan_has_the_disk_space_of_the_data(train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(step_timing.FLOP_LIMITS, "cpu", 0)  # no steps are measured
    keys = ["model=nano", "data=text", f"path={Path(json.__file__).parents[1] / 'asyncio'}", "vocab_size=2048"]
    keys += ["logger=none", "steps=1", "context=64", "cache_dir=cache", "run_dir=run", "callbacks=minimal"]
    printed = succeeded(train_here(*keys, "plan=true"))
    planned = float(re.findall(r"^data +([\d.]+) MB   about", printed, re.MULTILINE)[0]) * 1e6
    succeeded(train_here(*keys))
    taken = sum(file.stat().st_size for file in tmp_path.glob("cache/tokens/*/*.bin"))
    assert taken == pytest.approx(planned, rel=0.25)


@pytest.mark.parametrize(
    "keys",
    [
        ("optimizer=adamw", "steps=3", "checkpoint_every=1"),
        ("optimizer=muon", "steps=1", "ema=0.9"),
        pytest.param(("steps=1", "devices=2", "strategy=fsdp"), marks=pytest.mark.slow),
        pytest.param(("steps=1", "devices=2", "strategy=fsdp", "checkpoint_format=sharded"), marks=pytest.mark.slow),
    ],
    ids=["two kept", "one, averaged", "gathered", "in shards"],
)
def test_plan_has_the_disk_space_of_checkpoints_and_export(
    train_here: Train, tiny: list[str], tmp_path: Path, keys: tuple[str, ...]
):
    """The plan is within a tenth: files also have loop states, random states and the tokenizer."""
    run = tmp_path / "run"
    succeeded(train_here(*tiny, "model.n_embd=128", "vocab_size=1024", *keys, "run_dir=run", "threads=1"))
    files = disk_space.run_files(run_spec.load(run / "config.yaml"), 1024)
    taken = bytes_in(run / "checkpoints") + bytes_in(run / "hf")
    assert taken == pytest.approx(files.left, rel=0.1)
    assert bytes_in(run) < files.most


@pytest.mark.parametrize(("devices", "shown"), [(1, "25.6 hours"), (4, "6.4 hours")])
def test_planned_time_is_all_tokens_at_the_speed_of_all_devices(
    devices: int, shown: str, monkeypatch: pytest.MonkeyPatch
):
    """36,000 steps of 256 tokens are 92,160 seconds at 100 tokens a second."""
    monkeypatch.setattr(auto_settings, "cpu_cores", lambda: 4)
    keys = ("accelerator=cpu", "steps=36000", "batch_tokens=256", "context=32", f"devices={devices}")
    spec = resolved(composed(*keys))
    sizes = run_sizes(spec.config, spec.resolved, spec.machine, 300)
    table = plan_report._time_and_disk(spec, sizes, 300, Speed(100.0, "measured"), None)
    cells = dict(zip(*(column._cells for column in table.columns[:2]), strict=True))
    assert cells["training"] == shown
    assert cells["tokens/s"] == str(100 * devices)


class Work(TorchDispatchMode):
    """Counts elements of tensors computed or allocated on a real device in the block, and calls of this project."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self._calls = 0, cProfile.Profile()

    def __enter__(self) -> "Work":
        self._calls.enable()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._calls.disable()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor) and one.device.type != "meta"]
        self.elements += sum(tensor.numel() for tensor in tensors)
        return result

    @property
    def calls(self) -> int:
        """Return the number of calls of this project's functions."""
        codes = [(entry.code, entry.callcount) for entry in self._calls.getstats()]
        files = [(code.co_filename, count) for code, count in codes if not isinstance(code, str)]
        return sum(count for file, count in files if file.startswith(f"{ROOT}/") and "site-packages" not in file)


def test_planning_a_large_model_takes_little_work(train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """gpt2-xl with AdamW takes 16 bytes a parameter and activations: more than 24 GB on one device."""
    processes: list[Any] = []

    class Noted(subprocess.Popen):
        def __init__(self, command: Any, *arguments: Any, **options: Any) -> None:
            processes.append(command)
            super().__init__(command, *arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    keys = ["data=text", f"path={tmp_path}", "model=xl", "optimizer=adamw", "context=1024", "batch_tokens=1048576"]
    with Work() as work:
        printed = succeeded(train_here(*keys, "vocab_size=50257", "plan=true", "accelerator=cpu", "steps=200000"))
    assert work.elements < 1_000_000, "the weights have 1,557,611,200"
    assert work.calls < 5_000_000, "ten times what it takes"
    assert not processes, "nothing is measured"
    assert "1,557,611,200" in printed
    assert "not measured" in printed


@pytest.mark.slow
def test_planning_a_large_model_allocates_nothing_of_its_size(cache: Path, tmp_path: Path):
    """gpt2-xl's weights alone are 6.2 GB; the peak covers the plan's process and the processes that it starts."""
    keys = ["data=text", f"path={tmp_path}", "model=xl", "optimizer=adamw", "context=1024", "batch_tokens=131072"]
    keys += ["vocab_size=50257", "plan=true", "accelerator=cpu", "threads=1", "devices=1"]
    ended = subprocess.run(
        [sys.executable, "-c", PEAK_OF, sys.executable, str(ROOT / "train.py"), *keys],
        cwd=tmp_path,
        env=environment(cache),
        capture_output=True,
        text=True,
    )
    assert "1,557,611,200" in ended.stdout, ended.stderr
    assert int(ended.stderr.split()[-1]) * 1024 < 1 * GIGABYTE
    assert not list(tmp_path.iterdir())


def test_gpu_run_is_planned_without_gpus(train_here: Train, tmp_path: Path):
    keys = ["data=fineweb", "tokenizer=bpe", "model=xl", "optimizer=adamw", "context=1024", "batch_tokens=524288"]
    there = [*keys, "plan=true", "accelerator=gpu", "devices=8", "logger=none", "vocab_size=50257"]
    large, small = (succeeded(train_here(*there, f"plan_memory={size}")) for size in (80, 24))
    assert "8 × gpu" in large
    assert "strategy=ddp" in large
    assert "strategy=fsdp" in small
    for printed in (large, small):
        assert "it fits" in printed
        assert "the machine is not this one" in printed
    answer = train_here(*keys, "plan_memory=80")
    assert answer.code == 2
    assert "plan=true accelerator=gpu devices=N" in answer.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("more", [("resume=auto", "name=x"), ("-m", "seed=1,2")])
def test_plan_of_a_sweep_or_resume_is_refused(train_here: Train, tiny: list[str], more: tuple[str, ...]):
    answer = train_here(*tiny, "plan=true", *more)
    assert answer.code == 2
    assert "plan=true plans" in answer.stderr


def test_report_has_planned_and_measured_memory(train_here: Train, tiny: list[str], tmp_path: Path):
    succeeded(train_here(*tiny, "steps=1", "run_dir=run", "threads=1"))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["planned_memory_bytes"] > 100e6
    assert report["peak_memory_bytes"] > 100e6


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case("pretrain", "nano", 1_024, 128, 16, "fp32", "adamw"),
        Case("pretrain", "micro", 2_048, 128, 8, "bf16", "muon"),
    ],
    ids=["nano", "micro"],
)
def test_the_peak_of_a_run_is_the_planned_one(case: Case, tmp_path: Path):
    """Measured in a separate process; within a fifth, as nearly all runs in docs/measurements/planning.md."""
    assert abs(measure(case, tmp_path).error) < 0.2


@pytest.mark.parametrize("name", DEFAULT_RUNS)
def test_each_default_run_of_the_memory_benchmark_is_accepted(name: str, tmp_path: Path):
    check_name(composed(*default_keys(name, tmp_path), f"run_dir={tmp_path / name}"))


@pytest.mark.slow
def test_peak_of_default_runs_is_planned_within_15_percent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    errors = {name: measure_default(name, tmp_path).error for name in ("micro", "distill", "finetune")}
    assert max(map(abs, errors.values())) <= 0.15, errors


# Counting


@pytest.mark.parametrize("name", ["nano", "micro", "small", "xl"])
def test_parameters_are_those_of_the_real_model(name: str):
    shape = ModelShape(**{**vars(composed(f"model={name}").model), "vocab_size": 50257})
    with torch.device("meta"):
        model = Backbone(shape)
    assert parameters(shape) == trained_parameters(RunSizes(shape, 1, 8, 1)) == model.lm.num_parameters()


def test_trained_parameters_of_lora_and_freezing_have_a_formula():
    sizes = RunSizes(SMALL, 1, 8, 1)
    model = Backbone(SMALL)
    for part in (model.lm.transformer.wte, model.lm.transformer.wpe, *model.blocks[:4]):
        part.requires_grad_(False)
    expected = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained_parameters(replace(sizes, frozen_layers=4)) == expected


COUNTED_FEATURES = {
    "generated text": {"prompts": 16, "generated_length": 1000},
    "W&B": {"wandb": True},
    "tables of samples in W&B": {"wandb": True, "samples": True},
    "verified export": {"verified": True},
    "compiled loss": {"compiled_head": True},
    "teacher cache": {"cached_teacher": replace(SMALL, n_layer=72), "sampled_cache": True},
    "distillation metrics": {"divergence": "forward_kl"},
    "teacher": {"divergence": "forward_kl", "teacher": SMALL},
    "lengths that differ": {"varied": True},
    "averaged weights": {"ema": True},
}


@pytest.mark.parametrize("name", COUNTED_FEATURES)
def test_memory_of_a_feature_is_counted(name: str):
    base = RunSizes(SMALL, 4, 256, 4, precision_named("bf16"), wandb="tables" in name)
    sizes = replace(base, **COUNTED_FEATURES[name])
    assert memory_plan(sizes).peak > memory_plan(base).peak


def test_gpu_plan_has_the_same_terms_without_the_process():
    sizes = RunSizes(SMALL, 8, 256, 8, on_gpu=True, prompts=16, generated_length=512)
    plan, on_cpu = memory_plan(sizes, 10**9), memory_plan(replace(sizes, on_gpu=False), 10**9)
    assert plan.process == plan.fragmentation == 0
    assert plan == memory_plan(replace(sizes, wandb=True, samples=True, verified=True))
    for name in ("weights", "gradients", "optimizer state", "activations", "LM head gradients"):
        assert plan.parts[name] == on_cpu.parts[name] > 0
    packed = parameters(SMALL) * 4  # matrices for products of a few rows
    assert on_cpu.parts["generation"] - packed == plan.parts["generation"] > 0


def test_terms_grow_with_the_sizes_in_their_formulas(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(short_attention, "HAS_BF16", True)
    sizes = RunSizes(SMALL, 4, 256, 4, prompts=4, generated_length=256, verified=True)
    terms = memory_terms(sizes)
    twice = {"activations": {"rows": 8}, "hidden states": {"length": 512}}
    packed = parameters(SMALL) * 4  # matrices for products of a few rows, once for all prompts
    more = memory_terms(replace(sizes, prompts=8))["generation"]
    assert more - packed == 2 * (terms["generation"] - packed) > 0
    assert terms["accumulated gradients"] == 0
    assert memory_terms(replace(sizes, step_rows=8))["accumulated gradients"] == terms["gradients"]
    for name, change in twice.items():
        assert memory_terms(replace(sizes, **change))[name] == 2 * terms[name], name
    half = memory_terms(replace(sizes, precision=precision_named("bf16_true")))
    # bytes of its probabilities, kept in bf16 alone: two blocks of 128 queries, with 128 and 256 keys
    attention = 2 * SMALL.n_layer * SMALL.n_head * 4 * 128 * (128 + 256)
    for name in ("weights", "gradients", "optimizer state", "activations"):
        expected = terms[name] / 2 + (attention if name == "activations" else 0)
        assert half[name] == pytest.approx(expected, rel=0.01), name
    on_gpu = memory_terms(replace(sizes, precision=precision_named("bf16_true"), on_gpu=True))
    assert (
        half["generation"] - on_gpu["generation"] == 2 * SMALL.n_layer * SMALL.n_embd * 2 * 4 * 256
    )  # keys and values
    short = replace(sizes, precision=precision_named("bf16"), prompts=1, generated_length=1)
    assert memory_terms(short)["generation"] > 2 * parameters(SMALL)  # autocast's copies of the weights
    assert memory_terms(replace(sizes, sharded=True, ranks=4))["gradients"] == terms["gradients"] // 4
    assert terms["export"] == 2 * 4 * parameters(SMALL)


def test_a_cpu_packs_the_weights_that_it_gathered():
    sizes = RunSizes(SMALL, 4, 256, 4, prompts=4, generated_length=256, ranks=2)
    whole, sharded = (memory_terms(replace(sizes, sharded=sharded))["generation"] for sharded in (False, True))
    assert sharded - whole == 4 * parameters(SMALL)


def test_muon_takes_twice_the_iteration_on_a_gpu_without_bf16(monkeypatch: pytest.MonkeyPatch):
    sizes = RunSizes(SMALL, 4, 256, 4, optimizer="muon", on_gpu=True)
    planned = memory_terms(sizes)["optimizer temporaries"]  # for a GPU that is not here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("launch.memory.memory_terms.multiplies_bf16", lambda device: device != "cuda")
    more = memory_terms(sizes)["optimizer temporaries"] - planned
    assert more == SMALL.n_layer * 12 * SMALL.n_embd**2 // 3 * NEWTON_SCHULZ_BYTES


def test_run_sizes_include_callbacks_and_loggers(tmp_path: Path):
    GPT2Config(n_layer=2, n_head=2, n_embd=64, vocab_size=300).save_pretrained(tmp_path)

    def sizes_of(*keys: str) -> RunSizes:
        spec = resolved(composed(*keys, "accelerator=cpu", "devices=1"), teacher=str(tmp_path), init=str(tmp_path))
        return run_sizes(spec.config, spec.resolved, spec.machine, 300, target_share=0.1)

    default = sizes_of("model=nano")
    assert (default.prompts, default.samples, default.wandb, default.verified) == (3, True, True, True)
    minimal = sizes_of("model=nano", "callbacks=minimal", "logger=csv")
    assert (minimal.prompts, minimal.samples, minimal.wandb, minimal.verified) == (0, False, False, False)
    finetune = sizes_of("task=finetune", "model=nano", "context=128", "task.text.max_new_tokens=32")
    assert (finetune.prompts, finetune.generated_length, finetune.target_share) == (16, 160, 0.1)
    on_policy = sizes_of("task=distill", "model=nano", "data=summarize", "sequences=gkd", "batch_sequences=32")
    assert (on_policy.prompts, on_policy.varied, on_policy.target_share) == (32, True, 0.25)
    cached = sizes_of("task=distill", "model=nano", "teacher_cache=sampled")
    assert (cached.teacher, cached.sampled_cache) == (None, True)


def peak_of(work) -> tuple[int, object]:
    """Return the peak bytes of tensors that `work` adds to the existing ones, and its result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most, result


COUNTED = {
    "fp32": RunSizes(SMALL, 4, 256, 4),
    "bf16": RunSizes(SMALL, 2, 128, 2, precision_named("bf16")),
    "checkpointed": RunSizes(SMALL, 8, 256, 8, checkpointing=True),
    "large vocabulary": RunSizes(replace(SMALL, n_layer=2, vocab_size=50_257), 1, 128, 1, precision_named("bf16")),
    "dropout": RunSizes(replace(SMALL, dropout=0.1), 4, 256, 4),
    "muon": RunSizes(SMALL, 4, 128, 4, precision_named("bf16"), optimizer="muon"),
    "bf16_true": RunSizes(SMALL, 1, 64, 1, precision_named("bf16_true")),
    "bf16_true, muon": RunSizes(SMALL, 1, 64, 1, precision_named("bf16_true"), optimizer="muon"),
}
SLOW_WITHOUT_BF16 = ("muon", "bf16_true, muon")  # a minute each where the CPU emulates bf16


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=pytest.mark.slow) if one in SLOW_WITHOUT_BF16 else one for one in COUNTED]
)
def test_counted_tensors_equal_the_profiled_ones(name: str):
    """Forward, backward and optimizer of a second step, as profiled by PyTorch: within 5 %, or 3 MB."""
    sizes = COUNTED[name]
    _workspaces.clear()
    torch.manual_seed(0)
    model = Backbone(sizes.shape).train()
    if sizes.precision.is_bf16_true:
        model.bfloat16()
    if sizes.checkpointing:
        model.checkpoint_activations()
    settings = OptimizerSettings(sizes.optimizer, 1e-3, 0.1)
    optimizer = build_optimizer(model.named_parameters(), settings, fused=True)
    ids = torch.randint(sizes.shape.vocab_size, (sizes.rows, sizes.length))
    labels = ids.flatten()

    def forward():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=sizes.precision.name == "bf16"):
            return model(ids, lambda hidden, weight: lm_head_loss(hidden.flatten(0, 1), weight, labels).total)

    forward().backward()
    optimizer.step()
    held = sum(p.nbytes for p in model.parameters()) + sum(
        tensor.nbytes for state in optimizer.state.values() for tensor in state.values() if tensor.ndim
    )
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    workspace = sum(tensor.nbytes for tensor in _workspaces.values())
    most, loss = peak_of(forward)
    measured = {"forward": held + gradients + workspace + most}
    optimizer.zero_grad()
    peak_of(forward)  # so that the backward pass follows a profiled forward pass
    most, _ = peak_of(loss.backward)
    plan = memory_plan(sizes)
    measured["backward"] = held + workspace + plan.parts["activations"] + _head_kept(sizes) + most
    most, _ = peak_of(optimizer.step)
    measured["optimizer"] = held + gradients + workspace + most
    for phase, size in measured.items():
        assert plan.phases[phase] == pytest.approx(size, rel=0.05, abs=3e6), (phase, plan.phases, measured)


def _head_kept(sizes: RunSizes) -> int:
    of_hidden = sizes.weight_bytes * sizes.positions * sizes.shape.n_embd
    return 4 * sizes.shape.vocab_size * sizes.shape.n_embd + of_hidden


# Choosing


def test_micro_batch_shrinks_with_free_memory():
    keys = ("model=small", "accelerator=cpu", "devices=1", "batch_tokens=16384", "tokenizer=bpe", "vocab_size=50257")
    chosen = []
    for free in (64 * GIGABYTE, 8 * GIGABYTE, 5 * GIGABYTE, GIGABYTE):
        tokenizer = TokenizerChoice("bpe", vocab_size=50_257)
        machine = resolved(composed(*keys, "context=256"), free, tokenizer=tokenizer).machine
        chosen.append(machine.micro_batch)
        assert machine.accumulate * machine.micro_batch >= 64
        assert machine.largest_micro_batch >= machine.micro_batch
    assert chosen[0] == 32, "what gains speed is the most"
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[-1] == 1
    assert len(set(chosen)) > 2


def test_the_largest_micro_batch_that_fits_is_the_largest():
    sizes, room = RunSizes(SMALL, 1, 256, 1, step_rows=1000), 1_500_000_000
    found = largest_that_fits(sizes, 0, room, cap=1000)

    def peak(rows: int) -> int:
        return memory_plan(replace(sizes, rows=rows, eval_rows=rows)).peak

    assert peak(found) <= room < peak(found + 1)


def test_every_memory_option_saves_memory():
    sizes = RunSizes(replace(SMALL, n_layer=12), 32, 512, 32, optimizer="adamw", step_rows=32)
    peak = memory_plan(replace(sizes, on_gpu=True)).peak
    for change in (
        {"checkpointing": True},
        {"rows": 8},
        {"precision": precision_named("bf16")},
        {"sharded": True, "ranks": 4},
    ):
        assert memory_plan(replace(sizes, on_gpu=True, **change)).peak < peak, change
    taught = replace(sizes, on_gpu=True, divergence="forward_kl", teacher=SMALL)
    assert memory_plan(replace(taught, teacher=None)).peak < memory_plan(taught).peak


def test_memory_options_are_named_once_and_can_be_set():
    """A batch of one sequence cannot be shared by two devices; half of two is one."""
    for rows in (1, 2, 3):
        sizes = RunSizes(SMALL, rows, 512, rows, optimizer="adamw", step_rows=rows)
        keys = [option.key for option in memory_options(sizes, memory_plan(sizes))]
        assert len(keys) == len(set(keys))
        assert ("strategy=fsdp devices=2" in keys) == (rows > 1)


REFUSED = [("layer_drop=0.1",), ("precision=fp16",)]


@pytest.mark.parametrize(("keys", "is_taken"), [((), True), *((keys, False) for keys in REFUSED)])
def test_sharding_is_suggested_only_if_accepted(
    train_here: Train, tiny: list[str], keys: tuple[str, ...], is_taken: bool
):
    there = [*tiny, "plan=true", "accelerator=gpu", "plan_memory=8", *keys]
    assert ("strategy=fsdp devices=2" in succeeded(train_here(*there))) == is_taken
    answer = train_here(*there, "strategy=fsdp", "devices=2")
    assert answer.code == (0 if is_taken else 2), answer.stderr


def test_sharding_is_not_suggested_for_one_apple_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    spec = resolved(composed("precision=fp32", "accelerator=mps"))
    sizes = run_sizes(spec.config, spec.resolved, spec.machine, 300)
    may_shard = sharding.may_shard(spec.config, spec.machine.accelerator, spec.machine.precision)
    offered = {option.key for option in memory_options(sizes, memory_plan(sizes), may_shard)}
    assert "micro_batch=1" in offered
    assert not any("fsdp" in key for key in offered)
    with pytest.raises(InputError, match="strategy=fsdp does not work on mps"):
        resolved(composed("precision=fp32", "accelerator=mps", "strategy=fsdp"))


def test_a_control_group_limits_what_is_free(tmp_path: Path):
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:       80 kB\n")
    (tmp_path / "use").write_text("1024\n")
    (tmp_path / "limit").write_text("max\n")
    group = ((tmp_path / "limit", tmp_path / "use"),)
    assert host_free_bytes(tmp_path / "meminfo", group) == 80 * 1024
    (tmp_path / "limit").write_text(f"{11 * 1024}\n")
    assert host_free_bytes(tmp_path / "meminfo", group) == 10 * 1024
    assert host_free_bytes(tmp_path / "missing", ()) is None


def test_measured_rows_are_limited_by_flops():
    sizes = RunSizes(SMALL, 16, 256, 16)
    assert affordable_rows(sizes, 1e18) == 16
    assert 0 < affordable_rows(sizes, 5e11) < 16
    assert affordable_rows(sizes, 1e9) == 0


def test_nothing_that_exceeds_one_device_is_measured():
    """A rank of eight has an eighth of gpt2-xl, and LoRA trains little; the measured process trains all of it."""
    xl = ModelShape(48, 25, 1600, 1024, 50_257)
    shared = RunSizes(xl, 1, 1024, 1, precision_named("bf16"), on_gpu=True, sharded=True, ranks=8)
    adapted = RunSizes(xl, 1, 1024, 1, precision_named("bf16"), on_gpu=True, lora_rank=8)
    for sizes in (shared, adapted):
        assert memory_plan(sizes).peak < 16 * GIGABYTE
        assert fitting_rows(sizes, 8, 16 * GIGABYTE, 0) == 0
        assert fitting_rows(sizes, 8, 80 * GIGABYTE, 0) == 8
        assert fitting_rows(sizes, 8, None, 0) == 8
    small = RunSizes(SMALL, 16, 256, 16)
    assert 0 < fitting_rows(small, 16, memory_plan(small).peak // 2, 0) < 16
