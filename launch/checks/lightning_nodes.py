"""Lightning's own callbacks and loggers: those that conflict with this project's training, and names of metrics."""

from typing import Any

from gpt2lab import metric_names
from gpt2lab.errors import InputError
from launch.config.did_you_mean import nearest
from launch.config.schema import RunConfig
from launch.config.targets import foreign_targets

LIGHTNING = "lightning.pytorch."
# Class of lightning.pytorch.callbacks → keys to use instead
CONFLICTING = {
    "StochasticWeightAveraging": "ema=0.999",
    "WeightAveraging": "ema=0.999",
    "EMAWeightAveraging": "ema=0.999",
    "GradientAccumulationScheduler": "batch_tokens and micro_batch",
    "BatchSizeFinder": "micro_batch=auto",
    "LearningRateFinder": "-m hparams_search=optuna or -m optimizer.lr=1e-3,3e-3",
    "ModelPruning": "init=teacher_layers",
    "ProgressBar": "callbacks.progress",
    "RichProgressBar": "callbacks.progress",
    "TQDMProgressBar": "callbacks.progress",
}


def check(config: RunConfig) -> None:
    """Check the callbacks and loggers of Lightning before it is imported.

    Raises:
        InputError: a class conflicts with this project's training, or monitors a metric that no run has.
    """
    others = [target for target in foreign_targets(config.target_nodes) if not target.startswith(LIGHTNING)]
    for place, node in config.target_nodes.items():
        module, _, name = str(node["_target_"]).rpartition(".")
        if not module.startswith(LIGHTNING):
            continue
        if name in CONFLICTING:
            raise InputError(
                f"{place}: {name} conflicts with this project's training.\nUse {CONFLICTING[name]} instead."
            )
        if not others:  # which can log metrics of their own
            _check_monitor(place, node)


def _check_monitor(place: str, node: dict[str, Any]) -> None:
    monitor = node.get("monitor")
    metrics = metric_names.logged()
    if monitor is None or monitor in metrics or str(monitor).startswith(metric_names.BENCHMARK_PREFIX):
        return
    near = nearest(str(monitor), metrics) or nearest(str(monitor).replace("_", "/", 1), metrics)
    raise InputError(f"{place}.monitor={monitor}: no such metric{near}.\nThe columns of metrics.csv are the metrics.")
