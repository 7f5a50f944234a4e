"""The dynamic graph: layer drop, and batches of many lengths with a few compiled graphs."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from random import Random
from string import ascii_lowercase

import pytest
import torch
from safetensors.torch import load_file

from gpt2lab.distillation.teacher import OnlineTeacher
from gpt2lab.model.attention_masks import document_bounds, make_spans
from gpt2lab.model.backbone import Backbone, to_hf
from gpt2lab.settings import ModelShape
from gpt2lab.storage.metrics_csv import read_metrics
from launch.run.auto_settings import has_compiler
from tests.conftest import Train


def passed_through(backbone: Backbone) -> list[int]:
    """Return the indices of the blocks that one pass runs."""
    seen: list[int] = []
    hooks = [
        block.register_forward_hook(lambda *_, number=number: seen.append(number))
        for number, block in enumerate(backbone.blocks)
    ]
    backbone.logits(torch.tensor([[1, 2, 3]]))
    for hook in hooks:
        hook.remove()
    return seen


def test_layers_are_dropped_in_training_only() -> None:
    torch.manual_seed(0)
    backbone = Backbone(ModelShape(8, 1, 8, 16, 20))
    names = list(backbone.state_dict())
    backbone.drop_layers(0.25)
    assert list(backbone.state_dict()) == names
    passes = [passed_through(backbone) for _ in range(200)]
    assert sum(map(len, passes)) / 200 == pytest.approx(6, abs=0.3)
    assert all(numbers == sorted(numbers) for numbers in passes)
    assert len({tuple(numbers) for numbers in passes}) > 50
    assert passed_through(backbone.eval()) == list(range(8))


def test_resumed_run_with_layer_drop_equals_unbroken_run(train_here: Train, tiny: list[str], tmp_path: Path) -> None:
    """The run also differs from one without layer drop."""
    keys = (*tiny, "layer_drop=0.5", "steps=12", "checkpoint_every=6", "validate_every=6", "seed=1", "log_every=1")
    assert train_here(*keys, "run_dir=unbroken").code == 0
    assert train_here(*keys, "run_dir=stopped").code == 0
    (tmp_path / "stopped" / "checkpoints" / "step-000012.ckpt").unlink()
    assert train_here("resume=stopped").code == 0
    assert train_here(*keys, "layer_drop=0", "run_dir=whole").code == 0
    runs = ("unbroken", "stopped", "whole")
    unbroken, stopped, whole = (load_file(tmp_path / run / "hf" / "model.safetensors") for run in runs)
    assert all(torch.equal(tensor, stopped[name]) for name, tensor in unbroken.items())
    assert not all(torch.equal(tensor, whole[name]) for name, tensor in unbroken.items())


@pytest.mark.slow
def test_two_ranks_train_with_dropped_layers(train_process: Train, tiny: list[str], tmp_path: Path) -> None:
    ended = train_process(*tiny, "layer_drop=0.5", "steps=12", "validate_every=6", "devices=2", "run_dir=run")
    assert ended.code == 0, ended.stderr
    losses = [float(row["val/loss"]) for row in read_metrics(tmp_path / "run") if row.get("val/loss")]
    assert losses[-1] < losses[0]
    refused = train_process(*tiny, "layer_drop=0.5", "devices=2", "strategy=fsdp", "run_dir=sharded")
    assert refused.code == 2
    assert "use strategy=ddp" in refused.stderr


@pytest.mark.slow
def test_pass_compiled_as_one_graph_is_equal_with_every_mask() -> None:
    """One graph without a break for each kind of mask, in training only; gradients are those of the eager pass."""
    torch.manual_seed(0)
    plain = Backbone(ModelShape(2, 2, 32, 16, 20))
    compiled = copy.deepcopy(plain)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled.compile_pass()
    ids = torch.randint(20, (3, 16))
    starts = torch.zeros(3, 16, dtype=torch.bool)
    starts[:, [0, 5]] = True
    for spans in (None, make_spans(*document_bounds(starts), 3)):
        logits = [backbone.logits(ids, spans) for backbone in (plain, compiled)]
        torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-6)
        for result in logits:
            result.square().mean().backward()
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        assert torch.equal(plain.logits(ids[:2]), compiled.logits(ids[:2]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="compiling needs a C++ compiler and Python.h")
def test_student_and_teacher_compile_for_any_length(tmp_path: Path) -> None:
    """Their blocks are one function to the compiler, which gives up after eight graphs."""
    torch.manual_seed(0)
    to_hf(Backbone(ModelShape(3, 4, 64, n_positions=64, vocab_size=100))).save_pretrained(tmp_path)
    plain, teacher = OnlineTeacher(str(tmp_path)), OnlineTeacher(str(tmp_path))
    student = Backbone(ModelShape(2, 2, 32, n_positions=64, vocab_size=100))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    teacher.backbone.compile_blocks()
    teacher.signal(torch.zeros(1, 8, dtype=torch.int64))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    student.compile_blocks()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for training, length in itertools.product((True, False), (16, 24, 32, 40, 48, 56)):
            ids = torch.randint(100, (2 + length // 24, length))
            expected = plain.signal(ids)
            torch.testing.assert_close(teacher.signal(ids).hidden, expected.hidden, rtol=1e-4, atol=1e-4)
            with torch.set_grad_enabled(training):
                total = student.train(training).logits(ids).sum()
            if training:
                total.backward()


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="compiling needs a C++ compiler and Python.h")
@pytest.mark.parametrize("more", [(), ("activation_checkpointing=true",)], ids=["pass", "blocks"])
def test_compiled_losses_of_two_ranks_equal_eager_ones(
    more: tuple[str, ...], train_process: Train, tiny: list[str], tmp_path: Path
) -> None:
    """DDP splits compiled graphs at the ends of its buckets, so fp32 sums have another order."""
    keys = [*tiny, *more, "devices=2", "strategy=ddp", "steps=8", "validate_every=4", "log_every=1", "optimizer=adamw"]
    found = {}
    for compiles in ("true", "false"):
        ended = train_process(*keys, f"compile={compiles}", f"run_dir={compiles}")
        assert ended.code == 0, ended.stderr
        assert "nothing is compiled" not in ended.stderr
        rows = read_metrics(tmp_path / compiles)
        found[compiles] = [float(row[name]) for row in rows for name in ("train/loss", "val/loss") if row.get(name)]
    assert len(found["true"]) == 8 + 2
    assert found["true"] == pytest.approx(found["false"], abs=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        ("objective=clm", "batch_sequences=2", "micro_batch=1"),
        ("objective=prefix_lm", "batch_sequences=2", "micro_batch=1"),
        ("objective=clm", "batch_sequences=4", "micro_batch=4", "packing=true"),
    ],
    ids=["clm", "prefix_lm", "packed"],
)
def test_pairs_of_many_lengths_are_compiled_for_a_few_graphs(
    kind: tuple[str, ...], train_here: Train, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches of 8 to 64 positions; the second length makes the graph dynamic, and it serves the rest.

    PyTorch stops compiling a function after the eighth time, so that frequent recompilation would have a low count.
    """
    letters = Random(0)
    sizes = [(1 + number % 47, 1 + number % 43) for number in range(400)]
    lines = ["\t".join("".join(letters.choices(ascii_lowercase, k=size)) for size in pair) for pair in sizes]
    (tmp_path / "pairs.tsv").write_text("source\ttarget\n" + "\n".join(lines) + "\n")
    keys = [key for key in tiny if not key.startswith(("data=", "path=", "batch_tokens", "context"))]
    keys += [
        "task=finetune",
        "init=scratch",
        "model=nano",
        "data=pairs",
        f"path={tmp_path / 'pairs.tsv'}",
        "context=64",
    ]
    keys += [
        *kind,
        "steps=40",
        "validate_every=40",
        "task.text.examples=0",
        "compile=true",
    ]
    keys += ["task.text.max_new_tokens=8"]
    shapes, forward = set[torch.Size](), Backbone.forward

    def counted(
        backbone: Backbone, ids: torch.Tensor, head: Callable[..., object], spans: torch.Tensor | None = None
    ) -> object:
        if backbone.training:
            shapes.add(ids.shape)
        return forward(backbone, ids, head, spans)

    monkeypatch.setattr(Backbone, "forward", counted)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        ended = train_here(*keys, "run_dir=run")
    assert ended.code == 0, ended.stderr
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert len(shapes) > 6, shapes
    assert 0 < graphs <= 8, (shapes, dict(torch._dynamo.utils.counters["stats"]))
