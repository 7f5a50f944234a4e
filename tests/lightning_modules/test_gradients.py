"""Two CPU ranks accumulate the gradient of one process, in float64, for every task and strategy."""

import math
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from gpt2lab.settings import StrategySettings
from launch import exit_codes
from launch.checks import checks
from launch.config import run_spec
from launch.config.groups import precision_named
from launch.config.run_spec import Machine, PreparedSpec, Resolved, RunSpec
from launch.run import auto_settings, build, fill_teacher_cache, resolve
from tests.conftest import ROOT, SHRUNK, environment
from tests.support.configurations import composed, prepared
from tests.support.gradient_run import Gradients, Held, recorded

TOLERANCE = 1e-6  # relative L2 distance of two gradients
STEPS = 2  # LoRA's first factor has no gradient in the first, and DDP regroups its buckets after it
ROWS = 7  # of a step: not divisible by two ranks nor by their micro-batches of two


DISTILL = ("task=distill", "teacher=TEACHER", "preflight=off", "loss=jsd", "loss.hard_weight=0.3")
PAIRS = ("task=finetune", "init=TEACHER", "data=pairs", "path=PAIRS", "model=auto", "task.text.max_new_tokens=8")
CASES: dict[str, tuple[str, ...]] = {
    "pretrain": (),
    "distill": DISTILL,
    "distill_cached": (*DISTILL, "teacher_cache=topk", "teacher_cache.k=16"),
    "finetune": PAIRS,
    "lora": (*PAIRS, "task.lora.rank=4"),
}
# Options of sharding alone: case → the case of CASES with the same gradient, and the overrides
ONLY_SHARDED: dict[str, tuple[str, dict[str, Any]]] = {
    "distill_sharded_teacher": ("distill", {"shard_teacher": True}),
    "offloaded": ("pretrain", {"strategy": StrategySettings("fsdp", offload=True)}),
    "bf16": ("finetune", {"precision": precision_named("bf16")}),
    "bf16_true": ("finetune", {"precision": precision_named("bf16_true")}),
}
BF16_TOLERANCE = 0.02  # of gradients in bf16, which has 8 bits
BF16_TRUE_TOLERANCE = 0.04  # with weights, residual stream and accumulated gradient in bf16


def spec_of(overrides: tuple[str, ...], named: dict[str, str]) -> PreparedSpec:
    """Return the checked run of a command line, without torch.compile."""
    given = [override.replace("TEACHER", named["TEACHER"]).replace("PAIRS", named["PAIRS"]) for override in overrides]
    config = composed(*given)
    checks.check(config)
    inputs = resolve.resolve_inputs(config)
    spec = RunSpec(config, Resolved(**vars(inputs), machine=auto_settings.choose_machine(config, inputs)))
    data = build.data_module(spec)
    facts = data.prepare()
    ready = prepared(spec, resolve.vocabulary(spec, facts))
    if config.teacher_cache.name == "none":
        return ready
    folder = fill_teacher_cache.fill(spec, data, facts)
    return replace(ready, prepared=replace(ready.prepared, teacher_cache=str(folder)))


def on_two_ranks(spec: PreparedSpec, strategy: str) -> PreparedSpec:
    """Return the same run on two ranks."""
    config = replace(spec.config, micro_batch=2)
    machine = replace(spec.machine, devices=2, strategy=strategy)
    micro_batch, accumulate = auto_settings.split_batch(config, machine)
    return with_machine(replace(spec, config=config), replace(machine, micro_batch=micro_batch, accumulate=accumulate))


def with_machine(spec: PreparedSpec, machine: Machine) -> PreparedSpec:
    return replace(spec, resolved=replace(spec.resolved, machine=machine))


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, cache: Path, sources: Path) -> Iterator[dict[str, str]]:
    """A teacher twice as wide as the students, and pairs with responses of very different lengths."""
    folder = tmp_path_factory.mktemp("given")
    lines = [f"{number}\t{'and ' * (number * number % 11)}{number}" for number in range(60)]
    (folder / "pairs.tsv").write_text("\n".join(["source\ttarget", *lines]) + "\n")
    wide = ["model.n_head=4", "model.n_embd=64", "steps=2", "optimizer=adamw", "run_dir=teacher"]
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment(cache).items():
            patch.setenv(key, value)
        patch.chdir(folder)
        patch.setattr(sys, "argv", [str(ROOT / "train.py"), *SHRUNK, f"path={sources}", *wide])
        assert exit_codes.exit_code(train.command_line) == 0
        yield {"TEACHER": str(folder / "teacher"), "PAIRS": str(folder / "pairs.tsv"), "SOURCES": str(sources)}


def spec_of_case(case: str, given: dict[str, str]) -> PreparedSpec:
    overrides = CASES[case]
    of_pairs = "data=pairs" in overrides
    replaced = ("data=", "batch_tokens", "vocab_size", "model.") if of_pairs else ("batch_tokens",)
    size = f"batch_sequences={ROWS}" if of_pairs else f"batch_tokens={ROWS * 32}"
    usual = [key for key in SHRUNK if not key.startswith(replaced)]
    usual += [size, f"steps={STEPS}", "devices=1", f"micro_batch={ROWS}", "optimizer=adamw", "threads=1"]
    if not of_pairs:
        usual.append(f"path={given['SOURCES']}")
    return spec_of((*usual, *overrides), given)


@pytest.fixture(scope="module")
def alone(given: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[PreparedSpec, Gradients]]:
    """Map a case to its run on one device and the gradients of each step, from one undivided batch."""
    found = {}
    for case in CASES:
        spec = spec_of_case(case, given)
        of_one = recorded(spec, tmp_path_factory.mktemp(case))
        assert [rows for rows, _ in of_one.parts] == [ROWS] * STEPS
        found[case] = spec, of_one.gradients
    return found


@pytest.fixture(scope="module")
def together(
    alone: dict[str, tuple[PreparedSpec, Gradients]], cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], dict[str, Any]]:
    """Map (strategy, case) to the records of two ranks; all cases run in one process group."""
    folder = tmp_path_factory.mktemp("together")
    shared = {
        (strategy, case): on_two_ranks(spec, strategy)
        for strategy in ("ddp", "fsdp")
        for case, (spec, _) in alone.items()
    }
    for case, (like, changed) in ONLY_SHARDED.items():
        spec = shared["fsdp", like]
        of_machine = {name: value for name, value in changed.items() if name in ("shard_teacher", "precision")}
        config = replace(spec.config, **{name: changed[name] for name in changed if name in vars(spec.config)})
        shared["fsdp", case] = with_machine(replace(spec, config=config), replace(spec.machine, **of_machine))
    files = {which: folder / "-".join(which) / "config.yaml" for which in shared}
    for which, file in files.items():
        file.parent.mkdir()
        run_spec.save(shared[which], file)
    run_ranks([str(ROOT / "tests" / "support" / "gradient_run.py"), *map(str, files.values())], cache)
    return {which: torch.load(file.with_name("gradients.pt")) for which, file in files.items()}


def run_ranks(program: list[str], cache: Path) -> None:
    """Run a program as two ranks of one process group."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, *program],
            env={**environment(cache), **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=600)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(output[-3000:] for output in outputs)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the relative L2 distance of two whole gradients."""
    assert one.keys() == other.keys()
    assert all(tensor.dtype == torch.float64 for tensor in one.values())
    squares = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return math.sqrt(squares / sum(float(tensor.square().sum()) for tensor in one.values()))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_accumulate_the_gradient_of_one_process(
    strategy: str,
    case: str,
    alone: dict[str, tuple[PreparedSpec, Gradients]],
    together: dict[tuple[str, str], dict[str, Any]],
) -> None:
    recorded = together[strategy, case]
    first, second = (rank["parts"] for rank in recorded["ranks"])
    assert [rows for rows, _ in first] == [2, 2] * STEPS  # micro-batches of each rank
    assert [rows for rows, _ in second] == [2, 1] * STEPS
    if CASES[case][:1] == PAIRS[:1]:
        assert len({targets for _, targets in first + second}) > 3
    gradients = alone[case][1]
    assert len(gradients) == len(recorded["gradients"]) == STEPS
    for one, two in zip(gradients, recorded["gradients"], strict=True):
        assert distance(one, two) <= TOLERANCE


@pytest.mark.parametrize("case", ["distill_sharded_teacher", "offloaded"])
def test_sharding_and_offload_options_change_no_gradient(
    case: str, alone: dict[str, tuple[PreparedSpec, Gradients]], together: dict[tuple[str, str], dict[str, Any]]
) -> None:
    recorded = together["fsdp", case]
    for one, two in zip(alone[ONLY_SHARDED[case][0]][1], recorded["gradients"], strict=True):
        assert distance(one, two) <= TOLERANCE
    assert [rank["offloads"] for rank in recorded["ranks"]] == [{case == "offloaded"}] * 2


def share(recorded: dict[str, Any], whose: str) -> dict[str, list[Held]]:
    """Map a parameter to the part on each rank."""
    names = [name for name in recorded["ranks"][0]["held"] if name.startswith(whose)]
    return {name: [rank["held"][name] for rank in recorded["ranks"]] for name in names}


@pytest.mark.parametrize("case", [*CASES, *ONLY_SHARDED])
def test_each_of_two_ranks_stores_half_of_weights_and_moments(
    case: str, together: dict[tuple[str, str], dict[str, Any]]
) -> None:
    """An odd number of rows has a larger half; under ddp both ranks have all of every tensor."""
    of_student = share(together["fsdp", case], "student")
    assert of_student
    for name, ((shape, *_), _) in of_student.items():
        half = (shape[0] + 1) // 2 * math.prod(shape[1:])
        assert of_student[name] == [(shape, half, True)] * 2, name
    if case in CASES:
        alike = share(together["ddp", case], "student")
        assert alike == {name: [(shape, math.prod(shape), False)] * 2 for name, ((shape, *_), _) in of_student.items()}
        halves, wholes = (
            [rank["moments_held"] for rank in together[strategy, case]["ranks"]] for strategy in ("fsdp", "ddp")
        )
        assert wholes[0] > 0
        assert halves == pytest.approx([whole / 2 for whole in wholes], rel=0.02)


def test_sharded_teacher_keeps_only_its_head_whole(
    together: dict[tuple[str, str], dict[str, Any]],
) -> None:
    split, whole = (share(together["fsdp", case], "teacher") for case in ("distill_sharded_teacher", "distill"))
    assert {name.split(".")[3] for name, (held, _) in split.items() if not held[2]} == {"wte", "wpe", "ln_f"}
    for name, ((shape, *_), _) in whole.items():
        assert whole[name] == [(shape, math.prod(shape), False)] * 2
        assert split[name] == (whole[name] if ".h." not in name else [(shape, math.prod(shape) // 2, True)] * 2), name


@pytest.mark.parametrize("case", [*CASES, *ONLY_SHARDED])
def test_sharded_model_has_one_fsdp_root(case: str, together: dict[tuple[str, str], dict[str, Any]]) -> None:
    """The root is the backbone; a block that is a root gathers its weights only when it is called, without prefetch."""
    of_teacher = {"teacher": []} if case == "distill" else {"teacher": [""]} if "teacher" in case else {}
    for rank in together["fsdp", case]["ranks"]:
        assert rank["roots"] == {"student": [""], **of_teacher}


def test_sharded_bf16_blocks_reduce_gradients_in_fp32(
    alone: dict[str, tuple[PreparedSpec, Gradients]], together: dict[tuple[str, str], dict[str, Any]]
) -> None:
    recorded = together["fsdp", "bf16"]
    assert recorded["computed_in"] == torch.bfloat16
    assert together["fsdp", "finetune"]["computed_in"] == torch.float64
    for one, two in zip(alone["finetune"][1], recorded["gradients"], strict=True):
        assert {tensor.dtype for tensor in two.values()} == {torch.float32}
        assert 1e-6 < distance(one, {name: tensor.double() for name, tensor in two.items()}) <= BF16_TOLERANCE


def test_sharded_bf16_weights_and_gradients_stay_bf16(
    alone: dict[str, tuple[PreparedSpec, Gradients]], together: dict[tuple[str, str], dict[str, Any]]
) -> None:
    recorded = together["fsdp", "bf16_true"]
    assert recorded["computed_in"] == torch.bfloat16
    for one, two in zip(alone["finetune"][1], recorded["gradients"], strict=True):
        assert {tensor.dtype for tensor in two.values()} == {torch.bfloat16}
        assert 1e-6 < distance(one, {name: tensor.double() for name, tensor in two.items()}) <= BF16_TRUE_TOLERANCE
