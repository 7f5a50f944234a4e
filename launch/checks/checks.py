"""Checks: what can be said of a configuration before anything heavy is imported; each is one small function."""

import glob
import math
import os
from pathlib import Path
from typing import Any

from gpt2lab.errors import InputError
from gpt2lab.model.student_shape import TEACHER_LAYERS
from launch.checks import baseline, distillation, objective, resource_request, study_plan
from launch.config import run_dir
from launch.config.did_you_mean import nearest
from launch.config.injected_arguments import ARGUMENTS, DATA_ONLY_KEYS
from launch.config.key_limits import (
    CHOICES,
    CHOICES_WHERE_THERE,
    COUNTS_OR_AUTO,
    GENERATED,
    RANGES,
    RANGES_WHERE_THERE,
)
from launch.config.schema import Config
from launch.config.target_signature import check_target
from launch.config.unused_keys import check_ignored_keys, given_keys
from launch.distributed import multi_node

# Keys that, where they are given, must name something on this machine
FILES = ("path", "val_path")


def check(config: Config) -> None:
    """Everything that composition cannot know and that needs no data, model or device.

    Raises:
        InputError: the first mistake found.
    """
    check_own_record(config)
    study_plan.check(config)
    check_plan(config)
    check_run_dir(config)
    if config.resume not in (None, "auto"):
        return  # the run goes on with its own configuration, and launch.run.resume checks what may be given anew
    check_ignored_keys(config)
    check_targets(config)
    check_choices(config)
    check_ranges(config)
    check_counts_or_auto(config)
    check_schedule(config)
    check_sweep_only(config)
    multi_node.check(config)
    resource_request.check(config)
    check_init(config)
    check_model(config)
    check_batch(config)
    check_files(config)
    check_precision(config)
    check_layer_drop(config)
    check_task_and_data(config)
    objective.check(config)
    distillation.check(config)
    baseline.check_run(config)


def check_plan(config: Config) -> None:
    """A plan is of one new run."""
    if config.plan and config.is_study:
        raise InputError(
            "plan=true plans one run, and experiment=distill_study is many.\nPlan one: task=distill plan=true"
        )
    if config.plan and config.resume is not None:
        raise InputError("plan=true plans a new run; one that is continued needs what it needed.\nLeave out resume.")
    if config.plan_memory is not None and not (config.plan and config.accelerator == "gpu"):
        raise InputError(
            f"plan_memory={config.plan_memory:g} is that of each GPU of a machine that a plan is for.\n"
            "Give plan=true accelerator=gpu devices=N beside it, or leave it out."
        )


def check_own_record(config: Config) -> None:
    """`record` is the launcher's own, and `+key` must not smuggle in a key nothing reads."""
    for override, key in zip(config.record.overrides, given_keys(config.record.overrides), strict=True):
        head, _, rest = key.partition(".")
        known = Config.__dataclass_fields__
        if head == "record" or (head not in known and override.startswith("+")):
            raise InputError(f"There is no key {key}{nearest(key, known)}.\nAll keys: python train.py --cfg job.")
        node = value_of(config, head) if rest and override.startswith("+") else {}
        if not isinstance(node, dict):
            names = [f"{head}.{name}" for name in type(node).__dataclass_fields__]
            if key not in names:
                raise InputError(f"There is no key {key}{nearest(key, names)}.\nAllowed: {', '.join(names)}.")


def value_of(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else vars(value)[part]
    return value


def optional_value(config: Config, key: str) -> Any:
    """As `value_of`; None where this task, these data or callbacks have no such key."""
    try:
        return value_of(config, key)
    except (KeyError, TypeError):
        return None


def check_choices(config: Config) -> None:
    wanted = [(key, value_of(config, key), allowed) for key, allowed in CHOICES.items()]
    wanted += [(key, optional_value(config, key), allowed) for key, allowed in CHOICES_WHERE_THERE.items()]
    for key, value, allowed in wanted:
        for given in value if isinstance(value, list) else [value]:
            if given is not None and str(given) not in allowed:
                near = nearest(str(given), allowed)
                raise InputError(f"{key}={given}: no such value{near}.\nAllowed: {', '.join(allowed)}.")
    for key in ("compile", "shard_teacher"):
        if str(value_of(config, key)).lower() not in ("auto", "true", "false"):
            raise InputError(f"{key}={value_of(config, key)}: no such value.\nAllowed: auto, true, false.")


def check_ranges(config: Config) -> None:
    for key, (low, high) in (RANGES | RANGES_WHERE_THERE).items():
        given = optional_value(config, key)
        if given is None:
            continue
        for value in given if isinstance(given, list) else [given]:
            check_range(key, value, low, high)


def check_range(key: str, value: float, low: Any, high: Any) -> None:
    """Bounds as in RANGES."""
    smallest, largest = (bound[0] if isinstance(bound, list) else bound for bound in (low, high))
    assert isinstance(value, int | float)
    fits = math.isfinite(value) and smallest <= value <= largest
    fits = fits and not (value == smallest and isinstance(low, list))
    if not fits or (value == largest and isinstance(high, list)):
        lower = f"greater than {smallest}" if isinstance(low, list) else f"at least {smallest}"
        bound = f"{'below' if isinstance(high, list) else 'at most'} {largest}"
        upper = "finite" if largest == math.inf else bound
        raise InputError(f"{key}={value} is out of range: it must be {lower} and {upper}.")


def check_counts_or_auto(config: Config) -> None:
    for key, most in COUNTS_OR_AUTO.items():
        value = value_of(config, key)
        if value != "auto" and not (isinstance(value, int) and 1 <= value <= most):
            raise InputError(f"{key}={value} is neither auto nor a whole number of at least 1 and at most {most}.")


def check_schedule(config: Config) -> None:
    """The learning rate reaches its peak before the last step, and its end at the last step."""
    schedule, steps, warmup = config.schedule, config.steps, config.schedule.warmup_steps
    if warmup is not None and warmup >= steps:
        raise InputError(
            f"schedule.warmup_steps={warmup} is not less than steps={steps}: no step would follow the warm-up.\n"
            f"Give at most schedule.warmup_steps={steps - 1}, more steps, or null for the default."
        )
    if schedule.name != "wsd":
        return
    if schedule.decay_fraction == 0 and schedule.final_fraction < 1:
        raise InputError(
            f"schedule.decay_fraction=0 leaves no step to fall to schedule.final_fraction={schedule.final_fraction}.\n"
            "Give schedule.decay_fraction greater than 0, or schedule=constant."
        )
    wanted = (warmup or 0) + round(steps * schedule.decay_fraction)
    if warmup and wanted > steps and "schedule.decay_fraction" in given_keys(config.record.overrides):
        raise InputError(
            f"schedule.warmup_steps={warmup} and schedule.decay_fraction={schedule.decay_fraction:g} take {wanted} "
            f"steps together, more than steps={steps}.\n"
            f"Lower one of them (schedule.decay_fraction to {1 - warmup / steps:.2g} or less), or give more steps."
        )


def check_sweep_only(config: Config) -> None:
    """One run has nothing to run beside it."""
    if config.n_jobs > 1 and not config.record.sweep:
        raise InputError(f"n_jobs={config.n_jobs} is read by sweeps, and this is one run.\nAdd -m, or leave it out.")


def check_init(config: Config) -> None:
    """Only distillation has a teacher to take layers from."""
    if config.init == TEACHER_LAYERS and config.task_name != "distill":
        raise InputError(
            f"init=teacher_layers takes the first weights from a teacher, and task={config.task_name} has none.\n"
            "Use task=distill teacher=…, or name weights (init=RUN_DIR, init=FOLDER), or init=scratch."
        )


def check_model(config: Config) -> None:
    """Heads divide the width; the context fits. With model=auto this waits for init's own sizes."""
    model = config.model
    sizes = (model.n_layer, model.n_head, model.n_embd, model.n_positions)
    if model.n_layer is None or model.n_head is None or model.n_embd is None or model.n_positions is None:
        if sizes != (None,) * 4 or config.record.groups["model"] != "auto":
            raise InputError("model.n_layer, n_head, n_embd and n_positions must all be given, or model=auto.")
        if not config.init_names_weights:
            raise InputError(
                f"model=auto takes its sizes from init, but init={config.init} has none.\nName a model: model=nano."
            )
        return
    check_heads(model.n_embd, model.n_head)
    check_room(config, model.n_positions)
    check_kept_weights(config, model.n_layer)
    check_context(config.context, model.n_positions, f"model {config.record.groups['model']}'s")


def check_heads(width: int, heads: int) -> None:
    if width % heads:
        fitting = [count for count in range(1, width + 1) if width % count == 0]
        near = sorted(sorted(fitting, key=lambda count: abs(count - heads))[:2])
        raise InputError(
            f"model.n_head={heads} does not divide model.n_embd={width}.\n"
            f"Nearest that do: {' and '.join(map(str, near))}."
        )


def check_room(config: Config, positions: int) -> None:
    """Generated text and at least one token of its prompt fit in the model."""
    for key in GENERATED:
        tokens = optional_value(config, key)
        if tokens is not None and tokens >= positions:
            raise InputError(
                f"{key}={tokens} leaves no room for a prompt in the model's {positions} positions.\n"
                f"Give {key}={positions // 2}, or another below {positions}."
            )


def check_kept_weights(config: Config, layers: int) -> None:
    """What keeps its weights has learned something, and at least the last block is left to train.

    Raises:
        InputError: says how many blocks there are, or that weights would stay random.
    """
    frozen = config.task.get("frozen_layers", 0)
    for key, value in {"task.frozen_layers": frozen, "task.lora.rank": config.lora_rank}.items():
        if value and config.init == "scratch":
            raise InputError(
                f"{key}={value} would keep random weights: init=scratch has learned nothing to keep.\n"
                f"Give init=RUN, or leave {key} out."
            )
    if frozen >= layers:
        raise InputError(
            f"task.frozen_layers={frozen} leaves no block to train: the model has {layers}.\n"
            f"Give task.frozen_layers={layers - 1} or less."
        )


def check_context(context: int, positions: int, whose: str) -> None:
    if context > positions:
        raise InputError(
            f"context={context} is longer than {whose} {positions} positions.\n"
            f"Lower context, or set model.n_positions={context} when training from scratch."
        )


def check_batch(config: Config) -> None:
    """A step holds whole windows, and at least one sequence for each rank."""
    if config.takes_pairs:
        rows, key = config.batch_sequences, f"batch_sequences={config.batch_sequences}"
    else:
        rows, rest = divmod(config.batch_tokens, config.context)
        key = f"batch_tokens={config.batch_tokens} ({rows} sequences of context={config.context})"
        if rest or rows == 0:
            near = sorted({max(rows, 1) * config.context, (rows + 1) * config.context})
            raise InputError(
                f"batch_tokens={config.batch_tokens} is not a multiple of context={config.context}.\n"
                f"Nearest: {' or '.join(f'batch_tokens={value}' for value in near)}."
            )
    if isinstance(config.devices, int) and rows < (least := config.devices * config.num_nodes):
        ranks = f"devices={config.devices}" + (f" of num_nodes={config.num_nodes}" if config.num_nodes > 1 else "")
        cure = f"batch_sequences={least}" if config.takes_pairs else f"batch_tokens={least * config.context}"
        raise InputError(f"{key} cannot be shared by {ranks}: each needs a sequence.\nGive {cure} or more.")


def check_files(config: Config) -> None:
    if not config.takes_pairs and config.data.get("source") in ("text", "bin") and not config.path:
        kind = "a folder with train.bin and val.bin" if config.data["source"] == "bin" else "a file, a folder or a glob"
        raise InputError(f"data={config.record.groups['data']} needs path=…: {kind}.")
    for key in FILES:
        given = str(value_of(config, key))
        found = os.path.expanduser(given)  # noqa: PTH111 — a glob is no path
        if given and not glob.glob(found, recursive=True):  # noqa: PTH207
            raise InputError(f"{key}={given}: there is no such file or folder{_nearest_file(Path(found))}.")


def _nearest_file(path: Path) -> str:
    """The nearest name in the folder where the path would lie."""
    folder = path.parent
    return nearest(path.name, (entry.name for entry in folder.iterdir())) if folder.is_dir() else ""


def check_precision(config: Config) -> None:
    if config.precision == "fp16" and config.accelerator == "cpu":
        refuse_fp16_on_cpu()
    if config.precision == "fp8" and config.lora_rank:
        raise InputError(
            "precision=fp8 takes matrices whose sides are multiples of 16, and LoRA's are as narrow as its rank.\n"
            "Set precision=bf16, or task.lora.rank=0."
        )


def refuse_fp16_on_cpu() -> None:
    raise InputError(
        "precision=fp16 needs a GPU: a CPU computes no fp16 matrix products, and Lightning would silently take bf16.\n"
        "Set precision=bf16 or precision=fp32."
    )


def check_layer_drop(config: Config) -> None:
    """Ranks that share each block's weights must all go through the same blocks."""
    if config.layer_drop and config.strategy == "fsdp":
        raise InputError(
            "layer_drop draws on each rank which blocks it leaves out, and with strategy=fsdp all must run the same.\n"
            "Leave layer_drop out, or use strategy=ddp."
        )


def check_task_and_data(config: Config) -> None:
    if config.task_name == "finetune" and not config.takes_pairs:
        raise InputError(
            f"task=finetune trains on pairs of prompt and response; data={config.record.groups['data']} has none.\n"
            "Use data=pairs (or summarize, complete, …), or go on pretraining: task=pretrain init=… data=…"
        )


def check_targets(config: Config) -> None:
    """Bind every `_target_`'s keys to its constructor."""
    check_target(config.task, "task", ARGUMENTS["task"])
    check_target(config.data, "data", ARGUMENTS["data"], DATA_ONLY_KEYS)
    for name, node in config.callbacks.items():
        if node is None:
            continue
        if not isinstance(node, dict) or "_target_" not in node:
            raise InputError(
                f"callbacks.{name}={node} is no callback.\n"
                f"Give its keys, callbacks.{name}.KEY=VALUE, or null to leave it out."
            )
        check_target(node, f"callbacks.{name}", ARGUMENTS["callbacks"])
    if config.logger:
        check_target(config.logger, "logger", ARGUMENTS["logger"])


def check_run_dir(config: Config) -> None:
    """The name is plain and the folder can be made."""
    run_dir.check_name(config)
    if config.resume is None and config.run_dir is not None:
        run_dir.check_free(Path(config.run_dir).expanduser())
