"""Run uses: the commands that use the exported model of a run or continue it, known before its first step."""

import shlex
from pathlib import Path

from gpt2lab.reports.next_commands import LONGER
from gpt2lab.reports.page import shown_path
from gpt2lab.storage.model_folder import read_shape
from launch.config.groups import keys_set_by, values
from launch.config.run_spec import PreparedSpec
from launch.config.unused_keys import given_keys

DATA_KEYS = ("path", "val_path", "val_fraction", "on_bad_line", "source", "target", "cache_dir", "objective", "packing")
CODE_PROMPT = '"import "'
DEFAULT_LENGTH = 128  # max_new_tokens of generate.py
SHORTEST_PAIRS = 256  # positions for a function and its summary
PAIRS = "summarize"  # data of the suggested fine-tuning, which every machine has


def run_uses(spec: PreparedSpec, folder: Path) -> dict[str, str]:
    """Return {what it does: command} for the model that the run exports to its directory."""
    run, config = shlex.quote(shown_path(folder)), spec.config
    commands = _uses(spec, run) | _trainings(spec, run)
    if not config.trainer.get("max_time"):
        commands[LONGER] = f"python train.py resume={run} steps={2 * config.steps}"
    return commands


def _uses(spec: PreparedSpec, run: str) -> dict[str, str]:
    """Commands that read the exported model."""
    kind, teacher, own = spec.config.objective.kind, spec.resolved.teacher, spec.resolved.model.n_positions or 0
    shares_tokenizer = teacher and spec.config.loss.name != "uld"
    against = f" teacher={shlex.quote(shown_path(teacher))}" if shares_tokenizer else ""
    commands = {
        "evaluate": f"python evaluate.py checkpoint={run}{against}",
        "generate text": f"python generate.py checkpoint={run}{_length(own)}",
    }
    if not kind.fills_masks:
        commands["playground in the browser"] = f"python generate.py checkpoint={run}{_length(own)} serve=true"
    if shares_tokenizer and kind.is_causal and not spec.config.takes_pairs:
        both = f"checkpoint={shlex.quote(shown_path(teacher))} draft={run}"
        length = _length(min(own, read_shape(Path(teacher))["n_positions"]))
        commands["speculative"] = f"python generate.py {both}{length} prompt={CODE_PROMPT}"
    return commands


def _trainings(spec: PreparedSpec, run: str) -> dict[str, str]:
    """Commands that train on: a smaller student, and fine-tuning."""
    config, commands = spec.config, {}
    student = _smaller_model(spec)
    if config.task_name == "pretrain" and student:
        data = shlex.join([f"data={config.groups['data']}", *_given_data(spec)])
        words = f"model={student} teacher={run} {data} context={config.context}"
        commands["distill"] = f"python train.py task=distill {words}"
    positions = spec.resolved.model.n_positions or 0
    if config.task_name != "finetune" and config.objective.name == "clm" and positions >= SHORTEST_PAIRS:
        limit = f" context={positions}" if positions < 512 else ""
        commands["fine-tune"] = f"python train.py task=finetune init={run} data={PAIRS}{limit}"
    return commands


def _length(positions: int) -> str:
    """Return the argument for text that fits, where the default length does not."""
    return f" max_new_tokens={positions // 2}" if positions <= DEFAULT_LENGTH else ""


def _given_data(spec: PreparedSpec) -> list[str]:
    """Return the overrides of the command that choose text and objective, without that of the group data."""
    overrides = spec.config.invocation.overrides
    return [word for word in overrides if word.startswith("data.") or given_keys([word])[0].split(".")[0] in DATA_KEYS]


def _smaller_model(spec: PreparedSpec) -> str:
    """Return the largest model of conf/ that is smaller than the run's; empty if there is none."""
    sizes = {name: keys_set_by("model", name) for name in values("model")}
    volumes = {
        name: keys["model.n_layer"] * keys["model.n_embd"] ** 2 for name, keys in sizes.items() if keys["model.n_layer"]
    }
    own = (spec.resolved.model.n_layer or 0) * (spec.resolved.model.n_embd or 0) ** 2
    smaller = {name: volume for name, volume in volumes.items() if volume < own}
    return max(smaller, key=smaller.__getitem__, default="")
