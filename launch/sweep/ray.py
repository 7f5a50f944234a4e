"""RayJobs: runs as actors of a Ray cluster, on whichever machine has room; they end with who started them."""

import logging
import os
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpt2lab.errors import InputError
from launch import exit_codes
from launch.checks import resource_request
from launch.config.multirun_settings import LauncherSettings
from launch.config.schema import RunConfig
from launch.sweep.cluster_executor import ClusterJobs
from launch.sweep.cluster_task import ClusterTask
from launch.sweep.job_process import JobProcess

CARRIED = ("GPT2LAB_", "HF_", "WANDB_", "OMP_WAIT_POLICY")  # variables that go with a job to another machine
# A cluster that is started here sends nothing to the network, does not put its workers behind all other processes, and
# does not warn that it hides GPUs.
OF_RAY = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
NO_RESTART = {"max_restarts": 0, "max_task_retries": 0}  # what it takes to go on is in the run directory, not in Ray


class Worker:
    """The actor: holds one run's process, beside which a second thread hands signals on."""

    def __init__(self, environment: dict[str, str]) -> None:
        os.environ |= environment
        self._process: JobProcess | None = None
        self._early: list[int] = []

    def run(self, task: ClusterTask) -> tuple[int, str]:
        """(exit code, error it told) of the run."""
        self._process = task.start()
        for number in self._early:
            self._process.signal(number)
        return self._process.wait()

    def signal(self, number: int) -> None:
        """Hand a signal on."""
        if self._process is None:
            self._early.append(number)
        else:
            self._process.signal(number)


class RayJob:
    """A run that was handed over.

    Args:
        actor: the worker that has it.
        outcome: reference to what that will say.
    """

    def __init__(self, actor: Any, outcome: Any) -> None:
        self._actor, self._reference = actor, outcome
        self._begun = actor.__ray_ready__.remote()
        self._outcome: tuple[int, str] | None = None

    def signal(self, number: int) -> None:
        """Send it a signal; one that has no machine yet is withdrawn."""
        import ray

        if self.ended() is not None:
            return
        if ray.wait([self._begun], timeout=0)[0]:
            self._actor.signal.remote(number)
        else:
            ray.kill(self._actor)
            self._outcome = exit_codes.code_of_signal(number), ""

    def ended(self) -> tuple[int, str] | None:
        """(exit code, error it told) once it has ended."""
        import ray

        if self._outcome is None and ray.wait([self._reference], timeout=0)[0]:
            try:
                self._outcome = ray.get(self._reference)
            except ray.exceptions.RayError as error:
                self._outcome = exit_codes.FAILED, _in_one_line(error)
            ray.kill(self._actor)
        return self._outcome


def _in_one_line(error: Exception) -> str:
    return "its Ray worker was lost: " + " ".join(str(error).split())[:300]


class RayJobs(ClusterJobs):
    """Makes an actor of each run.

    Args:
        launcher: which cluster; what a job asks for stands in its own settings.

    Raises:
        InputError: no Ray is installed, or the cluster does not answer.
    """

    def __init__(self, launcher: LauncherSettings, at_once: int, logs: Path) -> None:
        super().__init__(at_once, logs)
        if find_spec("ray") is None:
            raise InputError("launcher=ray needs Ray.\nInstall it: .venv/bin/pip install 'ray>=2.50'")
        for name, value in OF_RAY.items():
            os.environ.setdefault(name, value)
        import ray

        previous = signal.getsignal(signal.SIGTERM)  # which Ray replaces
        try:
            ray.init(
                address=launcher.address,
                include_dashboard=False if launcher.address == "local" else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(
                f"launcher.address={launcher.address}: no Ray cluster answers there ({str(error).splitlines()[0]}).\n"
                "Start one with `ray start --head`, or give launcher.address=local."
            ) from None
        finally:
            signal.signal(signal.SIGTERM, previous)

    def submit(self, config: RunConfig, output: Path, errors: Path) -> RayJob:
        """Hand over a run whose output goes to these files.

        Raises:
            InputError: no machine of the cluster is large enough.
        """
        import ray

        machines, launcher = resource_request.request_from(config), config.launcher
        asked = {"CPU": launcher.cpus * machines.devices, "GPU": machines.gpus}
        memory = None if launcher.memory is None else int(launcher.memory * 2**30)
        if launcher.address == "local":
            _check_fits(ray.nodes(), {**asked, "memory": memory or 0})
        actor: Any = ray.remote(Worker).options(
            num_cpus=asked["CPU"], num_gpus=asked["GPU"], memory=memory, max_concurrency=2, **NO_RESTART
        )
        worker: Any = actor.remote({key: value for key, value in os.environ.items() if key.startswith(CARRIED)})
        return self._noted(RayJob(worker, worker.run.remote(ClusterTask.from_config(config, output, errors))))

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        import ray

        ray.shutdown()


def _check_fits(nodes: list[dict[str, Any]], asked: dict[str, float]) -> None:
    """Ray would let a job that nothing can ever hold wait for ever; elsewhere a cluster may grow."""
    offered = [node["Resources"] for node in nodes if node["Alive"]]
    if not any(all(resources.get(key, 0) >= value for key, value in asked.items()) for resources in offered):
        wanted = ", ".join(f"{value:g} {key}" for key, value in asked.items() if value)
        largest = {key: max((resources.get(key, 0) for resources in offered), default=0) for key in asked}
        most = ", ".join(f"{value:g} {key}" for key, value in largest.items())
        raise InputError(
            f"A job asks for {wanted}, and no machine of this Ray cluster has that (at most {most}).\n"
            "Lower devices, launcher.cpus or launcher.memory."
        )
