"""Comparison: a student scored beside its teacher, and a baseline where there is one, on the same targets in one pass.

Shapes: B sequences, T positions, D hidden width, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2lab import metric_names
from gpt2lab.data.batch import IGNORE_INDEX, Batch
from gpt2lab.evaluation.acceptance import Speculation, cost_ratio, speculation, tokens_per_target_call, with_error
from gpt2lab.evaluation.distillation_metrics import distillation_sums, figures, gap_closed
from gpt2lab.evaluation.evaluation import NATS, Score, score_of, target_groups, target_values
from gpt2lab.evaluation.jackknife import TOKENS, Figures, GroupedSums, Sums, standard_errors, total
from gpt2lab.losses.dense_teacher import DenseTeacher
from gpt2lab.model.backbone import Backbone

BASELINE_NATS = "baseline_nats"


@dataclass(frozen=True)
class Comparison:
    """What is known of a student and its teacher.

    Attributes:
        student, teacher, baseline: each model's own score.
        figures: the distill/… figures by metric name; distill/gap_closed where a baseline is worse than the teacher.
        standard_errors: of the figures.
        speculation: acceptance as measured, and the speed-up it implies.
        entries: how many of the vocabulary counted: as many as the tokenizer has.
        is_cut: whether a head has more, as padding to a round number.
    """

    student: Score
    teacher: Score
    baseline: Score | None
    figures: Figures
    standard_errors: Figures
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
    own, both = [GroupedSums() for _ in models], GroupedSums()
    for batch in batches:
        uniforms = torch.rand(*batch.labels.shape, 2, generator=draws)  # on the CPU: every device draws the same
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            seen = [_hidden(model, batch, device) for model in models]
            groups = target_groups(batch)
            for of_model, (hidden, weight) in zip(own, seen, strict=True):
                of_model.add(target_values(hidden, weight[:entries], batch, token_bytes), groups)
            both.add(*_sums_of_groups(seen[0], seen[1], batch, groups, uniforms.to(device), entries))
    scores = [score_of(of_model.scored()) for of_model in own]
    # What a figure needs beside the sums of the pair, in the same groups.
    by_group = {**both.scored(), TOKENS: scores[0].sums[TOKENS]}
    if baseline is not None:
        by_group[BASELINE_NATS] = scores[2].sums[NATS]
    sums = total(by_group)
    found, ratio = _figures(sums), cost_ratio(student.shape, teacher.shape, context)
    gain = speculation(found[metric_names.DISTILL_ACCEPTANCE], sums, scores[0].tokens, ratio)

    def tokens_of(sums: Sums) -> Figures:
        return {"tokens": tokens_per_target_call(_figures(sums)[metric_names.DISTILL_ACCEPTANCE], gain.drafts)}

    error = standard_errors(by_group, tokens_of).get("tokens")
    return Comparison(
        student=scores[0],
        teacher=scores[1],
        baseline=scores[2] if baseline is not None else None,
        figures=found,
        standard_errors=standard_errors(by_group, _figures),
        speculation=gain if error is None else with_error(gain, error),
        entries=entries,
        is_cut=any(model.shape.vocab_size > entries for model in models),
    )


def _hidden(model: Backbone, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, T, D) hidden states and (V, D) head."""
    return model(batch.input_ids.to(device), lambda hidden, weight: (hidden, weight), batch.spans_on(device))


def _sums_of_groups(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    batch: Batch,
    groups: Tensor,
    uniforms: Tensor,
    entries: int,
) -> tuple[Sums, Tensor]:
    """`distillation_sums` of the targets of each document group in the batch, (g, …) on the CPU, and its groups (g,).

    Args:
        groups: (n,) of the targets.
    """
    kept = batch.labels != IGNORE_INDEX  # (B, T)
    labels, kept = batch.labels[kept].to(uniforms.device), kept.to(uniforms.device)
    ours, theirs, draws = student[0][kept], teacher[0][kept], uniforms[kept]  # (n, D), (n, Dt), (n, 2)
    found, present = [], groups.unique()
    for group in present:
        own = (groups == group).to(uniforms.device)
        signal = DenseTeacher(theirs[own], teacher[1])
        sums = distillation_sums(ours[own], student[1], labels[own], signal, vocab_size=entries, uniforms=draws[own])
        found.append({**sums, TOKENS: own.sum()})
    if not found:
        return {}, present
    return {name: torch.stack([one[name].cpu().double() for one in found]) for name in found[0]}, present


def _figures(sums: Sums) -> Figures:
    tokens = sums[TOKENS].item()
    found = figures(sums, tokens)
    if BASELINE_NATS in sums:
        own = (found[metric_names.VAL_LOSS], found[metric_names.DISTILL_TEACHER_LOSS])
        closed = gap_closed(sums[BASELINE_NATS].item() / tokens, *own)
        found |= {} if closed is None else {metric_names.DISTILL_GAP_CLOSED: closed}
    return found
