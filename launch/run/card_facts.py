"""Card facts: what the model card of a run states of its data, recipe and lineage, known before training starts."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpt2lab.optim.schedules import warmup_steps
from gpt2lab.reports.lineage import ancestors_of
from gpt2lab.settings import DataFacts, SequenceSettings, TokenizerChoice
from gpt2lab.storage.hub import hub_id, is_hub_id
from launch.config.run_spec import PreparedSpec
from launch.config.schema import RunConfig
from launch.config.unused_keys import given_keys

MAIN = "main"  # branch that is loaded where none is named
FROM_REPORT = ("task", "model", "init", "data", "command")
OTHER_TEXT = {"path", "data.dataset", "data.config"}  # keys by which a preset reads other text than its own


def card_facts(spec: PreparedSpec, report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the card besides those that training measures.

    Names are those of report.json, of which `report` has at least what `report_facts` returns, and:

    recipe: setting → value; languages, license, datasets: of the configuration; repository, revision, title: of the
    upload; ancestors: teacher and initial weights (gpt2lab/reports/lineage.py); benchmark_limit: examples of a task.
    """
    config, resolved = spec.config, spec.resolved
    sources = {"teacher": {"source": resolved.teacher}, "init": {"source": resolved.init}}
    hashes = {"teacher": resolved.teacher_hash}
    ancestors = tuple(replace(one, weights_hash=hashes.get(one.role, "")) for one in ancestors_of(sources))
    benchmarks = config.callbacks.get("benchmarks") or {}
    return {
        **{name: report[name] for name in FROM_REPORT if name in report},
        "n_positions": resolved.model.n_positions,
        "recipe": recipe(spec),
        "languages": stated_languages(config),
        "license": config.hub.license,
        "datasets": _hub_data(config),
        "repository": config.hub.push,
        "revision": config.hub.revision if config.hub.push and config.hub.revision != MAIN else "",
        **({"title": config.hub.push.partition("/")[2]} if config.hub.push else {}),
        "ancestors": ancestors,
        "is_lora": config.lora_rank > 0,
        "benchmark_limit": benchmarks.get("limit"),
    }


def report_facts(spec: PreparedSpec, facts: DataFacts) -> dict[str, Any]:
    """Return what report.json contains of the command and of the prepared data."""
    return {
        "task": spec.config.task_name,
        "model": spec.resolved.model_name,
        "init": {"source": spec.resolved.init, **spec.resolved.teacher_layers},
        "data": {
            "name": facts.name,
            "hash": facts.hash,
            "tokens": facts.train_tokens,
            "val_overlap": facts.val_overlap,
        },
        "command": spec.config.invocation.command,
        **({"continued_with": continued} if (continued := spec.config.invocation.continued_with) else {}),
        "planned_memory_bytes": spec.prepared.planned_memory.get("peak"),
    }


def recipe(spec: PreparedSpec) -> dict[str, str]:
    """Return the settings that decide the result; those that are off are left out."""
    config, model, machine = spec.config, spec.resolved.model, spec.machine
    distills, loss = config.task_name == "distill", config.loss
    rows = f"{config.global_batch_rows} sequences of up to {config.context} tokens for each step"
    optional = {
        "dropout": model.dropout,
        "label smoothing": config.label_smoothing,
        "z-loss": config.z_loss,
        "weight average (EMA)": config.ema,
        "layer drop": config.layer_drop,
        "gradient clipping": config.gradient_clip,
    }
    lora = config.lora
    found = {
        "model": f"{model.n_layer} layers, width {model.n_embd}, {model.n_head} heads, {model.n_positions} positions, "
        f"vocabulary of {spec.prepared.vocab_size}",
        "tokenizer": _tokenizer(spec.resolved.tokenizer),
        "objective": config.objective.name,
        "distillation loss": f"{loss.name}, temperature {loss.temperature:g}, weight of the labels {loss.hard_weight:g}"
        if distills
        else "",
        "text of the distillation": _distillation_text(config.sequences) if distills else "",
        "stored teacher": config.teacher_cache.name if distills and config.teacher_cache.name != "none" else "",
        "optimizer": f"{config.optimizer.name}, learning rate {config.optimizer.lr:g}, "
        f"weight decay {config.optimizer.weight_decay:g}",
        "schedule": f"{config.schedule.name}, warm-up of {warmup_steps(config.steps, config.schedule)} steps",
        "batch": rows,
        "steps": str(config.steps),
        "exported weights": {"last": "of the last step", "best": "of the best validation"}[config.export],
        "LoRA": f"rank {lora.rank}, alpha {lora.alpha:g}, merged" if config.lora_rank else "",
        "frozen blocks": str(config.task["frozen_layers"]) if config.task.get("frozen_layers") else "",
        **{name: f"{value:g}" for name, value in optional.items() if value},
        "precision": f"{machine.precision.name}, on {machine.world_size} {machine.accelerator} device"
        f"{'s' if machine.world_size > 1 else ''}",
        "seed": str(config.seed),
    }
    return {name: value for name, value in found.items() if value}


def _tokenizer(chosen: TokenizerChoice) -> str:
    """Return the kind of a tokenizer trained here, and the model or Hub id that another one comes from."""
    if chosen.kind != "pretrained":
        return f"{chosen.kind}, trained on the training split"
    folder = Path(chosen.source)
    return f"that of {hub_id(chosen.source) or (folder.parent if folder.name == 'hf' else folder).name}"


def _distillation_text(sequences: SequenceSettings) -> str:
    """Return the key and the origin of the training text."""
    origins = {
        "data": "the data, unchanged",
        "gkd": f"the student's own text in {sequences.lmbda:.0%} of the steps, the data in the others",
        "distillm": "the data and a growing share of the student's own text",
        "seqkd": "text that the teacher generated once",
    }
    return f"{sequences.name}: {origins[sequences.name]}"


def stated_languages(config: RunConfig) -> list[str]:
    """Return the languages of the data; empty where a preset reads other text than its own and none are given."""
    given = set(given_keys(config.invocation.overrides))
    is_other = given & OTHER_TEXT and "data.languages" not in given
    return [] if is_other else [str(one) for one in config.data.get("languages") or []]


def _hub_data(config: RunConfig) -> list[dict[str, str]]:
    """Return the Hub data set of the run, if it reads one: id, config, split and revision."""
    dataset = str(config.data.get("dataset") or "")
    if not dataset or not is_hub_id(dataset) or (config.path and config.takes_pairs):
        return []
    return [{"id": dataset, **{key: str(config.data.get(key) or "") for key in ("config", "split", "revision")}}]
