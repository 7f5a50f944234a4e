"""Zero-shot tasks of EleutherAI's lm-evaluation-harness (optional package lm-eval) on a loaded checkpoint."""

import importlib.util
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpt2lab.errors import InputError
from gpt2lab.settings import OBJECTIVES

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

BOOTSTRAP_SAMPLES = 1000
INSTALL = 'pip install "lm-eval>=0.4.13"'
BATCH_SIZE = 16


@dataclass(frozen=True)
class TaskSet:
    """Tasks of the harness, resolved by name."""

    names: list[str]
    manager: "TaskManager"


def check(tasks: str, objective: str) -> None:
    """Check that lm-eval is installed and that the model is a causal language model.

    Raises:
        InputError: it is not.
    """
    if not tasks:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(f"lm_eval={tasks} needs the package lm-eval, which is not installed.\n{INSTALL}")
    if not OBJECTIVES[objective].is_causal:
        raise InputError(f"lm_eval supports causal models only; a checkpoint was trained with objective={objective}.")


def find_tasks(tasks: str, folder: str) -> TaskSet:
    """Resolve the tasks once, before any model is scored.

    Args:
        tasks: names, separated by commas.
        folder: folder with additional task files (.yaml); may be empty.

    Raises:
        InputError: an unknown task.
    """
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    manager = TaskManager(include_path=folder or None)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise InputError(
            f"lm_eval={unknown[0]}: no such task among {len(manager.all_tasks):,}.\n"
            "Give a task of lm-evaluation-harness, or lm_eval_path=FOLDER with your own task file."
        )
    return TaskSet(names, manager)


def run_tasks(
    model: "GPT2LMHeadModel", tokenizer: "PreTrainedTokenizerBase", tasks: TaskSet, limit: int
) -> dict[str, tuple[float, float | None]]:
    """Run the tasks; return {task/metric: (value, standard error or None)}.

    Args:
        limit: maximum number of examples per task; 0: all.

    Raises:
        InputError: the data of a task cannot be loaded.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    harness_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE)
    try:
        found = lm_eval.simple_evaluate(
            harness_model,
            tasks=list(tasks.names),
            task_manager=tasks.manager,
            limit=limit or None,
            bootstrap_iters=BOOTSTRAP_SAMPLES,
            verbosity="ERROR",
        )
        assert found is not None
        figures = {
            (task, key): value
            for task, results in found["results"].items()
            for key, value in results.items()
            if "," in key and "_stderr," not in key and isinstance(value, int | float)
        }
        return {
            f"{task}/{key.removesuffix(',none')}": (float(value), _error(found, tasks.manager, task, key))
            for (task, key), value in figures.items()
        }
    except (OSError, ValueError, ConnectionError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"lm_eval={','.join(tasks.names)} could not be run: {reason[:150]}\n"
            "Its data come from the Hub or from the paths in the task file."
        ) from error


def _error(found: dict[str, Any], manager: "TaskManager", task: str, key: str) -> float | None:
    """Standard error of the harness, or by bootstrap where it reports none (metrics weighted by length).

    None for a group of tasks without one, and for a task with a single document.
    """
    import numpy as np

    metric, _, filter_name = key.partition(",")
    reported = found["results"][task].get(f"{metric}_stderr,{filter_name}")
    if isinstance(reported, int | float):
        return float(reported)
    documents = [one for one in found["samples"].get(task, []) if one["filter"] == filter_name and metric in one]
    if len(documents) < 2:
        return None
    values, aggregate = [one[metric] for one in documents], manager.load([task])["tasks"][task].aggregation()[metric]
    indices = np.random.default_rng(0).integers(0, len(values), (BOOTSTRAP_SAMPLES, len(values)))
    return float(np.std([aggregate([values[index] for index in sample]) for sample in indices]))
