"""Zero-shot tasks of EleutherAI's lm-evaluation-harness (optional package lm-eval) on a loaded model."""

import functools
import importlib.util
import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

from gpt2lab.errors import InputError
from gpt2lab.settings import OBJECTIVES
from gpt2lab.system.terminal import is_live

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

BOOTSTRAP_SAMPLES = 1000
INSTALL = 'pip install "lm-eval>=0.4.13"'
BATCH_SIZE = 16


@dataclass(frozen=True)
class TaskSet:
    """Tasks of the harness with their data.

    Attributes:
        requested: tasks and groups of tasks.
        tasks: every single task by name, those of the groups included.
    """

    requested: list[Any]
    tasks: dict[str, Any]


def check(tasks: str, objective: str, key: str = "lm_eval") -> None:
    """Check that lm-eval is installed and that the model is a causal language model.

    Args:
        tasks: names, separated by commas; empty: none.
        key: key that names the tasks, for messages.

    Raises:
        InputError: it is not.
    """
    if not tasks:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(f"{key}={tasks} needs the package lm-eval, which is not installed.\n{INSTALL}")
    if not OBJECTIVES[objective].is_causal:
        raise InputError(f"{key} supports causal models only; the objective of this one is {objective}.")


@functools.cache  # the harness reads thousands of files to know its tasks, and a run needs them twice
def find_tasks(tasks: str, folder: str, key: str = "lm_eval", path_key: str = "lm_eval_path") -> TaskSet:
    """Find the tasks and load their data, before any model is scored.

    Args:
        tasks: names, separated by commas.
        folder: folder with additional task files (.yaml); may be empty.
        key: key that names the tasks, for messages.
        path_key: key that names the folder.

    Raises:
        InputError: an unknown task, or one whose data cannot be loaded.
    """
    import datasets
    from lm_eval.tasks import TaskManager

    if not is_live(sys.stderr):
        datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    manager = TaskManager(include_path=folder or None)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise InputError(
            f"{key}={unknown[0]}: no such task among {len(manager.all_tasks):,}.\n"
            f"Give a task of lm-evaluation-harness, or {path_key}=FOLDER with your own task file."
        )
    found = TaskSet([], {})
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:  # of `datasets`, of the Hub, or of code in a task file
            reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            raise InputError(
                f"{key}={name}: the data of this task cannot be loaded: {reason[:150]}\n"
                "They come from the Hub, or from the paths in your task file."
            ) from error
        found.requested.extend([loaded["groups"][name]] if name in loaded["groups"] else loaded["tasks"].values())
        found.tasks.update(loaded["tasks"])
    return found


def run_tasks(
    model: "GPT2LMHeadModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: TaskSet,
    limit: int,
    batch_size: int = BATCH_SIZE,
    on_batch: Callable[[], None] | None = None,
) -> dict[str, tuple[float, float | None]]:
    """Run the tasks; return {task/metric: (value, standard error or None)}. Python's and NumPy's random state is kept.

    Args:
        tokenizer: the harness adds a padding token to it.
        limit: maximum number of examples per task; 0: all.
        on_batch: called before every forward pass; without it, progress bars are shown.

    Raises:
        InputError: a task cannot be run.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    try:
        with _random_state_kept(), _watched(model, on_batch):
            found = lm_eval.simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=tasks.requested,
                limit=limit or None,
                bootstrap_iters=BOOTSTRAP_SAMPLES,
            )
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"The tasks {', '.join(tasks.tasks)} could not be run: {reason[:150]}") from error
    assert found is not None
    figures = {
        (task, key): value
        for task, results in found["results"].items()
        for key, value in results.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }
    return {
        f"{task}/{key.removesuffix(',none')}": (float(value), _error(found, tasks, task, key))
        for (task, key), value in figures.items()
    }


@contextmanager
def _watched(model: "GPT2LMHeadModel", on_batch: Callable[[], None] | None) -> Iterator[None]:
    """Call `on_batch` before each forward pass of the model, and show no progress bars; without it, change nothing."""
    if on_batch is None:
        yield
        return
    hook = model.register_forward_pre_hook(lambda module, inputs: on_batch())
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        hook.remove()


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Restore the random state of Python and NumPy, which the harness seeds."""
    import numpy as np

    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 — that is the state the harness seeds
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _error(found: dict[str, Any], tasks: TaskSet, task: str, key: str) -> float | None:
    """Standard error of the harness, or by bootstrap where it reports none (metrics weighted by length).

    None for a group of tasks without one, and for a task with a single document.
    """
    import numpy as np

    metric, _, filter_name = key.partition(",")
    reported = found["results"][task].get(f"{metric}_stderr,{filter_name}")
    if isinstance(reported, int | float):
        return float(reported)
    samples: Sequence[Any] = found["samples"].get(task, [])
    documents = [one for one in samples if one["filter"] == filter_name and metric in one]
    if len(documents) < 2:
        return None
    values, aggregate = [one[metric] for one in documents], tasks.tasks[task].aggregation()[metric]
    indices = np.random.default_rng(0).integers(0, len(values), (BOOTSTRAP_SAMPLES, len(values)))
    return float(np.std([aggregate([values[index] for index in sample]) for sample in indices]))
