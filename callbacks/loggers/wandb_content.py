"""Content of W&B runs: definitions of metrics, tables of samples, artifacts of models, and what a run starts from."""

import logging
import os
from pathlib import Path
from typing import Any

import wandb

from callbacks.loggers.bounded_calls import first_line
from callbacks.loggers.protocols import RunLabels
from gpt2lab import metric_names
from gpt2lab.reports.samples_jsonl import Sample
from gpt2lab.storage.metrics_csv import STEP

log = logging.getLogger(__name__)
SAMPLES = "samples"


def define_metrics(run: Any) -> None:
    """Plot everything over `step`, and show the best value of metrics that have one beside the last."""
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP)
    for name, best in best_kinds().items():
        run.define_metric(name, step_metric=STEP, summary=f"{best},last")


def best_kinds() -> dict[str, str]:
    """Return the metrics with a best value: name → min or max; none in a W&B sweep, whose search reads plain values."""
    return {} if "WANDB_SWEEP_ID" in os.environ else metric_names.summaries()


def with_samples(table: Any, samples: list[Sample]) -> Any:
    """Add samples to the table, of which W&B logs the new rows only; a new one if there is none yet."""
    has_references = any(sample.reference is not None for sample in samples)
    if table is None and samples:
        texts = ["prompt", "reference", "prediction", "score"] if has_references else ["prompt", "completion"]
        table = wandb.Table(columns=["step", "method", *texts], log_mode="INCREMENTAL")
    for sample in samples:
        references = (sample.reference,) if "reference" in table.columns else ()
        scores = (sample.score,) if references else ()
        table.add_data(sample.step, sample.method, sample.prompt, *references, sample.completion, *scores)
    return table


def log_artifact(run: Any, folder: Path) -> None:
    """Log the folder of a model; immutable, so that its files are not copied first."""
    artifact = wandb.Artifact(f"model-{run.id}", type="model")
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):  # add_dir would print
        artifact.add_file(str(file), name=str(file.relative_to(folder)), policy="immutable")
    run.log_artifact(artifact)


def use_inputs(run: Any, labels: RunLabels) -> None:
    """Record the data and models that an online run starts from; a model is known if its run logged it."""
    if labels.data is not None:
        name, content = labels.data
        artifact = wandb.Artifact(f"data-{name}-{content[:12]}", type="dataset", metadata={"hash": content})
        _use(run, artifact)
    for folder in map(Path, labels.models):
        for file in (one / "wandb" / "run-id" for one in (folder, folder.parent)):
            if file.is_file():
                _use(run, f"model-{file.read_text()}:latest")


def _use(run: Any, artifact: Any) -> None:
    try:
        run.use_artifact(artifact)
    except Exception as error:  # lineage is optional
        log.debug("W&B does not know %s: %s", artifact, first_line(error))
