"""Teacher-student evaluation: scores of student, teacher and optional baseline on the same targets, in one pass.

Shapes: B sequences, T positions, n targets of a batch, D and Dt hidden widths of student and teacher, V vocabulary
size, g document groups of a batch.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpt2lab import metric_names
from gpt2lab.data.batch import IGNORE_INDEX, Batch
from gpt2lab.evaluation.acceptance import Speculation, cost_ratio, estimate_speculation, tokens_per_target_call
from gpt2lab.evaluation.distillation_metrics import distillation_sums, figures, gap_closed
from gpt2lab.evaluation.evaluation import (
    NATS,
    Score,
    hidden_and_head,
    score_from_sums,
    target_groups,
    target_values,
)
from gpt2lab.evaluation.jackknife import TOKENS, Figures, GroupedSums, Sums, standard_errors, total
from gpt2lab.losses.dense_teacher import DenseTeacher
from gpt2lab.losses.label_statistics import vocabulary_tiles
from gpt2lab.model.backbone import Backbone
from gpt2lab.system.device import compute_dtype

BASELINE_NATS = "baseline_nats"


@dataclass(frozen=True)
class Comparison:
    """Result of a teacher-student evaluation.

    Attributes:
        student, teacher, baseline: score of each model.
        figures: distill/… figures by metric name; distill/gap_closed if a baseline is worse than the teacher.
        standard_errors: standard errors of the figures.
        speculation: acceptance rate and estimated speed-up of speculative decoding.
        vocab_size: number of tokens that were scored, that of the tokenizer.
        is_truncated: whether a head is longer, through padding.
    """

    student: Score
    teacher: Score
    baseline: Score | None
    figures: Figures
    standard_errors: Figures
    speculation: Speculation
    vocab_size: int
    is_truncated: bool


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
        token_bytes: (V,) bytes of each token, from `bytes_of_tokens`; longer heads are truncated to V.
        context: sequence length at which the cost of a decoding step is estimated.
        seed: seed of the sampled draft tokens.
        autocast: dtype of the matrix products; None: that of the weights.

    Raises:
        ValueError: the batches have no target.
    """
    models = [model for model in (student, teacher, baseline) if model is not None]
    for model in models:
        model.to(device).eval()
    vocab_size = min(len(token_bytes), *(model.shape.vocab_size for model in models))
    draws = torch.Generator().manual_seed(seed)
    own, both, heads = [GroupedSums() for _ in models], GroupedSums(), None
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):  # casts each weight once
        for batch in batches:
            uniforms = torch.rand(*batch.labels.shape, 2, generator=draws)  # on the CPU: the same on every device
            outputs = [hidden_and_head(model, batch, device) for model in models]
            heads = heads or [vocabulary_tiles(head[:vocab_size], compute_dtype(hidden)) for hidden, head in outputs]
            groups = target_groups(batch)
            for scores_of_model, (hidden, _), tiles in zip(own, outputs, heads, strict=True):
                scores_of_model.add(target_values(hidden, tiles, batch, token_bytes), groups)
            both.add(*_sums_of_groups(outputs[0], outputs[1], batch, groups, uniforms.to(device), vocab_size))
    scores = [score_from_sums(scores_of_model.scored()) for scores_of_model in own]
    # Figures also use these sums of single models, over the same groups.
    by_group = {**both.scored(), TOKENS: scores[0].sums[TOKENS]}
    if baseline is not None:
        by_group[BASELINE_NATS] = scores[2].sums[NATS]
    return Comparison(
        student=scores[0],
        teacher=scores[1],
        baseline=scores[2] if baseline is not None else None,
        figures=_figures(total(by_group)),
        standard_errors=standard_errors(by_group, _figures),
        speculation=_speculation(by_group, scores[0].tokens, cost_ratio(student.shape, teacher.shape, context)),
        vocab_size=vocab_size,
        is_truncated=any(model.shape.vocab_size > vocab_size for model in models),
    )


def _sums_of_groups(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    batch: Batch,
    groups: Tensor,
    uniforms: Tensor,
    vocab_size: int,
) -> tuple[Sums, Tensor]:
    """Return `distillation_sums` per document group of the batch, (g, …) on the CPU, and the groups (g,).

    Args:
        groups: (n,) document group of each target.
    """
    kept = batch.labels != IGNORE_INDEX  # (B, T)
    labels, kept = batch.labels[kept].to(uniforms.device), kept.to(uniforms.device)
    ours, theirs, draws = student[0][kept], teacher[0][kept], uniforms[kept]  # (n, D), (n, Dt), (n, 2)
    found, present = [], groups.unique()
    for group in present:
        own = (groups == group).to(uniforms.device)
        signal = DenseTeacher(theirs[own], teacher[1])
        sums = distillation_sums(ours[own], student[1], labels[own], signal, vocab_size=vocab_size, uniforms=draws[own])
        found.append({**sums, TOKENS: own.sum()})
    if not found:
        return {}, present
    return {name: torch.stack([one[name].cpu().double() for one in found]) for name in found[0]}, present


def _speculation(by_group: Sums, targets: int, ratio: float) -> Speculation:
    """Estimate the gain of speculative decoding, with its error between document groups."""
    sums = total(by_group)
    gain = estimate_speculation(_figures(sums)[metric_names.DISTILL_ACCEPTANCE], sums, targets, ratio)

    def expected_tokens(sums: Sums) -> Figures:
        return {"tokens": tokens_per_target_call(_figures(sums)[metric_names.DISTILL_ACCEPTANCE], gain.drafts)}

    error = standard_errors(by_group, expected_tokens).get("tokens")
    if error is None:
        return gain
    of_speedup = error / (gain.drafts * gain.cost_ratio + 1)  # the costs are exact
    return replace(gain, tokens_per_target_call_standard_error=error, speedup_standard_error=of_speedup)


def _figures(sums: Sums) -> Figures:
    tokens = sums[TOKENS].item()
    found = figures(sums, tokens)
    if BASELINE_NATS in sums:
        own = (found[metric_names.VAL_LOSS], found[metric_names.DISTILL_TEACHER_LOSS])
        closed = gap_closed(sums[BASELINE_NATS].item() / tokens, *own)
        found |= {} if closed is None else {metric_names.DISTILL_GAP_CLOSED: closed}
    return found
