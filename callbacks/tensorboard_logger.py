"""TensorBoard: metrics, configuration and sample texts under `<run_dir>/tensorboard`."""

import json
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from gpt2lab.sample_file import Sample


class TensorBoard(TensorBoardLogger):
    """Lightning's own, at home in the run directory."""

    def __init__(self, run_dir: str) -> None:
        super().__init__(save_dir=run_dir, name="tensorboard", version="", default_hp_metric=False)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any], *_unused: Any) -> None:
        self.experiment.add_text("config", f"```json\n{json.dumps(params, indent=2, default=str)}\n```")

    @rank_zero_only
    def log_samples(self, samples: list[Sample], step: int) -> None:
        text = "\n\n".join(f"**{s.method}**\n```\n{s.prompt}{s.written}\n```" for s in samples)
        self.experiment.add_text("samples", text, step)
