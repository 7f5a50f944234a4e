"""Configuration checks that need no data, model or device, and run before heavy imports; one function each."""

import re
from pathlib import Path

from gpt2lab.errors import InputError
from gpt2lab.evaluation import lm_eval_harness
from gpt2lab.model.student_shape import TEACHER_LAYERS
from gpt2lab.settings import profiled_steps
from gpt2lab.storage.hub import is_hub_id
from gpt2lab.storage.model_folder import resolve_model_folder
from gpt2lab.storage.path_patterns import matching_paths
from launch.checks import (
    baseline,
    distillation,
    hub,
    lightning_nodes,
    objective,
    resource_request,
    sharding,
    study_plan,
)
from launch.config import run_dir
from launch.config.allowed_values import check_value
from launch.config.did_you_mean import nearest
from launch.config.known_keys import check_nodes, known_keys, unknown_key
from launch.config.schema import ModelKeys, RunConfig, optional_value, value_of
from launch.config.unused_keys import check_unused_keys, given_keys
from launch.distributed import multi_node

DURATION = re.compile(r"\d{1,6}:\d\d:\d\d:\d\d", re.ASCII)  # as Lightning reads it
# Keys whose value is a number of generated tokens
GENERATION_KEYS = ("task.text.max_new_tokens", "callbacks.samples.max_new_tokens")
# Keys whose value, if given, must be an existing path
PATH_KEYS = ("path", "val_path")


def check(config: RunConfig) -> None:
    """Run all checks of a composed configuration.

    Raises:
        InputError: the first invalid key or combination.
    """
    check_own_keys(config)
    check_length(config)
    study_plan.check(config)
    check_plan(config)
    check_run_dir(config)
    hub.check(config)
    if config.resume not in (None, "auto"):
        return  # the run uses its stored configuration; launch.run.resume checks the keys that may change
    check_unused_keys(config)
    check_nodes(config.target_nodes)
    lightning_nodes.check(config)
    check_values(config)
    check_profile(config)
    if not config.is_unsized and config.epochs is None:  # else they are counted later
        check_schedule(config)
        check_profiled_steps(config)
    check_deterministic(config)
    check_sweep_only(config)
    multi_node.check(config)
    resource_request.check(config)
    check_init(config)
    check_model(config)
    if not config.is_unsized:
        check_batch(config)
    check_files(config)
    check_precision(config, config.accelerator)
    sharding.check_layer_drop(config, config.strategy.name)
    check_task_and_data(config)
    objective.check(config)
    check_benchmarks(config)
    distillation.check(config)
    baseline.check_run(config)


def check_deterministic(config: RunConfig) -> None:
    """Check that deterministic algorithms are not chosen by their speed."""
    if config.trainer.get("deterministic") and config.trainer.get("benchmark"):
        raise InputError(
            "trainer.benchmark=true chooses algorithms by their measured speed, which differs between runs; "
            "trainer.deterministic=true repeats them.\nGive one of the two."
        )


def check_profile(config: RunConfig) -> None:
    """Check the form of profile, and that PyTorch's profiler is started once."""
    if config.profile is None:
        return
    profiled_steps(config.profile)
    if config.trainer.get("profiler") == "pytorch":
        raise InputError(
            f"profile={config.profile} and trainer.profiler=pytorch both need PyTorch's profiler, which runs once in a "
            "process.\nGive one of the two."
        )


def check_profiled_steps(config: RunConfig) -> None:
    """Check that the run has the steps of profile, once their number is known."""
    if config.profile is None:
        return
    steps = profiled_steps(config.profile)
    if steps.start > config.steps:
        raise InputError(
            f"profile={config.profile} begins after the last step, {config.steps}.\n"
            f"Give profile={max(config.steps - len(steps), 0)}:{len(steps)}, or more steps."
        )


def check_plan(config: RunConfig) -> None:
    """Check that plan=true is given for a single new run."""
    if config.plan and config.is_study:
        raise InputError(
            "plan=true plans one run, but experiment=distill_study starts many.\nPlan one: task=distill plan=true"
        )
    if config.plan and config.resume is not None:
        raise InputError("plan=true plans a new run; a resumed run needs the same memory as before.\nLeave out resume.")
    if config.plan_memory is not None and not (config.plan and config.accelerator == "gpu"):
        raise InputError(
            f"plan_memory={config.plan_memory:g} is the memory of each GPU in a plan for another machine.\n"
            "Add plan=true accelerator=gpu devices=N, or leave it out."
        )


def check_own_keys(config: RunConfig) -> None:
    """Reject `invocation`, which is internal, and `+key` for keys that do not exist."""
    for override, key in zip(config.invocation.overrides, given_keys(config.invocation.overrides), strict=True):
        head, _, rest = key.partition(".")
        known = RunConfig.__dataclass_fields__
        if head == "invocation" or (head not in known and override.startswith("+")):
            raise unknown_key(key, [])
        node = value_of(config, head) if rest and override.startswith("+") else {}
        if not isinstance(node, dict):
            names = [f"{head}.{name}" for name in type(node).__dataclass_fields__]
            if key not in names:
                raise unknown_key(key, names)


def check_sizes(config: RunConfig, model: ModelKeys) -> None:
    """Repeat the checks that depend on sizes which were unknown: those of init, and defaults by size."""
    if config.epochs is None:
        check_schedule(config)
        check_profiled_steps(config)
    if model.n_positions is not None:
        check_context(config.context, model.n_positions, "the model's")
    distillation.check_sequences(config)
    baseline.check_context(config)


def check_length(config: RunConfig) -> None:
    """Check that the length of training is given once, and the limit of its time as a duration."""
    limit = config.trainer.get("max_time")
    if limit is not None and not (isinstance(limit, str) and DURATION.fullmatch(limit)):
        raise InputError(f"trainer.max_time={limit} is no duration.\nGive DD:HH:MM:SS: 00:08:00:00 are eight hours.")
    given = given_keys(config.invocation.overrides)
    if config.epochs is not None and {"steps", "epochs"} <= set(given):
        raise InputError(
            f"steps={config.steps} and epochs={config.epochs:g} both set the length of training.\nGive one of them."
        )


def check_values(config: RunConfig) -> None:
    """Compare every value with the choices and the interval its key declares.

    Raises:
        InputError: a value is not allowed; the message lists the choices or the interval.
    """
    for name, meaning in known_keys().items():
        value = optional_value(config, name)
        if value is None:
            continue
        for given in value if isinstance(value, list) else [value]:
            check_value(name, meaning, given)


def check_schedule(config: RunConfig) -> None:
    """Check that warm-up and decay fit into the steps."""
    schedule, steps, warmup = config.schedule, config.steps, config.schedule.warmup_steps
    if warmup is not None and warmup >= steps:
        raise InputError(
            f"schedule.warmup_steps={warmup} is not less than steps={steps}: no step follows the warm-up.\n"
            f"Give at most schedule.warmup_steps={steps - 1}, more steps, or null for the default."
        )
    if schedule.name != "wsd":
        return
    if schedule.decay_fraction == 0 and schedule.final_fraction < 1:
        raise InputError(
            f"schedule.decay_fraction=0 leaves no step to decay to schedule.final_fraction={schedule.final_fraction}.\n"
            "Give schedule.decay_fraction greater than 0, or schedule=constant."
        )
    total = (warmup or 0) + round(steps * schedule.decay_fraction)
    if warmup and total > steps and "schedule.decay_fraction" in given_keys(config.invocation.overrides):
        raise InputError(
            f"schedule.warmup_steps={warmup} and schedule.decay_fraction={schedule.decay_fraction:g} take {total} "
            f"steps together, more than steps={steps}.\n"
            f"Lower one of them (schedule.decay_fraction to {1 - warmup / steps:.2g} or less), or give more steps."
        )


def check_sweep_only(config: RunConfig) -> None:
    """Check that n_jobs is given in a sweep only."""
    if config.n_jobs > 1 and not config.invocation.sweep:
        raise InputError(f"n_jobs={config.n_jobs} applies to sweeps, but this is a single run.\nAdd -m, or omit it.")


def check_init(config: RunConfig) -> None:
    """Check that init=teacher_layers is given with a teacher."""
    if config.init == TEACHER_LAYERS and config.task_name != "distill":
        raise InputError(
            f"init=teacher_layers copies weights from a teacher, but task={config.task_name} has none.\n"
            "Use task=distill teacher=…, or name weights (init=RUN_DIR, init=FOLDER), or init=scratch."
        )


def check_model(config: RunConfig) -> None:
    """Check the model sizes and the context; with model=auto, `resolve` checks them once `init` is read."""
    model = config.model
    sizes = (model.n_layer, model.n_head, model.n_embd, model.n_positions)
    if model.n_layer is None or model.n_head is None or model.n_embd is None or model.n_positions is None:
        if sizes != (None,) * 4 or config.groups["model"] != "auto":
            raise InputError("model.n_layer, n_head, n_embd and n_positions must all be given, or model=auto.")
        if not config.init_names_weights:
            raise InputError(
                f"model=auto takes its sizes from init, but init={config.init} has none.\nChoose a model: model=nano."
            )
        return
    check_heads(model.n_embd, model.n_head)
    check_prompt_space(config, model.n_positions)
    check_frozen_weights(config, model.n_layer)
    check_context(config.context, model.n_positions, f"model {config.groups['model']}'s")


def check_heads(width: int, heads: int) -> None:
    if width % heads:
        fitting = [count for count in range(1, width + 1) if width % count == 0]
        near = sorted(sorted(fitting, key=lambda count: abs(count - heads))[:2])
        raise InputError(
            f"model.n_head={heads} does not divide model.n_embd={width}.\n"
            f"Nearest that do: {' and '.join(map(str, near))}."
        )


def check_prompt_space(config: RunConfig, positions: int) -> None:
    """Check that the generated text and at least one prompt token fit into the model's positions."""
    for key in GENERATION_KEYS:
        tokens = optional_value(config, key)
        if tokens is not None and tokens >= positions:
            raise InputError(
                f"{key}={tokens} leaves no tokens for a prompt in the model's {positions} positions.\n"
                f"Give {key}={positions // 2}, or another number below {positions}."
            )


def check_frozen_weights(config: RunConfig, layers: int) -> None:
    """Check that frozen weights are pretrained, and that at least the last block is trained.

    Raises:
        InputError: random weights would be frozen, or all blocks.
    """
    frozen = config.task.get("frozen_layers", 0)
    for key, value in {"task.frozen_layers": frozen, "task.lora.rank": config.lora_rank}.items():
        if value and config.init == "scratch":
            raise InputError(
                f"{key}={value} freezes random weights with init=scratch.\nGive init=RUN, or leave {key} out."
            )
    if frozen >= layers:
        raise InputError(
            f"task.frozen_layers={frozen} leaves no block to train: the model has {layers}.\n"
            f"Give task.frozen_layers={layers - 1} or less."
        )


def check_context(context: int, positions: int, owner: str) -> None:
    if context > positions:
        raise InputError(
            f"context={context} is longer than {owner} {positions} positions.\n"
            f"Lower context, or set model.n_positions={context} when training from scratch."
        )


def check_batch(config: RunConfig, devices: int | None = None) -> None:
    """Check that a step consists of whole sequences, at least one per rank.

    Args:
        devices: devices per machine; None: the configured number, unless it is auto.
    """
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
    devices = int(config.devices) if devices is None and config.devices != "auto" else devices
    if devices is not None and rows < (least := devices * config.num_nodes):
        ranks = f"devices={devices}" + (f" of num_nodes={config.num_nodes}" if config.num_nodes > 1 else "")
        enough = f"batch_sequences={least}" if config.takes_pairs else f"batch_tokens={least * config.context}"
        raise InputError(f"{key} cannot be shared by {ranks}: each needs a sequence.\nGive {enough} or more.")


def check_files(config: RunConfig) -> None:
    if not config.takes_pairs and config.data.get("source") in ("text", "bin") and not config.path:
        kind = "a folder with train.bin and val.bin" if config.data["source"] == "bin" else "a file, a folder or a glob"
        raise InputError(f"data={config.groups['data']} needs path=…: {kind}.")
    for key in PATH_KEYS:
        given = str(value_of(config, key))
        if given and not matching_paths(given):
            near = _nearest_file(Path(given).expanduser())
            several = f"\nFor several files give their folder or a glob, {key}='FOLDER/*.txt'." if "," in given else ""
            raise InputError(f"{key}={given}: there is no such file or folder{near}.{several}")


def check_model_folders(config: RunConfig) -> None:
    """Check the local models that `init` and `teacher` name; a Hub id is resolved later, since that may download it."""
    teacher = config.teacher if config.task_name == "distill" else "latest"
    for key, source in (("init", config.init if config.init_names_weights else "latest"), ("teacher", teacher)):
        if source != "latest" and not is_hub_id(source):
            resolve_model_folder(source, key)


def _nearest_file(path: Path) -> str:
    """Suggestion with the most similar name in the same folder."""
    folder = path.parent
    return nearest(path.name, (entry.name for entry in folder.iterdir())) if folder.is_dir() else ""


def check_precision(config: RunConfig, accelerator: str) -> None:
    if config.precision.has_loss_scaling and accelerator == "cpu":
        raise InputError(
            "precision=fp16 needs a GPU: CPUs have no fp16 matrix products, and Lightning would silently use bf16.\n"
            "Set precision=bf16 or precision=fp32."
        )


def check_task_and_data(config: RunConfig) -> None:
    if config.task_name == "finetune" and not config.takes_pairs:
        raise InputError(
            f"task=finetune trains on pairs of prompt and response; data={config.groups['data']} has none.\n"
            "Use data=pairs (or summarize, complete, …), or continue pretraining: task=pretrain init=… data=…"
        )


def check_benchmarks(config: RunConfig) -> None:
    """Check the tasks of callbacks=benchmarks: their package, the objective and the folder of task files."""
    node = config.callbacks.get("benchmarks")
    if node is None:
        return
    if not node["tasks"]:
        raise InputError("callbacks.benchmarks.tasks is empty.\nGive tasks, such as [hellaswag,lambada_openai].")
    lm_eval_harness.check(",".join(node["tasks"]), config.objective.name, "callbacks.benchmarks.tasks")
    if node.get("path") and not Path(node["path"]).expanduser().is_dir():
        raise InputError(
            f"callbacks.benchmarks.path={node['path']}: there is no such folder.\nGive one with task files (.yaml)."
        )


def check_run_dir(config: RunConfig) -> None:
    """Check that `name` is a plain name, and that the run directory is free."""
    run_dir.check_name(config)
    if config.resume is None and config.run_dir is not None:
        run_dir.check_free(Path(config.run_dir).expanduser())
