"""Processes: Hydra launcher for multiruns that passes the jobs to launch.sweep.grid."""

from collections.abc import Sequence
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from launch.config.run_dir import missing_folders

NODE = {"_target_": "hydra_plugins.gpt2lab_processes.processes.ProcessesLauncher"}  # for conf/launcher/processes.yaml
ConfigStore.instance().store(group="hydra/launcher", name="processes", node=NODE, provider="gpt2lab")


class ProcessesLauncher(Launcher):
    """Launcher that runs each job in new processes."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store the loader that composes a job's configuration; the task function is not used."""
        self.config_loader = hydra_context.config_loader
        self.config = config
        self.created = missing_folders(Path(str(config.hydra.sweep.dir)))  # Hydra creates them before `launch`

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs and return a result for each, failed or not."""
        from launch.sweep.grid import run_grid

        jobs = [list(job) for job in job_overrides]
        return run_grid(self.config_loader, self.config, jobs, initial_job_idx, self.created)
