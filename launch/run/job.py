"""Job: one run from its configuration to its report; as a program, a run or one of its ranks in a separate process.

python -m launch.run.job FILE PARENT          a job of a sweep, FILE its configuration; it ends with process PARENT
                                                  --cores 0,1 keeps it and its ranks to these cores
                                                  --allow-targets a,b.C passes on the permissions of who starts it
python -m launch.run.job FILE PARENT --rank   one rank of a run on several devices, FILE its config.yaml
python -m launch.run.job FILE PARENT --check  find a user error that all configurations in FILE's folder share
"""

import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch import exit_codes

if __name__ == "__main__":
    exit_codes.exit_on_early_signal()

from gpt2lab.errors import InputError, RunError
from gpt2lab.system.determinism import fix_cublas_workspace
from gpt2lab.system.heartbeat import FolderBoard, Heartbeat
from launch import logging_setup, rank_environment
from launch.checks import checks
from launch.config import plugins, run_dir, run_spec
from launch.config.run_dir import RunDirectory
from launch.config.run_spec import PreparedSpec, RunSpec
from launch.config.schema import RunConfig, with_absolute_paths, with_size_defaults, with_steps
from launch.config.unused_keys import given_keys
from launch.distributed import child_processes, multi_node
from launch.run import disk_space, resolve, resume
from launch.run.resume import Existing

log = logging.getLogger("launch.run.job")  # not __name__, which is __main__ in a job's own process


def run(config: RunConfig) -> dict[str, Any]:
    """Resolve a configuration, prepare its data and train; with plan=true only print what that takes.

    Returns:
        The report, and `watched`, the value of the metric that the run is judged by, for the exported weights.

    Raises:
        InputError: invalid configuration or input; then no run directory is left behind.
        exit_codes.Exit: stopped by a signal, after saving.
    """
    logging_setup.configure_logging(is_main=rank_environment.is_main_process())
    fix_cublas_workspace(config.trainer.get("deterministic"))
    with closing(RunDirectory()) as directory:
        if rank_environment.is_cluster_rank():
            return _run_cluster_rank(config, directory)
        return _run_here(config, directory)


def _run_here(config: RunConfig, directory: RunDirectory) -> dict[str, Any]:
    spec, existing = resume_or_resolve(config, directory)
    if config.plan:
        from launch.run.plan_report import plan_report

        print(plan_report(spec), flush=True)
        return {"watched": None}
    multi_node.check(replace(spec.config, num_nodes=spec.machine.num_nodes))  # a resumed run keeps its machines
    from launch.run.prepare import prepare_data

    data, facts, spec = prepare_data(spec, existing)
    if spec.machine.world_size > 1 or config.max_restarts:
        from launch.distributed import local_ranks

        with disk_space.convert_full_disk(directory):
            report = local_ranks.run(spec, directory)
    else:
        from launch.run.train import train

        with _named_checkpoint(directory, spec.config.steps):
            report = train(spec, data, facts, directory)
    _upload(spec, directory)
    show_end(spec, report, directory)
    return report


@contextmanager
def _named_checkpoint(directory: RunDirectory, planned: int) -> Iterator[None]:
    """Add the newest checkpoint and the resume command to an unexpected error, below its traceback."""
    try:
        yield
    except (InputError, RunError):
        raise
    except Exception as error:
        if directory.path is not None and directory.path.is_dir():
            error.add_note(run_dir.kept_checkpoint_message(directory.path, planned))
        raise


def _upload(spec: RunSpec, directory: RunDirectory) -> None:
    """Upload the model to the Hub if that is requested; a failure does not fail the run."""
    if spec.config.hub.push is not None:
        from launch.run.hub_upload import upload_finished

        assert directory.path is not None
        upload_finished(spec.config.hub, directory.path)


def common_start_error(configs: Sequence[RunConfig]) -> str:
    """Return the user error that ends all of these runs before their first step; empty: one starts, or errors differ.

    Inputs are resolved and the text is prepared as by a run, without a run directory and without a teacher's work.
    """
    from launch.run.prepare import prepare_text

    logging_setup.configure_logging(is_main=False)  # the runs themselves log notices
    common = ""
    for config in configs:
        try:
            with closing(RunDirectory()) as directory:
                prepare_text(resume_or_resolve(replace(config, resume=None), directory)[0], None)
        except Exception as error:
            message = str(exit_codes.as_input_error(error) or "")
            if message and common in ("", message):
                common = message
                continue
        return ""
    return common


def resume_or_resolve(config: RunConfig, directory: RunDirectory) -> tuple[RunSpec, Existing | None]:
    """Return the run with nothing left open, and what an existing directory holds of it; that is locked first."""
    folder = resume.existing_folder(config)
    if folder is not None and not config.plan:
        directory.open(folder)
    existing = resume.existing_run(config, folder)
    if existing is not None:
        if existing.checkpoint:
            resume.warn_of_other_masks(existing)
        elif not config.plan:
            log.warning("%s has no checkpoint: the run begins again at step 0.", existing.folder)
        return existing.spec, existing
    if folder is None:
        run_dir.check_run_folder(config)
    config = with_given_length(with_absolute_paths(config))
    inputs = resolve.resolve_inputs(config)
    from launch.run import auto_settings

    logging_setup.silence_libraries()
    config = with_size_defaults(config, inputs.model, auto_settings.chosen_accelerator(config) == "gpu")
    checks.check_sizes(config, inputs.model)
    resolve.check_teacher_context(config, inputs.teacher)
    machine = auto_settings.choose_machine(config, inputs, auto_settings.free_memory(config))
    return RunSpec(config, run_spec.Resolved(**vars(inputs), machine=machine)), None


def with_given_length(config: RunConfig) -> RunConfig:
    """Return the configuration with the steps of trainer.fast_dev_run, or without the epochs of a recipe.

    The learning rate schedule then follows the steps that are trained.
    """
    if steps := int(config.trainer.get("fast_dev_run") or 0):
        return replace(with_steps(config, steps), epochs=None)
    given = given_keys(config.invocation.overrides)
    return replace(config, epochs=None) if "steps" in given and "epochs" not in given else config


def _run_cluster_rank(config: RunConfig, directory: RunDirectory) -> dict[str, Any]:
    """Run one rank that torchrun or srun has started: rank 0 prepares everything, the others receive it."""
    from launch.run.prepare import prepare_data, prepared_data
    from launch.run.train import train

    multi_node.set_torchrun_variables()
    rendezvous = multi_node.Rendezvous(config.rank_timeout)
    if rendezvous.rank == 0:
        with rendezvous.preparing():
            spec, existing = resume_or_resolve(multi_node.with_started_world(config), directory)
            data, facts, spec = prepare_data(spec, existing)
            folder = directory.enter(spec, is_resumed=existing is not None and existing.checkpoint is not None)
        rendezvous.send(spec, folder)
    else:
        spec, folder = rendezvous.receive()
        spec = with_permissions(spec, config.allow_targets)
        fix_cublas_workspace(spec.config.trainer.get("deterministic"))
        directory = RunDirectory(given=folder)
        data, facts = prepared_data(spec)
    try:
        with rendezvous.training(spec) as heartbeat:
            report = train(spec, data, facts, directory, heartbeat)
    except RuntimeError as error:
        if not multi_node.is_lost_connection(error):
            raise
        raise _lost_connection(error, rendezvous.rank, folder.absolute(), spec.config.steps) from None
    if rendezvous.rank == 0:
        _upload(spec, directory)
        show_end(spec, report, directory)
    return report


def with_permissions(spec: PreparedSpec, allow_targets: list[str]) -> PreparedSpec:
    """Return a stored run with the permissions of this command, which config.yaml never holds; import its plugins."""
    plugins.load(spec.config.plugins, allow_targets)
    return replace(spec, config=replace(spec.config, allow_targets=allow_targets))


def _lost_connection(error: Exception, rank: int, folder: Path, planned: int) -> exit_codes.Exit:
    """The end of a rank that torchrun or srun has started, after another one has ended."""
    from launch.distributed import local_ranks

    local_ranks.log_lost_connection(error, folder)
    if rank > 1:  # rank 0 or, where that is the one that ended, rank 1 prints it
        return exit_codes.Exit(exit_codes.FAILED)
    failure = f"The run failed: rank {rank} lost its connection to a rank that ended; see {folder / local_ranks.LOGS}."
    return exit_codes.Exit(exit_codes.FAILED, f"{run_dir.kept_checkpoint_message(folder, planned)}\n{failure}")


def show_end(spec: PreparedSpec, report: dict[str, Any], directory: RunDirectory) -> None:
    """Print the results of a run and the next commands."""
    from launch.run import run_panels

    assert directory.path is not None
    run_panels.show_end(spec, report, directory.path)


def _run_rank(file: Path, allow_targets: list[str]) -> None:
    from launch.distributed import local_ranks
    from launch.run.prepare import prepared_data
    from launch.run.train import train

    rank = int(os.environ["RANK"])
    heartbeat = Heartbeat(FolderBoard(Path(os.environ[rank_environment.HEARTBEATS])), rank)
    logging_setup.configure_logging(is_main=rank == 0)
    spec = with_permissions(run_spec.load(file), allow_targets)
    try:
        data, facts = prepared_data(spec)
        watched = train(spec, data, facts, RunDirectory(given=file.parent), heartbeat)["watched"]
    except exit_codes.Exit as ended:
        # Exit code 0: any other means to the parent that this rank died, and it would kill the rest while they save.
        local_ranks.record_outcome(int(ended.code or 0), ended.message)
        heartbeat.done()
    except Exception as error:
        user_error = exit_codes.as_input_error(error)
        if user_error is None:
            if local_ranks.has_user_error():
                raise exit_codes.Exit(exit_codes.FAILED) from None  # because of another rank's error, which is printed
            local_ranks.record_failure()
            if multi_node.is_timeout(error):
                heartbeat.report_timeout()
            if rank == 0 and multi_node.is_lost_connection(error):
                local_ranks.log_lost_connection(error, file.parent)
                raise exit_codes.Exit(exit_codes.FAILED) from None
            raise
        local_ranks.record_outcome(exit_codes.USER_ERROR, f"error: {user_error}")
        raise exit_codes.Exit(exit_codes.USER_ERROR) from None  # the others may wait for this rank
    else:
        try:
            local_ranks.record_outcome(exit_codes.FINISHED, watched=watched)
        except OSError as error:  # the run is complete; the parent reads its report instead
            log.warning("The outcome of this run could not be written: %s", error)
        heartbeat.done()


def _run_for_a_sweep(file: Path, allow_targets: list[str]) -> None:
    """Run a job; the sweep's process reads from beside its configuration why it failed."""
    error_file = file.with_name(exit_codes.ERROR_FILE)
    try:
        config = run_spec.from_yaml(RunConfig, file.read_text(encoding="utf-8"), str(file))
        plugins.load(config.plugins, allow_targets)
        run(replace(config, allow_targets=allow_targets))
    except exit_codes.Exit as ended:
        if ended.code in (exit_codes.FAILED, exit_codes.USER_ERROR):  # of several ranks, which have printed it already
            error_file.write_text(ended.message.removeprefix("error: "), encoding="utf-8")
        raise
    except Exception as error:
        user_error = exit_codes.as_input_error(error)
        error_file.write_text(str(user_error or f"{type(error).__name__}: {error}"), encoding="utf-8")
        raise


def _check_starts(file: Path, allow_targets: list[str]) -> None:
    """Write the user error that all configurations in the file's folder share, if there is one."""
    texts = {one: one.read_text(encoding="utf-8") for one in sorted(file.parent.glob("*.yaml"))}
    configs = [run_spec.from_yaml(RunConfig, text, str(one)) for one, text in texts.items()]
    for config in configs:
        plugins.load(config.plugins, allow_targets)
    common = common_start_error([replace(config, allow_targets=allow_targets) for config in configs])
    file.with_name(exit_codes.ERROR_FILE).write_text(common, encoding="utf-8")


def _program(file: str, parent: str, *flags: str) -> None:
    child_processes.die_with_parent(int(parent))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, exit_codes.SIGNALS)  # Ray blocks some in all that it starts
    if "--cores" in flags:  # before torch counts them
        os.sched_setaffinity(0, [int(core) for core in flags[flags.index("--cores") + 1].split(",")])
    permitted = flags[flags.index("--allow-targets") + 1] if "--allow-targets" in flags else ""
    start = {"--rank": _run_rank, "--check": _check_starts}.get(next(iter(flags), ""), _run_for_a_sweep)
    start(Path(file), [target for target in permitted.split(",") if target])


if __name__ == "__main__":
    exit_codes.run_and_exit(lambda: _program(*sys.argv[1:]))
