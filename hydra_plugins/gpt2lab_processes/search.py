"""Search: sweeper that passes a multirun to launch.sweep.optuna_search, where Optuna suggests each job's values."""

from hydra.core.config_store import ConfigStore
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

NODE = {"_target_": "hydra_plugins.gpt2lab_processes.search.OptunaSweeper"}  # for conf/hparams_search/optuna.yaml
ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=NODE, provider="gpt2lab")


class OptunaSweeper(Sweeper):
    """Sweeper that starts the next job as soon as one ends; Hydra's batches wait for the slowest."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store the loader that composes a job's configuration."""
        self.config_loader = hydra_context.config_loader
        self.config = config

    def sweep(self, arguments: list[str]) -> None:
        """Run the search to its end."""
        assert self.config is not None
        from launch.sweep.optuna_search import run_search

        run_search(self.config_loader, self.config, arguments)
