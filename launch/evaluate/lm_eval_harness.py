"""Zero-shot: tasks of EleutherAI's lm-evaluation-harness, an optional package, on a loaded checkpoint."""

import importlib.util
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpt2lab.errors import InputError
from gpt2lab.settings import OBJECTIVES

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

DRAWS = 1000  # of the bootstrap
INSTALL = 'pip install "lm-eval>=0.4.13"'
BATCH = 16


@dataclass(frozen=True)
class NamedTasks:
    """Tasks of the harness, found by name."""

    names: list[str]
    manager: "TaskManager"


def check(tasks: str, objective: str) -> None:
    """Before the work: the package is there, and the model reads as its tasks expect.

    Raises:
        InputError: it is not, or it does not.
    """
    if not tasks:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(f"lm_eval={tasks} needs the package lm-eval, which is not installed.\n{INSTALL}")
    if not OBJECTIVES[objective].is_causal:
        raise InputError(f"lm_eval is for causal models, and one was trained with objective={objective}.")


def named_tasks(tasks: str, folder: str) -> NamedTasks:
    """The tasks, looked up among thousands once, and before any model is scored.

    Args:
        tasks: names, separated by commas; each brings its data from the Hub or from files.
        folder: with task files (.yaml) of your own; may be empty.

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
            "Name a task of lm-evaluation-harness, or give lm_eval_path=FOLDER with a task file of your own."
        )
    return NamedTasks(names, manager)


def zero_shot(
    model: "GPT2LMHeadModel", tokenizer: "PreTrainedTokenizerBase", tasks: NamedTasks, limit: int
) -> dict[str, tuple[float, float | None]]:
    """(value, standard error) by task/metric.

    Args:
        model: as `transformers` knows it.
        limit: so many examples of each task; 0: all.

    Raises:
        InputError: data that cannot be had.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    judge = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
    try:
        found = lm_eval.simple_evaluate(
            judge,
            tasks=list(tasks.names),
            task_manager=tasks.manager,
            limit=limit or None,
            bootstrap_iters=DRAWS,
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
            f"{task}/{_shown(key)}": (float(value), _error(found, tasks.manager, task, key))
            for (task, key), value in figures.items()
        }
    except (OSError, ValueError, ConnectionError) as error:
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"lm_eval={','.join(tasks.names)} could not be run: {why[:150]}\n"
            "Its data come from the Hub or from the task file's own paths."
        ) from error


def _shown(key: str) -> str:
    """lm_eval's `acc,none` as `acc`; a filter other than none stays in the name."""
    return key.removesuffix(",none")


def _error(found: dict[str, Any], manager: "TaskManager", task: str, key: str) -> float | None:
    """The harness's own standard error; by the bootstrap where it has none, as of what it weighs by length.

    None where a group of tasks has none, or the task is a single document.
    """
    import numpy as np

    metric, _, choice = key.partition(",")
    theirs = found["results"][task].get(f"{metric}_stderr,{choice}")
    if isinstance(theirs, int | float):
        return float(theirs)
    documents = [one for one in found["samples"].get(task, []) if one["filter"] == choice and metric in one]
    if len(documents) < 2:
        return None
    values, aggregate = [one[metric] for one in documents], manager.load([task])["tasks"][task].aggregation()[metric]
    places = np.random.default_rng(0).integers(0, len(values), (DRAWS, len(values)))
    return float(np.std([aggregate([values[place] for place in draw]) for draw in places]))
