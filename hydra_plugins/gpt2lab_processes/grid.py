"""Grid: Hydra's basic sweeper, except that the launcher records combinations that cannot be composed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override

from gpt2lab.errors import InputError
from gpt2lab.storage.atomic_files import add_filename_when_full

# For conf/hparams_search/none.yaml
NODE = {"_target_": "hydra_plugins.gpt2lab_processes.grid.GridSweeper", "max_batch_size": None, "params": None}
ConfigStore.instance().store(group="hydra/sweeper", name="grid", node=NODE, provider="gpt2lab")


class GridSweeper(BasicSweeper):
    """Sweep over every combination of the comma-separated values."""

    def sweep(self, arguments: list[str]) -> Any:
        """Run the base's sweep, which first writes multirun.yaml; a refused sweep leaves that file as it was."""
        assert self.config is not None
        file = Path(str(self.config.hydra.sweep.dir), "multirun.yaml")
        before = file.read_bytes() if file.is_file() else None
        try:
            with add_filename_when_full(file):  # a full disk
                return super().sweep(arguments)
        except InputError:
            if before is not None:
                file.write_bytes(before)
            elif not file.with_name("sweep.csv").exists():
                file.unlink(missing_ok=True)
            raise

    @staticmethod
    def split_arguments(overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        """Split into jobs as the base does.

        Raises:
            InputError: an override is an interval, which has no combinations.
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
        """Accept all, so that one misspelt value does not stop the other jobs."""
