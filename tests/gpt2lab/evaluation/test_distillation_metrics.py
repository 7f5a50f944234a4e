"""Distillation figures equal their plain twins for all chunks, batches and padding."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2lab import metric_names as names
from gpt2lab.evaluation.distillation_metrics import add_sums, chunk_sums, distillation_sums, figures, gap_closed
from gpt2lab.losses.dense_teacher import DenseTeacher
from gpt2lab.losses.teacher_signal import token_classes, top_tokens

ROWS, WIDTH, TEACHER_WIDTH, VOCABULARY = 53, 24, 40, 211


def example(dtype: torch.dtype, vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor, Tensor, DenseTeacher]:
    """A student that partly resembles its teacher, as in training; every third position has no target."""
    torch.manual_seed(0)
    teacher = DenseTeacher(torch.randn(ROWS, TEACHER_WIDTH), torch.randn(vocabulary, TEACHER_WIDTH) / 3)
    noise = torch.randn(ROWS, vocabulary)
    wanted = teacher.hidden @ teacher.weight.T + noise  # (ROWS, vocabulary) logits of the student
    weight = torch.linalg.svd(wanted, full_matrices=False).Vh[:WIDTH].T  # (vocabulary, WIDTH)
    hidden = wanted @ weight
    labels = (teacher.hidden @ teacher.weight.T).softmax(1).multinomial(1).squeeze(1)
    labels[::3] = -100
    return hidden.to(dtype), weight.to(dtype), labels, DenseTeacher(teacher.hidden.to(dtype), teacher.weight.to(dtype))


def twin(logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Compute each figure by its definition from whole logits, position by position."""
    kept = labels != -100
    logits, teacher_logits, labels = logits[kept], teacher_logits[kept], labels[kept]
    log_q, log_p = logits.log_softmax(1), teacher_logits.log_softmax(1)
    q, p = log_q.exp(), log_p.exp()
    shared = [
        len(set(a.tolist()) & set(b.tolist())) / 5
        for a, b in zip(q.topk(5, 1).indices, p.topk(5, 1).indices, strict=True)
    ]
    return {
        names.VAL_LOSS: F.cross_entropy(logits, labels).item(),
        names.DISTILL_TEACHER_LOSS: F.cross_entropy(teacher_logits, labels).item(),
        names.DISTILL_KL: F.kl_div(log_q, p, reduction="batchmean").item(),
        names.DISTILL_REVERSE_KL: F.kl_div(log_p, q, reduction="batchmean").item(),
        names.DISTILL_TVD: ((p - q).clamp_min(0).sum() / len(labels)).item(),
        names.DISTILL_TOP1_AGREEMENT: (q.argmax(1) == p.argmax(1)).double().mean().item(),
        names.DISTILL_TOP5_AGREEMENT: sum(shared) / len(shared),
        names.DISTILL_ENTROPY_STUDENT: torch.distributions.Categorical(probs=q).entropy().mean().item(),
        names.DISTILL_ENTROPY_TEACHER: torch.distributions.Categorical(probs=p).entropy().mean().item(),
        names.DISTILL_ACCEPTANCE: torch.minimum(p, q).sum(1).mean().item(),
        names.DISTILL_ECE: calibration_error(q, labels),
        names.DISTILL_TEACHER_ECE: calibration_error(p, labels),
    }


def whole_sums(log_q: Tensor, log_p: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the sums for a full teacher distribution."""
    return chunk_sums(log_q, labels, top_tokens(log_q), token_classes(log_p, labels, top_tokens(log_p)))


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Bin by bin: |share that was right − mean confidence|, weighted by the share of positions in the bin."""
    confidence, best = probabilities.max(1)
    error = 0.0
    for number in range(15):
        inside = (confidence >= number / 15) & (confidence < (number + 1) / 15)
        if inside.any():
            right = (best == labels)[inside].to(confidence.dtype).mean()
            error += inside.sum().item() / len(labels) * abs((right - confidence[inside].mean()).item())
    return error


def target_count(labels: Tensor) -> int:
    return int((labels != -100).sum())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
@pytest.mark.parametrize("chunk_rows", [1, 7, ROWS, 4096, None])
def test_every_figure_equals_its_twin_for_any_chunk_size(dtype, tolerance, chunk_rows) -> None:
    hidden, weight, labels, teacher = example(dtype)
    found = figures(distillation_sums(hidden, weight, labels, teacher, chunk_rows=chunk_rows), target_count(labels))
    expected = twin(hidden @ weight.T, teacher.hidden @ teacher.weight.T, labels)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, abs=tolerance)
    assert 0.2 < found[names.DISTILL_TOP1_AGREEMENT] < 0.9, "the example decides nothing"
    assert found[names.DISTILL_ECE] > 0.01


def test_the_calibration_error_is_that_of_torchmetrics() -> None:
    from torchmetrics import CalibrationError

    torch.manual_seed(1)
    logits = torch.randn(5000, 12, dtype=torch.float64) * torch.rand(5000, 1, dtype=torch.float64) * 6
    labels = (logits / 2).softmax(1).multinomial(1).squeeze(1)  # an over-confident model
    found = figures(whole_sums(logits.log_softmax(1), logits.log_softmax(1), labels), len(labels))
    expected = CalibrationError(task="multiclass", num_classes=12, n_bins=15, norm="l1")(logits.softmax(1), labels)
    assert expected > 0.1
    assert found[names.DISTILL_ECE] == pytest.approx(expected.item(), abs=1e-6)  # it computes in fp32


def test_a_confidence_of_one_falls_into_the_last_bin() -> None:
    logits = torch.full((4, 6), -1e9)
    logits[:, 2] = 0.0
    found = figures(whole_sums(logits.log_softmax(1), logits.log_softmax(1), torch.tensor([2, 2, 2, 0])), 4)
    assert found[names.DISTILL_ECE] == 0.25


def test_sums_of_two_halves_add_up_to_the_whole() -> None:
    hidden, weight, labels, teacher = example(torch.float64)
    whole = distillation_sums(hidden, weight, labels, teacher)
    halves = [
        distillation_sums(hidden[part], weight, labels[part], DenseTeacher(teacher.hidden[part], teacher.weight))
        for part in (slice(0, 20), slice(20, None))
    ]
    together = add_sums(*halves)
    assert together.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(together[name], value)


def test_student_equal_to_its_teacher_has_zero_divergence() -> None:
    _, _, labels, teacher = example(torch.float32)
    found = figures(distillation_sums(teacher.hidden, teacher.weight, labels, teacher), target_count(labels))
    assert found[names.DISTILL_KL] == found[names.DISTILL_REVERSE_KL] == found[names.DISTILL_TVD] == 0
    assert found[names.DISTILL_ACCEPTANCE] == 1
    assert found[names.DISTILL_TOP1_AGREEMENT] == found[names.DISTILL_TOP5_AGREEMENT] == 1
    assert found[names.DISTILL_ENTROPY_STUDENT] == found[names.DISTILL_ENTROPY_TEACHER]
    assert gap_closed(4.0, found[names.VAL_LOSS], found[names.DISTILL_TEACHER_LOSS]) in (None, 1)


def test_gap_closed_is_a_share_or_none_without_a_gap() -> None:
    assert gap_closed(4.1, 3.8, 3.4) == pytest.approx(3 / 7)
    assert gap_closed(4.1, 4.1, 3.4) == 0
    assert gap_closed(4.1, 3.4, 3.4) == 1
    assert gap_closed(4.1, 4.2, 3.4) < 0
    assert gap_closed(3.4, 3.3, 3.4) is None
    assert gap_closed(3.3, 3.3, 3.4) is None


@pytest.mark.parametrize("padded", ["student", "teacher", "both"])
def test_padding_of_either_vocabulary_has_no_probability(padded) -> None:
    hidden, weight, labels, teacher = example(torch.float64)
    expected = figures(distillation_sums(hidden, weight, labels, teacher), target_count(labels))
    if padded in ("student", "both"):
        weight = torch.cat([weight, torch.zeros(13, WIDTH)])  # logits of 0: they would have a real probability
    if padded in ("teacher", "both"):
        teacher = DenseTeacher(teacher.hidden, torch.cat([teacher.weight, torch.zeros(5, TEACHER_WIDTH)]))
    vocab_size = VOCABULARY if padded == "both" else None
    found = distillation_sums(hidden, weight, labels, teacher, vocab_size=vocab_size)
    assert figures(found, target_count(labels)) == pytest.approx(expected, abs=1e-12)


def test_zero_teacher_probabilities_give_no_nan() -> None:
    log_q = torch.tensor([[0.5, 0.3, 0.1, 0.1, 1e-9, 1e-9]]).log()
    log_p = torch.tensor([[0.6, 0.4, 0.0, 0.0, 0.0, 0.0]]).log()  # −inf
    sums = whole_sums(log_q, log_p, torch.tensor([0]))
    assert all(value.isfinite().all() for value in sums.values())
    expected = 0.6 * math.log(0.6 / 0.5) + 0.4 * math.log(0.4 / 0.3)
    assert sums[names.DISTILL_KL].item() == pytest.approx(expected, abs=1e-6)
    assert sums[names.DISTILL_TVD].item() == pytest.approx(0.2, abs=1e-6)
    assert sums[names.DISTILL_REVERSE_KL] > 100


def test_without_a_target_the_sums_are_zero_and_give_no_figure() -> None:
    hidden, weight, labels, teacher = example(torch.float32)
    whole = distillation_sums(hidden, weight, labels, teacher)
    none = distillation_sums(hidden, weight, torch.full_like(labels, -100), teacher)
    assert {name: value.shape for name, value in none.items()} == {name: value.shape for name, value in whole.items()}
    assert not any(value.any() for value in none.values())
    with pytest.raises(ValueError, match="no target"):
        figures(none, 0)


def test_positions_that_do_not_match_are_refused() -> None:
    hidden, weight, labels, teacher = example(torch.float32)
    with pytest.raises(ValueError, match="hidden has 53 rows, labels 53, the teacher 52"):
        distillation_sums(hidden, weight, labels, DenseTeacher(teacher.hidden[1:], teacher.weight))


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest result of any operation."""

    size = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.numel())
        return result


def test_no_tensor_is_larger_than_a_chunk_of_logits() -> None:
    hidden, weight, labels, teacher = example(torch.float32)
    uniforms = torch.rand(ROWS, 2)
    with LargestTensor() as largest:
        distillation_sums(hidden, weight, labels, teacher, chunk_rows=9, uniforms=uniforms)
    assert largest.size <= max(9 * VOCABULARY, VOCABULARY * TEACHER_WIDTH, ROWS * TEACHER_WIDTH)
    assert max(VOCABULARY * TEACHER_WIDTH, 9 * VOCABULARY) < ROWS * VOCABULARY, "the example decides nothing"


def test_under_autocast_only_the_matrix_products_lose_precision() -> None:
    hidden, weight, labels, teacher = example(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums = distillation_sums(hidden, weight, labels, teacher)
        itself = distillation_sums(teacher.hidden, teacher.weight, labels, teacher)
    logits = hidden.bfloat16() @ weight.bfloat16().T
    teacher_logits = teacher.hidden.bfloat16() @ teacher.weight.bfloat16().T
    expected = twin(logits.float(), teacher_logits.float(), labels)
    found = figures(sums, target_count(labels))
    coarse = (
        names.DISTILL_TOP1_AGREEMENT,
        names.DISTILL_TOP5_AGREEMENT,
    )  # equal logits in bf16 may be ranked either way
    assert {k: v for k, v in found.items() if k not in coarse} == pytest.approx(
        {k: v for k, v in expected.items() if k not in coarse}, abs=2e-5
    )
    assert itself[names.DISTILL_KL] == 0


@pytest.mark.slow
def test_the_compiled_chunk_gives_the_same() -> None:
    hidden, weight, labels, teacher = example(torch.float32)
    plain = distillation_sums(hidden, weight, labels, teacher, chunk_rows=18)
    compiled = distillation_sums(hidden, weight, labels, teacher, chunk_rows=18, compiled=True)
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-5, atol=1e-5)
