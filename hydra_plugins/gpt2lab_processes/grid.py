"""Grid: Hydra's basic sweeper, except that a combination that cannot be composed is left to the launcher to record."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override

from gpt2lab.errors import InputError
from gpt2lab.storage.atomic_files import naming_full_file


@dataclass
class GridConf:
    """Selected by conf/hparams_search/none.yaml."""

    _target_: str = "hydra_plugins.gpt2lab_processes.grid.GridSweeper"
    max_batch_size: int | None = None
    params: dict[str, str] | None = None


ConfigStore.instance().store(group="hydra/sweeper", name="grid", node=GridConf, provider="gpt2lab")


class GridSweeper(BasicSweeper):
    """Every combination of the comma-separated values."""

    def sweep(self, arguments: list[str]) -> Any:
        """As the base's, which writes multirun.yaml without naming it in an error."""
        assert self.config is not None
        with naming_full_file(Path(str(self.config.hydra.sweep.dir), "multirun.yaml")):
            return super().sweep(arguments)

    @staticmethod
    def split_arguments(overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        """As the base's.

        Raises:
            InputError: an interval, which has no combinations.
        """
        for override in overrides:
            if override.is_interval_sweep():
                raise InputError(
                    f"{override.input_line} is a range without steps, and a grid needs values.\n"
                    f"Add hparams_search=optuna to search it, or list values: {override.get_key_element()}=A,B,C."
                )
        chunks: list[list[list[str]]] = BasicSweeper.split_arguments(overrides, max_batch_size)
        return chunks

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Accept all: one misspelt value must not stop the other jobs."""
