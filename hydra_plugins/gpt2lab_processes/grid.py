"""Grid: Hydra's basic sweeper, except that a combination that cannot be composed is left to the launcher to record."""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore


@dataclass
class GridConf:
    """Selected by conf/launcher/processes.yaml."""

    _target_: str = "hydra_plugins.gpt2lab_processes.grid.GridSweeper"
    max_batch_size: int | None = None
    params: dict[str, str] | None = None


ConfigStore.instance().store(group="hydra/sweeper", name="grid", node=GridConf, provider="gpt2lab")


class GridSweeper(BasicSweeper):
    """Every combination of the comma-separated values."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Accept all: one misspelt value must not stop the other jobs."""
