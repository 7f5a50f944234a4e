"""Text that student or teacher write: drawn from the model, the same on any layout, counted once it is there."""

import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2lab.data.batch import IGNORE_INDEX, Batch
from gpt2lab.distillation.generation_batches import GeneratedSequence, TextGenerator, collate
from gpt2lab.distillation.on_policy import BUFFER, DATA, STUDENT, ReplayBuffer, TextChoice
from gpt2lab.generation.sampling import RowwiseSampling
from gpt2lab.model.backbone import Backbone
from gpt2lab.settings import ModelShape, SequenceSettings
from gpt2lab.storage.metrics_csv import read_metrics
from lightning_modules.distill import Distill
from tests.conftest import Distil, Train

ENTRIES, END = 50, 0
WRITER = TextGenerator(context=16, max_new_tokens=6, temperature=1.0, end_of_text=END, vocab_size=ENTRIES, seed=3)


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    """Random weights large enough that the next token depends on those before; ten entries are padding."""
    torch.manual_seed(0)
    lm = Backbone(ModelShape(n_layer=2, n_head=2, n_embd=16, n_positions=16, vocab_size=ENTRIES + 10)).lm.eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(5)
    return lm


def pairs() -> Batch:
    """Prompts of 2, 5, 9 and 12 tokens, the last longer than there is room for."""
    ids = torch.arange(1, 17).repeat(4, 1) + torch.arange(4)[:, None]
    return Batch(ids, torch.full_like(ids, IGNORE_INDEX), 0, torch.tensor([7, 3, 11, 5]), torch.tensor([2, 5, 9, 12]))


def test_row_is_sampled_from_its_own_distribution() -> None:
    """Chi-square with 7 degrees of freedom: 24.3 is exceeded once in a thousand times."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 0.2, 1.5])
    count, temperature = 20_000, 0.7
    noisy = RowwiseSampling(range(count), torch.device("cpu"))
    drawn = noisy(torch.empty(0), (logits / temperature).expand(count, -1)).argmax(1).bincount(minlength=8)
    expected = (logits / temperature).softmax(0) * count
    assert float(((drawn - expected) ** 2 / expected).sum()) < 24.3


def test_generated_text_does_not_depend_on_its_batch(model) -> None:
    batch = pairs()
    together = WRITER.generate(model, batch, step=4)
    for row, expected in enumerate(together):
        part = slice(row, row + 1)
        lengths = batch.prompt_lengths[part]
        alone = Batch(batch.input_ids[part], batch.labels[part], 0, batch.indices[part], lengths)
        assert WRITER.generate(model, alone, step=4) == [expected]
    assert WRITER.generate(model, batch, step=5) != together


def test_only_tokens_of_the_tokenizer_are_generated(model) -> None:
    generous = TextGenerator(16, 6, 20.0, END, ENTRIES, seed=1)
    texts = [one.text for step in range(20) for one in generous.generate(model, pairs(), step)]
    assert max(max(text) for text in texts) < ENTRIES
    everything = TextGenerator(16, 6, 20.0, END, ENTRIES + 10, seed=1)
    assert any(max(one.text) >= ENTRIES for step in range(20) for one in everything.generate(model, pairs(), step))


def test_targets_are_the_text_after_the_prompt_and_its_end(model) -> None:
    written = [GeneratedSequence(4, [5, 6, 7], [8, END]), GeneratedSequence(9, [1], [2, 3, 4, 5, 6, 7])]
    batch = collate(written, 8, WRITER)
    assert batch.indices.tolist() == [4, 9]
    assert batch.input_ids[0, :4].tolist() == [5, 6, 7, 8]
    for row, one in enumerate(written):
        kept = batch.labels[row] != IGNORE_INDEX
        assert batch.labels[row][kept].tolist() == one.text
        first = int(kept.nonzero()[0])
        assert batch.input_ids[row, : first + 1].tolist() == one.prompt


def test_a_prompt_keeps_its_end_and_a_window_its_beginning() -> None:
    batch = pairs()
    assert WRITER.prompts(batch)[3] == batch.input_ids[3, 2:12].tolist()
    windows = Batch(batch.input_ids, batch.labels, 0, batch.indices)
    assert WRITER.prompts(windows)[0] == batch.input_ids[0, :10].tolist()


# Whose text a step trains on


@pytest.mark.parametrize(("lmbda", "share"), [(0.0, 0.0), (0.3, 0.3), (1.0, 1.0)])
def test_gkd_uses_student_text_in_the_share_lmbda(lmbda: float, share: float) -> None:
    choice = TextChoice(SequenceSettings("gkd", lmbda=lmbda), steps=4000, seed=1)
    sources = [choice.source(step, buffer_is_full=True) for step in range(4000)]
    assert set(sources) <= {DATA, STUDENT}
    assert sources.count(STUDENT) / 4000 == pytest.approx(share, abs=0.025)


def test_distillm_generates_more_as_validation_worsens() -> None:
    choice = TextChoice(SequenceSettings("distillm", threshold_step=0.25, tolerance=0.1), steps=4000, seed=1)

    def shares(steps: range) -> dict[str, float]:
        sources = [choice.source(step, buffer_is_full=True) for step in steps]
        return {source: sources.count(source) / len(sources) for source in (DATA, STUDENT, BUFFER)}

    choice.update(3.0)
    choice.update(3.05)  # not by the tolerance
    assert shares(range(4000))[DATA] == 1
    choice.update(3.1)
    assert choice.threshold == 0.25
    choice.update(3.15)  # compared with 3.1, where it grew, not with the best
    assert choice.threshold == 0.25
    choice.update(3.3)
    early, late = shares(range(1000)), shares(range(3000, 4000))
    assert early[STUDENT] + early[BUFFER] == pytest.approx(0.5, abs=0.05)
    assert early[STUDENT] == pytest.approx(0.5 * 0.875, abs=0.05)
    assert late[STUDENT] == pytest.approx(0.5 * 0.125, abs=0.05)
    sources = {choice.source(step, buffer_is_full=False) for step in range(4000)}
    assert sources == {DATA, STUDENT}  # a buffer is filled before it is drawn from


def test_replay_buffer_drops_the_oldest_and_samples_distinct() -> None:
    buffer = ReplayBuffer(5, seed=1)
    buffer.add([GeneratedSequence(number, [number], [number]) for number in range(8)])
    assert buffer.is_full
    draws = [[one.sample for one in buffer.sample(3, step)] for step in range(50)]
    assert all(len(set(drawn)) == 3 for drawn in draws)
    assert {sample for drawn in draws for sample in drawn} == {3, 4, 5, 6, 7}
    again = ReplayBuffer(5, seed=1)
    again.load(buffer.state())
    assert [[one.sample for one in again.sample(3, step)] for step in range(50)] == draws


# Through train.py

WRITES = ("sequences.max_new_tokens=8", "optimizer=adamw", "optimizer.lr=1e-3", "log_every=1")
ON_POLICY = ("sequences=gkd", "sequences.lmbda=1", *WRITES)
# The threshold grows at every validation
REPLAY = ("sequences=distillm", "sequences.tolerance=-100", "sequences.threshold_step=1", "sequences.capacity=16")
REPLAY += (*WRITES, "validate_every=2")


def weights(run: Path) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in load_file(run / "hf" / "model.safetensors").values()])


def test_step_is_divided_by_the_targets_of_all_micro_batches(distil: Distil, tmp_path: Path) -> None:
    """Eight sequences at once or two at a time: the same text, the same count, the same weights."""
    for run, micro_batch in (("whole", 8), ("parts", 2)):
        distil(*ON_POLICY, f"micro_batch={micro_batch}", f"run_dir={run}")
    whole, parts = (read_metrics(tmp_path / run) for run in ("whole", "parts"))
    counts = [float(row["tokens"]) for row in whole if row.get("tokens")]
    assert [float(row["tokens"]) for row in parts if row.get("tokens")] == counts
    assert 0 < counts[0] <= 8 * 8  # of the written text, where the data would have 8 · 32
    torch.testing.assert_close(weights(tmp_path / "parts"), weights(tmp_path / "whole"), rtol=0, atol=2e-6)


def test_student_text_is_not_a_label(distil: Distil, tmp_path: Path) -> None:
    distil(*ON_POLICY, "loss.hard_weight=0", "run_dir=soft")
    distil(*ON_POLICY, "loss.hard_weight=1", "run_dir=hard")
    assert torch.equal(weights(tmp_path / "soft"), weights(tmp_path / "hard"))
    assert not any(row.get("train/loss") for row in read_metrics(tmp_path / "soft"))


@pytest.mark.parametrize("keys", [ON_POLICY, ("sequences=seqkd", *WRITES)], ids=["gkd", "seqkd"])
def test_text_is_generated_after_prompts_of_pairs(keys: tuple[str, ...], distil: Distil, tmp_path: Path) -> None:
    lines = [f"def f{number}(\tself, value={number * 7})" for number in range(200)]
    (tmp_path / "pairs.tsv").write_text("\n".join(["source\ttarget", *lines]) + "\n")
    pairs = ("data=pairs", f"path={tmp_path / 'pairs.tsv'}", "batch_sequences=8", "tokenizer=auto", "preflight=warn")
    distil(*keys, *pairs, "run_dir=pairs", without=("batch_tokens", "vocab_size"))
    counts = [float(row["tokens"]) for row in read_metrics(tmp_path / "pairs") if row.get("tokens")]
    assert len(counts) == 4
    assert counts[0] <= 8 * 8


def test_generation_and_loss_have_separate_temperatures(distil: Distil, tmp_path: Path, monkeypatch) -> None:
    texts: list[list[int]] = []
    original = TextGenerator.generate

    def listening(writer: TextGenerator, *arguments: object) -> list[GeneratedSequence]:
        written = original(writer, *arguments)
        texts[-1] += [token for one in written for token in one.text]
        return written

    monkeypatch.setattr(TextGenerator, "generate", listening)
    runs = {"plain": (), "loss": ("loss.temperature=2",), "writing": ("sequences.gen_temperature=0.5",)}
    for run, keys in runs.items():
        texts.append([])
        distil(*ON_POLICY, *keys, "steps=1", f"run_dir={run}")
    plain, loss, writing = texts
    assert plain == loss
    assert plain != writing
    assert not torch.equal(weights(tmp_path / "plain"), weights(tmp_path / "loss"))


@pytest.mark.parametrize("keys", [ON_POLICY, REPLAY], ids=["gkd", "distillm"])
def test_resume_repeats_student_text_and_replay_buffer(
    keys: tuple[str, ...], distil: Distil, train_here: Train, tmp_path: Path
) -> None:
    every = ("steps=16", "checkpoint_every=8", "micro_batch=4")
    distil(*keys, *every, "run_dir=unbroken")
    shutil.copytree(tmp_path / "unbroken", tmp_path / "broken")
    (tmp_path / "broken" / "checkpoints" / "step-000016.ckpt").unlink()
    assert train_here("resume=broken").code == 0
    state = torch.load(tmp_path / "broken" / "checkpoints" / "step-000016.ckpt", weights_only=True)["student_text"]
    assert len(state["buffer"]) == (16 if keys == REPLAY else 0)
    assert torch.equal(weights(tmp_path / "unbroken"), weights(tmp_path / "broken"))


def test_resume_at_a_validated_step_uses_its_validation_loss(
    distil: Distil, train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = (*REPLAY, "steps=8")
    distil(*keys, "run_dir=unbroken")
    with monkeypatch.context() as patch:

        def stopping(self: Distill) -> None:
            if self.trainer.global_step == 3:  # as step 4 ends, which Lightning counts after this
                os.kill(os.getpid(), signal.SIGUSR1)

        patch.setattr(Distill, "after_step", stopping)
        distil(*keys, "run_dir=stopped", code=75)
    assert train_here("resume=stopped").code == 0
    assert torch.equal(weights(tmp_path / "unbroken"), weights(tmp_path / "stopped"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("keys", [ON_POLICY, REPLAY], ids=["gkd", "distillm"])
def test_two_ranks_generate_the_text_of_one(
    keys: tuple[str, ...], strategy: str, distil: Distil, tmp_path: Path
) -> None:
    distil(*keys, "steps=12", "micro_batch=2", "run_dir=one")
    distil(*keys, "steps=12", "micro_batch=2", "devices=2", f"strategy={strategy}", "run_dir=two")
    one, two = (
        [float(row[name]) for row in read_metrics(tmp_path / run) for name in ("tokens", "val/loss") if row.get(name)]
        for run in ("one", "two")
    )
    assert two == pytest.approx(one, rel=1e-4)


def test_teacher_text_is_cached_for_every_student(
    distil: Distil, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ("sequences=seqkd", "sequences.gen_temperature=0", *WRITES)
    first = distil(*keys, "steps=2", "run_dir=first")
    assert sequences_written(first.stderr) == 16
    assert sequences_written(distil(*keys, "steps=5", "run_dir=longer").stderr) == 24
    monkeypatch.setattr("launch.run.generate_teacher_text.working_teacher", None)  # nobody may ask it now
    again = distil(*keys, "steps=5", "seed=1", "optimizer.lr=5e-4", "run_dir=other")
    assert sequences_written(again.stderr) == 0
    (folder,) = (tmp_path / "cache" / "teacher_texts").glob("*/")
    lengths = np.fromfile(folder / "lengths.bin", "<i4")
    ids = np.fromfile(folder / "ids.bin", "<u2").reshape(len(lengths), 8)
    assert (lengths > 0).sum() == 40
    teacher = GPT2LMHeadModel.from_pretrained(tmp_path / "teacher" / "hf").eval()
    assert isinstance(teacher.config, GPT2Config)
    tokens = np.fromfile(next((tmp_path / "cache" / "tokens").glob("*/train.bin")), "<u2").astype(np.int64)
    for sample in np.flatnonzero(lengths)[:3]:
        prompt = torch.from_numpy(tokens[sample * 32 : sample * 32 + 24])
        likeliest = teacher.generate(prompt[None], max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 24:]
        assert ids[sample, : lengths[sample]].tolist() == likeliest[: lengths[sample]].tolist()


def test_teacher_cache_can_hold_logits_of_teacher_text(distil: Distil, tmp_path: Path) -> None:
    keys = ("sequences=seqkd", *WRITES)
    distil(*keys, "run_dir=online")
    cached = ("teacher_cache=topk", "teacher_cache.k=300", "teacher_cache.dtype=float32")
    distil(*keys, *cached, "run_dir=cached")
    torch.testing.assert_close(weights(tmp_path / "cached"), weights(tmp_path / "online"), rtol=0, atol=1e-5)


def test_cached_teacher_text_is_kept_when_more_is_generated(distil: Distil) -> None:
    keys = ("sequences=seqkd", "teacher_cache=topk", *WRITES)
    distil(*keys, "steps=2", "run_dir=first")
    longer = distil(*keys, "steps=5", "run_dir=longer").stderr
    assert sequences_written(longer) == 24
    assert sequences_written(longer, "reads") == 24


def sequences_written(stderr: str, does: str = "writes") -> int:
    found = re.search(rf"the teacher {does} (\d+) sequences", stderr)
    return int(found.group(1)) if found else 0
