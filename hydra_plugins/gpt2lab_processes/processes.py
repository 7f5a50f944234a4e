"""Processes: Hydra's launcher for multiruns, which hands the jobs to launch.sweep.grid."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from launch.config.run_dir import missing


@dataclass
class ProcessesConf:
    """Selected by conf/launcher/processes.yaml."""

    _target_: str = "hydra_plugins.gpt2lab_processes.processes.ProcessesLauncher"


ConfigStore.instance().store(group="hydra/launcher", name="processes", node=ProcessesConf, provider="gpt2lab")


class ProcessesLauncher(Launcher):
    """Runs each job in fresh processes."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what composes a job's configuration; the task function itself runs in none of our processes."""
        self.config_loader = hydra_context.config_loader
        self.config = config
        self.made = missing(Path(str(config.hydra.sweep.dir)))  # Hydra creates these before it calls `launch`

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs and report on every one, failed or not."""
        from launch.sweep.grid import run_grid

        jobs = [list(job) for job in job_overrides]
        return run_grid(self.config_loader, self.config, jobs, initial_job_idx, self.made)
