"""Metadata of a model card: the fields by which the Hub lists a model, and its scores as a model-index.

Nothing is guessed: a field whose value is not known is left out. Local data and runs have no id on the Hub, so they are
named in the text of the card only.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from gpt2lab import metric_names
from gpt2lab.model.student_shape import TEACHER_LAYERS
from gpt2lab.reports.lineage import Ancestor, weights_chain
from gpt2lab.settings import OBJECTIVES

LIBRARY, TAGS = "transformers", ("gpt2", "gpt2-lab")
TASK_TAGS = {"pretrain": "pretraining", "distill": "knowledge-distillation", "finetune": "fine-tuning"}
NO_DATASET = "unknown"  # type of a result on data without an id on the Hub
# Score of generated text → (id of the metric on the Hub, name)
TEXT_SCORES = {
    "rouge1": ("rouge", "ROUGE-1"),
    "rouge2": ("rouge", "ROUGE-2"),
    "rougeL": ("rouge", "ROUGE-L"),
    "bleu": ("bleu", "BLEU"),
    "chrf": ("chrf", "chrF"),
    "exact": ("exact_match", "exact match"),
    "accuracy": ("accuracy", "accuracy"),
    "f1": ("f1", "macro F1"),
    "compiles": ("compiles", "share that compiles"),
    "placeholders": ("placeholders", "share with the placeholders of the reference"),
}
LOSSES = {
    metric_names.VAL_LOSS: ("loss", "cross-entropy, nats per target token"),
    metric_names.VAL_PERPLEXITY: ("perplexity", "perplexity"),
    metric_names.VAL_BITS_PER_BYTE: ("bits_per_byte", "bits per byte"),
}


@dataclass(frozen=True)
class Score:
    """A score of the exported weights.

    Attributes:
        kind: id of the metric on the Hub, or its name.
        error: standard error; None: unknown.
        benchmark: task of lm-evaluation-harness; empty: validation split of the run's data.
        tokens: number of target tokens; 0: those of a validation.
    """

    kind: str
    name: str
    value: float
    error: float | None = None
    benchmark: str = ""
    tokens: int = 0


def scores(facts: Mapping[str, Any]) -> list[Score]:
    """Return the scores in the content of a report, those of benchmarks last; values that are not finite are left out.

    Perplexity and bits per byte have the error of the loss, by their derivatives.
    """
    metrics, found = facts.get("metrics") or {}, []
    loss, error = metrics.get(metric_names.VAL_LOSS), facts.get("val_loss_error")
    for name, (kind, text) in LOSSES.items():
        value = metrics.get(name)
        if value is not None:
            slope = {"loss": 1.0, "perplexity": value}.get(kind, value / (loss or math.inf))
            found.append(Score(kind, text, value, error * slope if error else None))
    if facts.get("full_val_loss") is not None and facts.get("full_val_tokens") != facts.get("val_tokens"):
        kind, text = LOSSES[metric_names.VAL_LOSS]
        whole, tokens = facts["full_val_loss"], int(facts.get("full_val_tokens") or 0)
        found.append(Score(kind, text, whole, facts.get("full_val_loss_error"), tokens=tokens))
    errors = facts.get("metric_errors") or {}
    for name, value in metrics.items():
        score = name.removeprefix(metric_names.VALIDATION_PREFIX)
        if name.startswith(metric_names.VALIDATION_PREFIX) and name not in LOSSES:
            kind, text = TEXT_SCORES.get(score, (score, score))
            found.append(Score(kind, text, value, errors.get(name)))
    for (task, metric), (value, error) in metric_names.benchmark_scores(metrics).items():
        found.append(Score(metric, metric, value, error, benchmark=task))
    return [score for score in found if math.isfinite(score.value)]


def distillation_scores(facts: Mapping[str, Any]) -> list[Score]:
    """Return the scores that compare a student with its teacher; they are in the text of the card only."""
    metrics = facts.get("metrics") or {}
    known = {**metric_names.DISTILLATION, **metric_names.BETWEEN_TOKENIZERS}
    return [Score(name, text, metrics[name]) for name, (text, _) in known.items() if name in metrics]


def metadata(facts: Mapping[str, Any], objective: str) -> ModelCardData:
    """Return the metadata of a model.

    Args:
        facts: content of report.json, with the fields of launch/run/card_facts.py.
    """
    task, base = facts.get("task", ""), base_model(facts)
    tags = [*TAGS, *([TASK_TAGS[task]] if task in TASK_TAGS else []), *(["lora"] if facts.get("is_lora") else [])]
    relation: dict[str, Any] = {}
    if base and not _takes_teacher_layers(facts):
        relation["base_model_relation"] = "finetune"  # the Hub's others are adapter, merge and quantized
    results = [_result(score, facts, objective) for score in scores(facts)]
    return ModelCardData(
        language=languages(facts) or None,
        license=card_license(facts)[0] or None,
        library_name=LIBRARY,
        pipeline_tag="fill-mask" if OBJECTIVES[objective].fills_masks else "text-generation",
        tags=tags,
        datasets=[one["id"] for one in facts.get("datasets") or []] or None,
        base_model=base,
        **relation,
        metrics=list(dict.fromkeys(one.metric_type for one in results)) or None,
        model_name=facts.get("title", "GPT-2"),
        eval_results=results or None,
    )


def base_model(facts: Mapping[str, Any]) -> str | None:
    """Return the Hub id of the nearest model whose weights this one has inherited; None if none is on the Hub."""
    for one in _weights_chain(facts):
        if one.repository:
            return one.repository
    return None


def languages(facts: Mapping[str, Any]) -> list[str]:
    """Return the languages of the data, then those of the models whose weights this one has inherited.

    They are ISO 639 codes without a region, or `code`, as the Hub lists them.
    """
    stated = [facts.get("languages") or [], *(one.metadata.get("language") or [] for one in _weights_chain(facts))]
    found = [code for one in stated for code in ([one] if isinstance(one, str) else one)]
    return list(dict.fromkeys(str(code).replace("_", "-").partition("-")[0].lower() for code in found))


def card_license(facts: Mapping[str, Any]) -> tuple[str, str]:
    """Return the license and the model it is inherited from: ("", "") if none is known, and no model if it is given."""
    if facts.get("license"):
        return str(facts["license"]), ""
    for one in _weights_chain(facts):
        stated = one.metadata.get("license")
        if isinstance(stated, str) and stated != "other":
            return stated, one.name
    return "", ""


def _weights_chain(facts: Mapping[str, Any]) -> Iterable[Ancestor]:
    return weights_chain(tuple(facts.get("ancestors") or ()), _takes_teacher_layers(facts))


def _takes_teacher_layers(facts: Mapping[str, Any]) -> bool:
    return (facts.get("init") or {}).get("source") == TEACHER_LAYERS


def _result(score: Score, facts: Mapping[str, Any], objective: str) -> EvalResult:
    """Return the entry of the model-index."""
    task = "fill-mask" if OBJECTIVES[objective].fills_masks else "text-generation"
    value = float(f"{score.value:.6g}")
    if score.benchmark:  # huggingface_hub merges results that have neither another type nor another configuration
        name = f"{score.benchmark} (lm-evaluation-harness)"
        config = score.benchmark
        return EvalResult(task, NO_DATASET, name, score.kind, value, metric_name=score.name, dataset_config=config)
    data, hub = facts.get("data") or {}, facts.get("datasets") or []
    name = f"{data.get('name', NO_DATASET)}, validation split{f', hash {one}' if (one := data.get('hash')) else ''}"
    origin = {f"dataset_{key}": hub[0].get(key) or None for key in ("config", "revision")} if hub else {}
    metric = f"{score.name}, {score.tokens:,} tokens" if score.tokens else score.name
    return EvalResult(task, hub[0]["id"] if hub else NO_DATASET, name, score.kind, value, metric_name=metric, **origin)
