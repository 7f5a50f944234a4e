"""RayJobs: executor that runs each job as an actor of a Ray cluster; the actors end with this process."""

import contextlib
import logging
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpt2lab.errors import InputError
from gpt2lab.system.socket_folder import short_folder
from launch import exit_codes
from launch.checks import resource_request
from launch.config.multirun_settings import LauncherSettings
from launch.config.schema import RunConfig
from launch.distributed import child_processes
from launch.sweep.cluster_task import ClusterTask
from launch.sweep.executor import Executor
from launch.sweep.job_process import JobProcess

# Prefixes of environment variables that are copied to workers
FORWARDED_VARIABLES = ("GPT2LAB_", "HF_", "WANDB_", "OMP_WAIT_POLICY")
# For a cluster started here: no usage statistics, normal priority of workers, no warning about hidden GPUs
RAY_VARIABLES = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
# Folder that Ray puts on the module search path of its workers: the working directory may contain a `random.py`
MODULES = child_processes.ROOT if child_processes.IS_CHECKOUT else Path(sys.prefix)
SOCKET = len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store") + 5  # below RAY_TMPDIR
NO_RESTART = {"max_restarts": 0, "max_task_retries": 0}  # runs resume from their run directory, not through Ray


class Worker:
    """Ray actor that runs one job in a subprocess; a second thread of the actor forwards signals."""

    def __init__(self, environment: dict[str, str]) -> None:
        os.environ |= environment
        self._process: JobProcess | None = None
        self._pending_signals: list[int] = []

    def run(self, task: ClusterTask) -> tuple[int, str]:
        """Run the job; return (exit code, error message or "")."""
        self._process = task.start()
        for number in self._pending_signals:
            self._process.signal(number)
        return self._process.wait()

    def signal(self, number: int) -> None:
        """Forward a signal, once the process has started."""
        if self._process is None:
            self._pending_signals.append(number)
        else:
            self._process.signal(number)


class RayJob:
    """A submitted job.

    Args:
        actor: handle of its `Worker`.
        result: object reference of `Worker.run`.
    """

    def __init__(self, actor: Any, result: Any) -> None:
        self._actor, self._result = actor, result
        self._ready = actor.__ray_ready__.remote()
        self._outcome: tuple[int, str] | None = None

    def signal(self, number: int) -> None:
        """Send a signal to the job; cancel it if it is still pending."""
        import ray

        if self.ended() is not None:
            return
        if ray.wait([self._ready], timeout=0)[0]:
            self._actor.signal.remote(number)
        else:
            ray.kill(self._actor)
            self._outcome = exit_codes.signal_exit_code(number), ""

    def ended(self) -> tuple[int, str] | None:
        """Return (exit code, error message or ""), or None while it runs."""
        import ray

        if self._outcome is None and ray.wait([self._result], timeout=0)[0]:
            try:
                self._outcome = ray.get(self._result)
            except ray.exceptions.RayError as error:
                self._outcome = exit_codes.FAILED, "its Ray worker was lost: " + " ".join(str(error).split())[:300]
            ray.kill(self._actor)
        return self._outcome


class RayJobs(Executor):
    """Executor that submits each job as a Ray actor.

    Args:
        launcher: address of the cluster; the resource request is in the settings of each job.

    Raises:
        InputError: Ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, launcher: LauncherSettings, max_jobs: int, logs: Path) -> None:
        super().__init__(max_jobs, logs)
        if find_spec("ray") is None:
            raise InputError("launcher=ray needs Ray.\nInstall it: .venv/bin/pip install 'ray>=2.50'")
        for name, value in RAY_VARIABLES.items():
            os.environ.setdefault(name, value)
        if launcher.address == "local":
            os.environ.setdefault("RAY_TMPDIR", short_folder(SOCKET))
        import ray

        previous = signal.getsignal(signal.SIGTERM)  # Ray replaces this handler
        try:
            with contextlib.chdir(MODULES):
                ray.init(
                    address=launcher.address,
                    include_dashboard=False if launcher.address == "local" else None,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(
                f"launcher.address={launcher.address}: no Ray cluster found ({str(error).splitlines()[0]}).\n"
                "Start one with `ray start --head`, or give launcher.address=local."
            ) from None
        finally:
            signal.signal(signal.SIGTERM, previous)

    def submit(self, config: RunConfig, output: Path, errors: Path) -> RayJob:
        """Submit a run; its stdout and stderr go to these files.

        Raises:
            InputError: no machine of the cluster is large enough.
        """
        import ray

        machines, launcher = resource_request.request_from(config), config.launcher
        request = {"CPU": launcher.cpus * machines.devices, "GPU": machines.gpus}
        memory = None if launcher.memory is None else int(launcher.memory * 2**30)
        if launcher.address == "local":
            _check_fits(ray.nodes(), {**request, "memory": memory or 0})
        actor: Any = ray.remote(Worker).options(
            num_cpus=request["CPU"], num_gpus=request["GPU"], memory=memory, max_concurrency=2, **NO_RESTART
        )
        environment = {key: value for key, value in os.environ.items() if key.startswith(FORWARDED_VARIABLES)}
        environment |= child_processes.module_path()
        worker: Any = actor.remote(environment)
        return RayJob(worker, worker.run.remote(ClusterTask(config, output, errors)))

    def close(self) -> None:
        """Disconnect from the cluster; stop it if it was started here."""
        import ray

        ray.shutdown()


def _check_fits(nodes: list[dict[str, Any]], request: dict[str, float]) -> None:
    """Check the resource request in a local cluster, in which a job that does not fit would wait forever.

    Raises:
        InputError: no machine is large enough.
    """
    available = [node["Resources"] for node in nodes if node["Alive"]]
    if not any(all(resources.get(key, 0) >= value for key, value in request.items()) for resources in available):
        requested = ", ".join(f"{value:g} {key}" for key, value in request.items() if value)
        largest = {key: max((resources.get(key, 0) for resources in available), default=0) for key in request}
        most = ", ".join(f"{value:g} {key}" for key, value in largest.items())
        raise InputError(
            f"A job requests {requested}, but no machine of this Ray cluster has that (at most {most}).\n"
            "Lower devices, launcher.cpus or launcher.memory."
        )
