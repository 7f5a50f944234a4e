"""Universal logit distillation: loss and gradient equal a plain twin; positions are paired if their bytes agree."""

import inspect
import json
import re
import textwrap

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from gpt2lab.data.batch import IGNORE_INDEX, Batch
from gpt2lab.data.token_bytes import spell_tokens
from gpt2lab.data.tokenizer import TextEncoder, train_bpe
from gpt2lab.distillation.tokenizer_alignment import Alignment
from gpt2lab.errors import InputError
from gpt2lab.losses import sorted_l1 as sorted_difference_module
from gpt2lab.losses.aligned_teacher import AlignedTeacher, AlignedText
from gpt2lab.losses.divergences import Distribution, universal_logit_distance
from gpt2lab.losses.lm_head_loss import lm_head_loss
from gpt2lab.settings import CrossEntropySettings, LossSettings
from tests.conftest import in_words
from tests.gpt2lab.losses.test_lm_head_loss import assert_gradients_close

ROWS, PLACES, WIDTH, TEACHER_WIDTH = 23, 17, 16, 24
MIXES = [
    LossSettings("uld", scale_t2=False, hard_weight=0.5),
    LossSettings("uld", scale_t2=False, hard_weight=0.0),
    LossSettings("uld", temperature=2.0, scale_t2=True, hard_weight=0.3),
    LossSettings("uld", temperature=0.5, scale_t2=False, hard_weight=0.3),
]
VOCABULARIES = {"larger teacher": (61, 101), "smaller teacher": (101, 61), "equal sizes": (80, 80)}


def example(dtype: torch.dtype, entries: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, AlignedTeacher]:
    """Every third position has no partner, every fourth no target."""
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True)
    weight = (torch.randn(entries[0], WIDTH, dtype=dtype) / WIDTH**0.5).requires_grad_()
    labels = torch.randint(0, entries[0], (ROWS,))
    labels[::4] = IGNORE_INDEX
    places = torch.randint(0, PLACES, (ROWS,))
    places[::3] = -1
    text = AlignedText(torch.zeros(1, PLACES, dtype=torch.int64), torch.zeros(PLACES), places, 0, 0)
    of_teacher = torch.randn(PLACES, TEACHER_WIDTH, dtype=dtype)
    return (
        hidden,
        weight,
        labels,
        AlignedTeacher(of_teacher, torch.randn(entries[1], TEACHER_WIDTH).to(dtype) / 4, places, text),
    )


def distance_twin(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Compute the distance as in the paper: sort both, pad the shorter, sum the differences."""
    q, p = (
        logits.softmax(-1).sort(-1, descending=True).values,
        teacher_logits.softmax(-1).sort(-1, descending=True).values,
    )
    longer = max(q.shape[1], p.shape[1])
    return (F.pad(q, (0, longer - q.shape[1])) - F.pad(p, (0, longer - p.shape[1]))).abs().sum(-1)


def twin(hidden: Tensor, weight: Tensor, labels: Tensor, teacher: AlignedTeacher, mix: LossSettings) -> Tensor:
    logits = hidden @ weight.T
    matched = (labels != IGNORE_INDEX) & (teacher.teacher_positions >= 0)
    theirs = teacher.hidden[teacher.teacher_positions[matched]] @ teacher.weight.T
    soft = distance_twin(logits[matched] / mix.temperature, theirs / mix.temperature).sum()
    scale = mix.temperature**2 if mix.scale_t2 else 1.0
    return mix.hard_weight * F.cross_entropy(logits, labels, reduction="sum") + (1 - mix.hard_weight) * scale * soft


@pytest.mark.parametrize("entries", VOCABULARIES.values(), ids=VOCABULARIES)
@pytest.mark.parametrize("chunk_rows", [1, 7, 4096])
@pytest.mark.parametrize("mix", MIXES, ids=in_words)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_value_and_gradients_equal_the_plain_twin(entries, chunk_rows, mix, dtype, tolerance) -> None:
    hidden, weight, labels, teacher = example(dtype, entries)
    result = lm_head_loss(hidden, weight, labels, teacher=teacher, loss=mix, chunk_rows=chunk_rows)
    expected = twin(hidden, weight, labels, teacher, mix)
    torch.testing.assert_close(result.total, expected, rtol=tolerance, atol=tolerance)
    assert_gradients_close(result.total, expected, (hidden, weight), tolerance)
    assert result.tokens == (labels != IGNORE_INDEX).sum()


@pytest.mark.parametrize("entries", [(9, 13), (13, 9)])
@pytest.mark.parametrize("mix", MIXES, ids=in_words)
def test_gradcheck_in_double_precision(entries, mix) -> None:
    hidden, weight, labels, teacher = example(torch.float64, entries)
    of = (hidden.detach()[:6, :4].requires_grad_(), weight.detach()[:, :4].clone().requires_grad_())
    teacher = AlignedTeacher(teacher.hidden, teacher.weight, teacher.teacher_positions[:6], teacher.text)
    given = {"teacher": teacher, "loss": mix, "hard": CrossEntropySettings(0.1, 1e-2), "chunk_rows": 2}
    assert torch.autograd.gradcheck(lambda h, w: lm_head_loss(h, w, labels[:6], **given).total, of)


@pytest.mark.parametrize("entries", VOCABULARIES.values(), ids=VOCABULARIES)
def test_sorting_on_a_gpu_and_on_a_cpu_gives_the_same(entries) -> None:
    torch.manual_seed(1)
    q, p = torch.randn(40, entries[0]).softmax(1), torch.randn(40, entries[1]).softmax(1)
    matched = torch.rand(40) < 0.6
    ours = sorted_difference_module._by_numpy(q, p, matched)
    theirs = sorted_difference_module._by_torch(q, p, matched)
    torch.testing.assert_close(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert not ours[0][~matched].any()
    assert not ours[1][~matched].any()


def distribution(probabilities: Tensor) -> Distribution:
    return Distribution(probabilities.log(), probabilities, torch.ones(len(probabilities), 1).to(probabilities))


def test_equal_sorted_probabilities_have_no_distance() -> None:
    torch.manual_seed(2)
    q = torch.randn(8, 50, dtype=torch.float64).softmax(1)
    padded = F.pad(q, (0, 20))  # tokens of teacher probability 0 count like missing ones
    for p in (q, q[:, torch.randperm(50)], padded[:, torch.randperm(70)]):
        loss, gradient = universal_logit_distance(distribution(p), distribution(q))
        assert not loss.any()
        assert not gradient.any()


def test_with_ties_the_value_is_exact_and_the_gradient_descends() -> None:
    torch.manual_seed(3)
    logits = torch.randint(0, 3, (16, 40)).double()  # most tokens share their probability with others
    teacher_logits = torch.randint(0, 4, (16, 30)).double()
    q, p = logits.softmax(1), teacher_logits.softmax(1)
    loss, gradient = universal_logit_distance(distribution(p), distribution(q))
    torch.testing.assert_close(loss, distance_twin(logits, teacher_logits), rtol=1e-12, atol=1e-12)
    assert gradient.abs().amax(1).min() > 0
    torch.testing.assert_close(gradient.sum(1), torch.zeros(16).double(), rtol=0, atol=1e-12)
    after = distance_twin(logits - 1e-3 * gradient, teacher_logits)
    assert (after < loss).all()


@pytest.mark.parametrize("mix", MIXES, ids=in_words)
def test_without_any_partner_the_soft_term_is_zero(mix) -> None:
    hidden, weight, labels, teacher = example(torch.float32, (61, 101))
    alone = AlignedTeacher(teacher.hidden, teacher.weight, torch.full_like(teacher.teacher_positions, -1), teacher.text)
    result = lm_head_loss(hidden, weight, labels, teacher=alone, loss=mix, chunk_rows=7)
    plain = lm_head_loss(hidden, weight, labels)
    assert result.divergence == 0
    torch.testing.assert_close(result.total, mix.hard_weight * plain.total)
    ours, theirs = (torch.autograd.grad(r.total, (hidden, weight)) for r in (result, plain))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, mix.hard_weight * other, rtol=1e-5, atol=1e-6)


def test_only_padding_of_the_student_is_removed() -> None:
    hidden, weight, labels, teacher = example(torch.float64, (61, 101))
    padded = torch.cat([weight, torch.full((9, WIDTH), 3.0, dtype=torch.float64)])
    ours = lm_head_loss(hidden, padded, labels, teacher=teacher, loss=MIXES[0], vocab_size=61)
    assert torch.equal(ours.total, lm_head_loss(hidden, weight, labels, teacher=teacher, loss=MIXES[0]).total)


def test_bf16_autocast_stays_close() -> None:
    hidden, weight, labels, teacher = example(torch.float32, (61, 101))
    exact = lm_head_loss(hidden, weight, labels, teacher=teacher, loss=MIXES[0])
    with torch.autocast("cpu", torch.bfloat16):
        result = lm_head_loss(hidden, weight, labels, teacher=teacher, loss=MIXES[0], chunk_rows=5)
    assert result.total.dtype == torch.float32
    torch.testing.assert_close(result.total, exact.total, rtol=2e-2, atol=0)


@pytest.mark.slow
def test_the_compiled_chunk_gives_the_same() -> None:
    hidden, weight, labels, teacher = example(torch.float32, (61, 101))
    given = {"teacher": teacher, "loss": MIXES[2], "chunk_rows": 16}
    plain, compiled = (lm_head_loss(hidden, weight, labels, **given, compiled=flag) for flag in (False, True))
    torch.testing.assert_close(plain.total, compiled.total, rtol=1e-5, atol=1e-5)
    assert_gradients_close(plain.total, compiled.total, (hidden, weight), 1e-5)


def test_a_teacher_with_other_tokens_serves_no_other_loss() -> None:
    hidden, weight, labels, teacher = example(torch.float32, (61, 101))
    with pytest.raises(ValueError, match="use loss=uld"):
        lm_head_loss(hidden, weight, labels, teacher=teacher, loss=LossSettings("forward_kl"))


# Alignment

SOURCE = inspect.getsource(json.decoder) + inspect.getsource(textwrap)
MANY_BYTES = "Ein Café in 中文 und naïve 🙂🙃 Straße, déjà vu — Ελλάδα \u0301 \ufb01n.\n" * 3
STUDENT, TEACHER = train_bpe(iter([SOURCE]), 320), train_bpe(iter([SOURCE[::2], SOURCE, MANY_BYTES]), 700)
TOKENS_OF = {"student": spell_tokens(STUDENT, "student"), "teacher": spell_tokens(TEACHER, "teacher")}
END = b"\xff<end>"  # no text contains it


def windows(documents: list[str], context: int, rows: int) -> Batch:
    """Build windows of the student's tokens as in a token file: end-of-text before each document."""
    stream = [number for ids in TextEncoder(STUDENT)(documents) for number in [STUDENT.eos_token_id, *ids]]
    tokens = torch.tensor(stream)
    rows = min(rows, (len(tokens) - 1) // context)
    inputs, labels = tokens[: rows * context], tokens[1 : rows * context + 1]
    return Batch(inputs.view(rows, context), labels.view(rows, context).clone(), rows * context, torch.arange(rows))


def spelled(numbers: list[int], whose: str) -> bytes:
    return b"".join(END if (entry := TOKENS_OF[whose][number]) is None else entry for number in numbers)


def check_against_naive_reference(batch: Batch, text: AlignedText) -> int:
    """Check that each partner is the one position with the same bytes before it; return the number of partners."""
    width = text.input_ids.shape[1]
    labels_of_teacher = text.labels.view(-1, width)
    found = counted_bytes = 0
    for row in range(len(batch.input_ids)):
        theirs = text.input_ids[row].tolist()
        read = [spelled(theirs[: place + 1], "teacher") for place in range(width)]
        known = {what: place for place, what in reversed(list(enumerate(read)))}
        last = (
            int((batch.labels[row] != IGNORE_INDEX).nonzero().max())
            if (batch.labels[row] != IGNORE_INDEX).any()
            else -1
        )
        for position in range(batch.input_ids.shape[1]):
            what = spelled(batch.input_ids[row, : position + 1].tolist(), "student")
            place = int(text.teacher_positions[row * batch.input_ids.shape[1] + position])
            if place >= 0:
                assert position <= last
                assert place // width == row
                assert read[place % width] == what
                found += 1
            elif position <= last:
                assert what not in known, f"row {row}, position {position} has a partner that was not found"
        for place, label in enumerate(labels_of_teacher[row].tolist()):
            if label != IGNORE_INDEX:
                counted_bytes += 1 if TOKENS_OF["teacher"][label] is None else len(TOKENS_OF["teacher"][label])
                if place + 1 < width:
                    assert label == theirs[place + 1]
    assert counted_bytes == text.label_bytes
    assert text.label_bytes <= text.target_bytes
    return found


@pytest.mark.parametrize("context", [7, 16, 33])
def test_partners_have_read_the_same_bytes(context) -> None:
    """Multi-byte characters, documents that end within a window, and windows that begin within a character."""
    batch = windows([MANY_BYTES, SOURCE[:150], "🙂", MANY_BYTES[5:60], SOURCE[150:400]], context, 200)
    begun = [TOKENS_OF["student"][int(row[0])] for row in batch.input_ids]
    assert any(first and first[0] & 0xC0 == 0x80 for first in begun), "no window begins within a character"
    assert (batch.input_ids[:, 1:] == STUDENT.eos_token_id).any()
    text = Alignment(STUDENT, TEACHER, "teacher", 1024)(batch)
    found = check_against_naive_reference(batch, text)
    assert found > 0.3 * batch.labels.numel()
    assert text.label_bytes > 0.8 * text.target_bytes


def test_whole_characters_are_tokenized_as_the_teacher_would() -> None:
    batch = windows([MANY_BYTES], 200, 1)
    text = Alignment(STUDENT, TEACHER, "teacher", 1024)(batch)
    theirs = text.input_ids[0].tolist()
    whole = [TEACHER.eos_token_id, *TextEncoder(TEACHER)([MANY_BYTES])[0]]
    same = next((n for n, (a, b) in enumerate(zip(theirs, whole, strict=False)) if a != b), len(theirs))
    assert same > len(theirs) - 3  # if the window ends within a word, its last tokens may differ


def test_one_tokenizer_pairs_every_position_with_itself() -> None:
    batch = windows([SOURCE[:2000]], 32, 8)
    text = Alignment(STUDENT, STUDENT, "teacher", 1024)(batch)
    # Where a window cuts a word, what is left of it may be tokenized otherwise.
    same = text.teacher_positions.view(8, 32) % text.input_ids.shape[1] == torch.arange(32)
    assert ((text.teacher_positions.view(8, 32) >= 0) & same).float().mean() > 0.9


def test_positions_beyond_the_teachers_have_no_partner() -> None:
    batch = windows([SOURCE[:2000]], 64, 4)
    whole, cut = (Alignment(STUDENT, TEACHER, "teacher", positions)(batch) for positions in (1024, 20))
    assert cut.input_ids.shape == (4, 20)
    assert torch.equal(cut.input_ids, whole.input_ids[:, :20])
    check_against_naive_reference(batch, cut)
    width = whole.input_ids.shape[1]
    kept = (whole.teacher_positions >= 0) & (whole.teacher_positions % width < 20)
    assert torch.equal(cut.teacher_positions >= 0, kept)
    assert cut.target_bytes == whole.target_bytes
    assert 0 < cut.label_bytes < whole.label_bytes


def pairs() -> Batch:
    """Prompts and responses, tokenized apart and padded on the right; only responses have targets."""
    texts = [("def café(", "return 中文"), ("x", "🙂 and a longer response"), ("class Wrapper", "er: pass")]
    encoded = [[TextEncoder(STUDENT)([side])[0] for side in pair] for pair in texts]
    longest = max(len(p) + len(r) for p, r in encoded)
    inputs = torch.full((len(texts), longest), STUDENT.eos_token_id)
    labels = torch.full((len(texts), longest), IGNORE_INDEX)
    for row, (prompt, response) in enumerate(encoded):
        ids = torch.tensor([*prompt, *response, STUDENT.eos_token_id])
        inputs[row, : len(ids) - 1] = ids[:-1]
        labels[row, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
    count = int((labels != IGNORE_INDEX).sum())
    return Batch(inputs, labels, count, torch.arange(len(texts)), torch.tensor([len(p) for p, _ in encoded]))


def test_responses_of_pairs_are_aligned_and_padding_is_not() -> None:
    batch = pairs()
    text = Alignment(STUDENT, TEACHER, "teacher", 1024)(batch)
    check_against_naive_reference(batch, text)
    assert text.label_bytes == text.target_bytes, "the teacher's targets are the responses, byte for byte"
    places = text.teacher_positions.view(batch.input_ids.shape)
    for row, length in enumerate(batch.prompt_lengths.tolist()):
        assert places[row, length - 1] >= 0, "the first token of a response has a partner"
        targets = (batch.labels[row] != IGNORE_INDEX).nonzero().squeeze(1)
        assert batch.labels[row, targets[-1]] == STUDENT.eos_token_id
        assert places[row, targets[-1]] >= 0, "the end of a response has a partner"
        assert (places[row, targets[-1] + 1 :] == -1).all()


def test_labels_may_have_holes_and_rows_none() -> None:
    batch = windows([SOURCE[:800]], 24, 6)
    batch.labels[1, 5:9] = IGNORE_INDEX
    batch.labels[2, 10:] = IGNORE_INDEX
    batch.labels[3] = IGNORE_INDEX
    text = Alignment(STUDENT, TEACHER, "teacher", 1024)(batch)
    check_against_naive_reference(batch, text)
    assert (text.teacher_positions.view(6, 24)[3] == -1).all()
    batch.labels[:] = IGNORE_INDEX
    text = Alignment(STUDENT, TEACHER, "teacher", 1024)(batch)
    assert (text.teacher_positions == -1).all()
    assert text.input_ids.shape == (6, 1)
    assert (text.labels == IGNORE_INDEX).all()
    assert text.label_bytes == text.target_bytes == 0


def test_rank_without_samples_has_no_partners() -> None:
    """The last ranks have one row of ignored labels and no prompts if the validation batches are uneven."""
    batch = pairs()
    none = torch.empty(0, dtype=torch.int64)
    filler = Batch(batch.input_ids[:1], torch.full_like(batch.labels[:1], IGNORE_INDEX), 0, none, none)
    text = Alignment(STUDENT, TEACHER, "teacher", 1024)(filler)
    assert (text.teacher_positions == -1).all()
    assert text.label_bytes == text.target_bytes == 0


def test_literal_end_of_text_ends_no_document() -> None:
    batch = windows(["say <|endoftext|> twice <|endoftext|>", "next"], 12, 4)
    text = Alignment(STUDENT, TEACHER, "teacher", 1024)(batch)
    check_against_naive_reference(batch, text)
    ends = int((batch.input_ids == STUDENT.eos_token_id).sum() + (batch.labels[:, -1] == STUDENT.eos_token_id).sum())
    width = text.input_ids.shape[1]
    last = [
        int((text.labels.view(-1, width)[row] != IGNORE_INDEX).nonzero().max()) + 1 for row in range(len(batch.labels))
    ]
    assert ends == sum(
        int((text.input_ids[row, : last[row]] == TEACHER.eos_token_id).sum()) for row in range(len(last))
    )


def other_tokenizer(normalizer: normalizers.Normalizer | None, prefix_space: bool) -> PreTrainedTokenizerFast:
    made = Tokenizer.from_str(TEACHER.backend_tokenizer.to_str())
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")


def test_tokenizers_that_are_not_byte_level_are_refused() -> None:
    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "w": 1}, unk_token="<|endoftext|>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    bad = [
        PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>"),
        other_tokenizer(normalizers.NFC(), False),
        other_tokenizer(normalizers.Lowercase(), False),
        other_tokenizer(None, True),
    ]
    for tokenizer in bad:
        with pytest.raises(InputError, match="do not concatenate to the bytes of a text"):
            Alignment(STUDENT, tokenizer, "the teacher", 64)
    spell_tokens(other_tokenizer(None, False), "the teacher")


def test_every_token_has_its_bytes() -> None:
    for tokenizer in (STUDENT, TEACHER):
        entries = spell_tokens(tokenizer, "")
        assert entries[tokenizer.eos_token_id] is None
        for text in (SOURCE[:3000], MANY_BYTES, re.sub(r"\s", "", MANY_BYTES)):
            assert b"".join(entries[number] for number in TextEncoder(tokenizer)([text])[0]) == text.encode()
