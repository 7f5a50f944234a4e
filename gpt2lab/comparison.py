"""Comparison: a student scored beside its teacher, and a baseline where there is one, on the same targets in one pass.

Shapes: B sequences, T positions, N = B·T, D hidden width, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2lab import metric_names
from gpt2lab.acceptance import Speculation, cost_ratio, speculation
from gpt2lab.backbone import Backbone
from gpt2lab.batch import Batch
from gpt2lab.distillation_metrics import Sums, added, distillation_sums, figures, gap_closed
from gpt2lab.evaluation import Score, nats_of, score_of_sum, targets_of
from gpt2lab.lm_head_loss import DenseTeacher


@dataclass(frozen=True)
class Comparison:
    """What is known of a student and its teacher.

    Attributes:
        student, teacher, baseline: each model's own score.
        figures: the distill/… figures by metric name; distill/gap_closed where a baseline is worse than the teacher.
        speculation: acceptance as measured, and the speed-up it implies.
        entries: how many of the vocabulary counted: as many as the tokenizer has.
        is_cut: whether a head has more, as padding to a round number.
    """

    student: Score
    teacher: Score
    baseline: Score | None
    figures: dict[str, float]
    speculation: Speculation
    entries: int
    is_cut: bool


@torch.no_grad()
def compare(
    student: Backbone,
    teacher: Backbone,
    batches: Iterable[Batch],
    token_bytes: Tensor,
    *,
    baseline: Backbone | None = None,
    device: torch.device,
    context: int,
    seed: int,
    autocast: torch.dtype | None = None,
) -> Comparison:
    """Score every target of the batches once with each model.

    Args:
        student, teacher, baseline: moved to `device` and put in evaluation mode.
        token_bytes: (V,) bytes of each token, from `bytes_of_tokens`; longer heads are cut to these entries.
        context: tokens at which the cost of a decoding step is counted.
        seed: of the drafts that are drawn.
        autocast: number format of the matrix products; None computes in the weights' own.

    Raises:
        ValueError: the batches hold no target.
    """
    models = [model for model in (student, teacher, baseline) if model is not None]
    for model in models:
        model.to(device).eval()
    entries = min(len(token_bytes), *(model.shape.vocab_size for model in models))
    draws = torch.Generator().manual_seed(seed)
    sums: Sums = {}
    baseline_nats, tokens, size = 0.0, 0, 0
    for batch in batches:
        uniforms = torch.rand(batch.labels.numel(), 2, generator=draws)  # on the CPU: every device draws the same
        targets = targets_of(batch)
        tokens += len(targets)
        size += int(token_bytes[targets].sum())
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            part = _sums_of(student, teacher, batch, uniforms.to(device), entries)
            if baseline is not None:
                baseline_nats += nats_of(baseline, batch, device, entries)
        sums = added(sums, {name: value.cpu().double() for name, value in part.items()})
    found = figures(sums, tokens)
    own = [sums[name].item() for name in (metric_names.VAL_LOSS, metric_names.DISTILL_TEACHER_LOSS)]
    of_student, of_teacher = (score_of_sum(nats, tokens, size) for nats in own)
    of_baseline = score_of_sum(baseline_nats, tokens, size) if baseline is not None else None
    if of_baseline is not None:
        closed = gap_closed(of_baseline.loss, of_student.loss, of_teacher.loss)
        found |= {} if closed is None else {metric_names.DISTILL_GAP_CLOSED: closed}
    acceptance = found[metric_names.DISTILL_ACCEPTANCE]
    gain = speculation(acceptance, sums, tokens, cost_ratio(student.shape, teacher.shape, context))
    is_cut = any(model.shape.vocab_size > entries for model in models)
    return Comparison(of_student, of_teacher, of_baseline, found, gain, entries, is_cut)


def _sums_of(student: Backbone, teacher: Backbone, batch: Batch, uniforms: Tensor, entries: int) -> Sums:
    input_ids, labels = batch.input_ids.to(uniforms.device), batch.labels.flatten().to(uniforms.device)
    spans = batch.spans_on(uniforms.device)
    signal = teacher(input_ids, lambda hidden, weight: DenseTeacher(hidden.flatten(0, 1), weight), spans)

    def head(hidden: Tensor, weight: Tensor) -> Sums:
        return distillation_sums(hidden.flatten(0, 1), weight, labels, signal, vocab_size=entries, uniforms=uniforms)

    return student(input_ids, head, spans)
