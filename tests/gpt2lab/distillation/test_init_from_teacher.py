"""A student initialized from its teacher has the teacher's weights; a narrower one keeps the most important parts."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gpt2lab.data.batch import IGNORE_INDEX, Batch
from gpt2lab.distillation.init_from_teacher import Importance, keep_strongest, measure_importance, student_from_teacher
from gpt2lab.errors import InputError
from gpt2lab.model.backbone import Backbone, load_backbone
from gpt2lab.model.student_shape import check_fits, kept_layers
from gpt2lab.settings import ModelShape
from gpt2lab.storage.metrics_csv import read_metrics
from gpt2lab.storage.report_json import read_report
from launch.config import run_spec
from tests.conftest import Train

WIDE = ModelShape(n_layer=3, n_head=4, n_embd=32, n_positions=24, vocab_size=50)
NARROW = ModelShape(n_layer=3, n_head=2, n_embd=16, n_positions=24, vocab_size=50)


def random_model(shape: ModelShape, seed: int = 1) -> Backbone:
    """A model with weights so large that every part changes the logits."""
    torch.manual_seed(seed)
    model = Backbone(shape).eval().requires_grad_(False)
    for name, weight in model.lm.named_parameters():
        spread = 1.0 if ".wte" in name or ".wpe" in name else 0.2
        weight.copy_(torch.randn_like(weight) * spread + (1.0 if ".ln_" in name and name.endswith("weight") else 0.0))
    return model


def text(rows: int = 8, length: int = 24, seed: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(50, (rows, length + 1), generator=generator)
    return Batch(ids[:, :-1], ids[:, 1:], rows * length, torch.arange(rows))


def parts(batch: Batch, size: int) -> Iterator[Batch]:
    for start in range(0, len(batch.input_ids), size):
        rows = slice(start, start + size)
        yield Batch(batch.input_ids[rows], batch.labels[rows], batch.target_tokens, batch.indices[rows])


def test_layers_are_evenly_spaced_from_the_first_to_the_last():
    assert kept_layers(12, 6) == [0, 2, 4, 7, 9, 11]
    assert kept_layers(4, 2) == [0, 3]
    assert kept_layers(12, 1) == [0]
    for teacher, student in itertools.product(range(2, 49), range(2, 49)):
        if student <= teacher:
            layers = kept_layers(teacher, student)
            assert (layers[0], layers[-1], len(set(layers))) == (0, teacher - 1, student)
            gaps = {after - before for before, after in itertools.pairwise(layers)}
            assert max(gaps) - min(gaps) <= 1


def test_student_of_equal_width_has_the_teachers_layers():
    teacher = random_model(replace(WIDE, n_layer=5))
    shape = replace(WIDE, n_layer=3, n_positions=10, vocab_size=40)
    student = student_from_teacher(teacher, shape, batches=[])
    ours, theirs = student.lm.state_dict(), teacher.lm.state_dict()
    for name, weight in ours.items():
        if ".h." in name:
            layer = int(name.split(".")[2])
            name = name.replace(f".h.{layer}.", f".h.{(0, 2, 4)[layer]}.")
        assert torch.equal(weight, theirs[name][: len(weight)]), name
    assert student.shape == shape
    with torch.no_grad():
        student.lm.transformer.wte.weight.zero_()
    assert teacher.lm.transformer.wte.weight.any(), "student and teacher share no memory"


def test_a_student_of_the_teachers_shape_has_the_teachers_logits():
    teacher = random_model(WIDE)
    student = student_from_teacher(teacher, WIDE, batches=[]).eval()
    ids = text().input_ids
    assert torch.equal(student.logits(ids), teacher.logits(ids))


def planted(core: Backbone, shape: ModelShape) -> tuple[Backbone, Tensor, list[Tensor], list[Tensor]]:
    """A wider teacher that computes what `core` computes: (teacher, live channels, heads and neurons of each layer).

    Live parts are at random positions; weights that read dead parts are noise. The core's residual stream
    has no mean, so that channels that are zero do not change its layer norms.
    """
    centre_residual_stream(core)
    teacher, small, head = random_model(shape, seed=2), core.shape, shape.n_embd // shape.n_head
    channels = torch.randperm(shape.n_embd)[: small.n_embd].sort().values
    heads = [torch.randperm(shape.n_head)[: small.n_head].sort().values for _ in core.blocks]
    neurons = [torch.randperm(4 * shape.n_embd)[: 4 * small.n_embd].sort().values for _ in core.blocks]

    def put(target: nn.Module, source: nn.Module, rows: Tensor, columns: Tensor) -> None:
        """Rows that no live part writes are zero; so is everything that the noise of a live row reads."""
        live = target.weight[rows]
        live[:, columns] = source.weight
        for weight, values in ((target.weight, live), (target.bias, source.bias)):
            weight.zero_()
            weight[rows] = values

    def put_norm(target: nn.LayerNorm, source: nn.LayerNorm) -> None:
        for weight, values in ((target.weight, source.weight), (target.bias, source.bias)):
            weight.zero_()
            weight[channels] = values
        target.weight.mul_((small.n_embd / shape.n_embd) ** 0.5)  # the zeros lower the deviation

    model = teacher.lm.transformer
    for target, source in ((model.wte, core.lm.transformer.wte), (model.wpe, core.lm.transformer.wpe)):
        target.weight.zero_()
        target.weight[:, channels] = source.weight
    put_norm(model.ln_f, core.lm.transformer.ln_f)
    for layer, (block, source) in enumerate(zip(teacher.blocks, core.blocks, strict=True)):
        of_heads = (heads[layer][:, None] * head + torch.arange(head)).flatten()
        put(
            block.attn.c_attn,
            source.attn.c_attn,
            torch.cat([of_heads + n * shape.n_embd for n in range(3)]),
            channels,
        )
        put(block.attn.c_proj, source.attn.c_proj, channels, of_heads)
        put(block.mlp.c_fc, source.mlp.c_fc, neurons[layer], channels)
        put(block.mlp.c_proj, source.mlp.c_proj, channels, neurons[layer])
        put_norm(block.ln_1, source.ln_1)
        put_norm(block.ln_2, source.ln_2)
    return teacher, channels, heads, neurons


def centre_residual_stream(model: Backbone) -> None:
    """Subtract its mean from everything written into it, which changes no layer norm."""
    for table in (model.lm.transformer.wte, model.lm.transformer.wpe):
        table.weight.sub_(table.weight.mean(1, keepdim=True))
    for block in model.blocks:
        for writer in (block.attn.c_proj, block.mlp.c_proj):
            writer.weight.sub_(writer.weight.mean(0))
            writer.bias.sub_(writer.bias.mean())


def test_narrower_student_keeps_the_live_parts_and_the_logits():
    core = random_model(NARROW)
    teacher, channels, heads, neurons = planted(core, WIDE)
    batch = text()
    kept = keep_strongest(WIDE, NARROW, measure_importance(teacher, [batch]))
    assert torch.equal(kept.channels, channels)
    assert all(torch.equal(ours, live) for ours, live in zip(kept.heads, heads, strict=True))
    assert all(torch.equal(ours, live) for ours, live in zip(kept.neurons, neurons, strict=True))
    student = student_from_teacher(teacher, NARROW, [batch]).eval()
    logits = teacher.logits(batch.input_ids)
    assert (logits - core.logits(batch.input_ids)).abs().max() < 1e-3, "the planted teacher computes the core"
    # Logits of size 10; the epsilon of the layer norms has more weight in the teacher, where deviations are smaller.
    assert (student.logits(batch.input_ids) - logits).abs().max() < 1e-3


def test_dropping_a_large_channel_keeps_the_others():
    """GPT-2 has such channels: large in the residual stream, here from block 2 on, and zeroed by the norms' gains."""
    teacher, shape = random_model(WIDE), replace(NARROW, n_layer=2)
    teacher.blocks[1].mlp.c_proj.bias[5] = 60.0
    for module in teacher.lm.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight[5], module.bias[5] = 0.0, 0.0
    batch = text()
    channels = keep_strongest(WIDE, shape, measure_importance(teacher, [batch])).channels
    assert 5 not in channels
    student = student_from_teacher(teacher, shape, [batch]).eval().requires_grad_(False)
    for layer, original in ((0, 0), (1, 2)):
        theirs = normalized(teacher, original, batch)[..., channels].flatten(0, 1)  # (B · T, Ds)
        ours = normalized(student, layer, batch).flatten(0, 1)  # (B · T, Ds)
        # Their residual streams differ, as the student has no second block; mean and deviation of each channel do not.
        assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.15)
        assert float((ours.mean(0) - theirs.mean(0)).norm() / theirs.std(0).norm()) < 0.7


def normalized(model: Backbone, layer: int, batch: Batch) -> Tensor:
    """Return the output of a block's first layer norm: (B, T, D)."""
    seen: list[Tensor] = []
    handle = model.blocks[layer].ln_1.register_forward_hook(lambda _, __, output: seen.append(output))
    model.logits(batch.input_ids)
    handle.remove()
    return seen[0]


def test_the_choice_does_not_depend_on_how_the_text_is_batched():
    teacher, batch = random_model(WIDE), text()
    first, second = (keep_strongest(WIDE, NARROW, measure_importance(teacher, parts(batch, size))) for size in (8, 3))
    for name in ("heads", "neurons"):
        assert all(torch.equal(a, b) for a, b in zip(vars(first)[name], vars(second)[name], strict=True))
    assert torch.equal(first.channels, second.channels)


def test_of_equally_important_parts_the_first_are_kept():
    same = Importance(torch.ones(32), [torch.ones(4)] * 3, [torch.ones(128)] * 3, {})
    kept = keep_strongest(WIDE, NARROW, same)
    assert kept.channels.tolist() == list(range(16))
    assert kept.heads[0].tolist() == [0, 1]


def test_padding_counts_for_nothing():
    teacher, batch = random_model(WIDE), text(length=16)
    padded = Batch(
        nn.functional.pad(batch.input_ids, (0, 8), value=7),
        nn.functional.pad(batch.labels, (0, 8), value=IGNORE_INDEX),
        batch.target_tokens,
        batch.indices,
    )
    padded.labels[:, :5] = IGNORE_INDEX  # a prompt is text too
    plain, with_padding = measure_importance(teacher, [batch]), measure_importance(teacher, [padded])
    assert torch.allclose(plain.channels, with_padding.channels, rtol=1e-5)
    assert torch.allclose(plain.heads[2], with_padding.heads[2], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_layer": 4}, "model.n_layer=3"),
        ({"n_embd": 64, "n_head": 8}, "model.n_embd=32"),
        ({"n_positions": 48}, "model.n_positions=24"),
        ({"vocab_size": 51}, "vocab_size no larger than the teacher's 50"),
        ({"n_head": 2}, "model.n_embd=32 model.n_head=4"),
        ({"n_embd": 16, "n_head": 4}, "model.n_embd=16 model.n_head=2"),
        ({"n_embd": 4, "n_head": 1}, "model.n_embd=8 model.n_head=1"),
    ],
)
def test_student_that_does_not_fit_into_its_teacher_is_refused(change: dict[str, int], words: str):
    with pytest.raises(InputError, match=words):
        check_fits(WIDE, replace(WIDE, **change))


# Through train.py

STUDENT = ("task=distill", "init=teacher_layers", "teacher=teacher", "preflight=warn")


@pytest.fixture
def with_teacher(train_here: Train, tiny: list[str]) -> list[str]:
    """Train a teacher in ./teacher; return the overrides of a student half as wide with two of its three layers."""
    wide = [key for key in tiny if not key.startswith(("model.n_layer", "model.n_head", "model.n_embd"))]
    wide += ["model.n_layer=3", "model.n_head=4", "model.n_embd=64"]
    assert train_here(*wide, "steps=12", "run_dir=teacher").code == 0
    return [*tiny, *STUDENT]


STILL = ("steps=1", "optimizer=adam", "optimizer.lr=1e-30")  # a step that changes no weight


def test_train_py_starts_from_whole_layers(train_here: Train, with_teacher: list[str], tmp_path: Path):
    wide = [key for key in with_teacher if not key.startswith(("model.n_head", "model.n_embd"))]
    answer = train_here(*wide, "model.n_head=4", "model.n_embd=64", *STILL, "run_dir=student")
    assert answer.code == 0, answer.stderr
    assert "init: the teacher's layers 0, 2 (of 0 to 2)" in answer.stderr
    kept = {"kind": "copied", "layers": [0, 2], "of_layers": 3, "channels": 64, "of_channels": 64}
    assert read_report(tmp_path / "student")["init"] == {"source": "teacher_layers", **kept}
    assert run_spec.load(tmp_path / "student" / "config.yaml").resolved.teacher_layers == kept
    ours, theirs = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("student", "teacher"))
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name.replace(".h.1.", ".h.2.")]), name


def test_train_py_prunes_the_teacher_once_and_not_on_resume(
    train_here: Train, with_teacher: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    answer = train_here(*with_teacher, *STILL, "run_dir=student")
    assert answer.code == 0, answer.stderr
    assert "32 of 64 channels" in answer.stderr
    embeddings = load_backbone(str(tmp_path / "teacher")).lm.transformer.wte.weight  # (V, 64)
    ours = load_file(tmp_path / "student" / "hf" / "model.safetensors")["transformer.wte.weight"]  # (V, 32)
    places = [(embeddings == column[:, None]).all(0).nonzero().flatten().tolist() for column in ours.T]
    assert [len(place) for place in places] == [1] * 32
    assert places == sorted(places)

    def cut_again(*_: object) -> None:
        raise AssertionError("the weights are in the checkpoint")

    monkeypatch.setattr("lightning_modules.distill.student_from_teacher", cut_again)
    answer = train_here("resume=student", "steps=3")
    assert answer.code == 0, answer.stderr
    assert read_report(tmp_path / "student")["steps"] == 3
    assert read_report(tmp_path / "student")["init"]["layers"] == [0, 2]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_every_rank_starts_from_the_same_pruned_student(
    strategy: str, with_teacher: list[str], train_process: Train, tmp_path: Path
):
    keys = [*with_teacher, "steps=4", "log_every=1", "validate_every=2", "micro_batch=2", "optimizer=adamw"]
    for name, machine in (("one", ["devices=1"]), ("two", ["devices=2", f"strategy={strategy}"])):
        answer = train_process(*keys, *machine, f"run_dir={name}")
        assert answer.code == 0, answer.stderr
    one, two = (
        [float(row[key]) for row in read_metrics(tmp_path / name) for key in ("train/loss", "val/loss") if row.get(key)]
        for name in ("one", "two")
    )
    assert two == pytest.approx(one, abs=2e-5)
    answer = train_process("resume=two", "steps=6")
    assert answer.code == 0, answer.stderr
    assert "preflight" not in answer.stderr
    report = read_report(tmp_path / "two")
    assert (report["steps"], report["init"]["layers"]) == (6, [0, 2])
    assert report["teacher"]["val_loss"] is not None
    assert report["val_loss"] < one[-1]
