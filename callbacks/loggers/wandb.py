"""WeightsAndBiases: one W&B run per job, online if this machine is logged in, else offline, without prompts.

After any W&B error a warning is logged once, and training continues without it.
"""

import logging
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from gpt2lab.reports.samples_jsonl import Sample
from gpt2lab.storage.atomic_files import write_text
from gpt2lab.storage.damaged_files import set_aside

log = logging.getLogger(__name__)

RUN_ID = re.compile(r"[0-9A-Za-z_-]+")
INIT_TIMEOUT = 30  # seconds to wait for the server
# Values of WANDB_MODE, in upper or lower case; `run` and `dryrun` are W&B's former names
MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline"}
MODES |= {"shared": "shared", "disabled": "disabled"}
TRUE = ("y", "yes", "t", "true", "on", "1")  # of WANDB_DISABLED, as W&B reads its boolean variables


class WeightsAndBiases(Logger):
    """Logger that writes to `<run_dir>/wandb`. The run id is stored there, so a resumed job continues the W&B run.

    Args:
        project: W&B project; a run has the name of its run directory.
        group: name of the sweep, also a prefix of the run's name.
        mode: auto, or W&B's online, offline or disabled; WANDB_MODE and WANDB_DISABLED take precedence.
    """

    def __init__(self, run_dir: str, project: str = "gpt2-lab", mode: str = "auto", group: str = "") -> None:
        super().__init__()
        self.run_dir = Path(run_dir)
        self.project = project
        self.group = group
        self.mode = mode
        self.run: Any = None
        self._failed = False

    @property
    def name(self) -> str:
        return f"{self.group}-{self.run_dir.name}" if self.group else self.run_dir.name

    @property
    def version(self) -> str:
        """The W&B run id."""
        file = self.run_dir / "wandb" / "run-id"
        known = file.read_bytes().decode(errors="replace") if file.is_file() else ""
        if known and RUN_ID.fullmatch(known):
            return known
        if os.path.lexists(file):
            log.warning("%s is damaged, so a new W&B run is started; it was renamed to %s.", file, set_aside(file).name)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, secrets.token_hex(4))
        return file.read_text()

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any]) -> None:
        self._guarded(lambda run: run.config.update(params, allow_val_change=True))

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        values = {name: value for name, value in metrics.items() if name != "epoch"}
        self._guarded(lambda run: run.log({**values, "step": step}))

    @rank_zero_only
    def log_samples(self, samples: list[Sample], step: int) -> None:
        rows = [[sample.step, sample.method, sample.prompt, sample.completion] for sample in samples]
        columns = ["step", "method", "prompt", "completion"]
        self._guarded(lambda run: run.log({"samples": wandb.Table(columns=columns, data=rows), "step": step}))

    @rank_zero_only
    def log_score(self, score: dict[str, float], step: int) -> None:
        """Add the score to the summary, by which W&B's tables sort runs."""
        self._guarded(lambda run: run.summary.update(score))

    @rank_zero_only
    def log_model(self, folder: Path) -> None:
        """Log the folder as an artifact; immutable, so that its files are not copied first."""

        def attach(run: Any) -> None:
            artifact = wandb.Artifact(f"model-{self.version}", type="model")
            for file in sorted(path for path in folder.rglob("*") if path.is_file()):  # add_dir would print
                artifact.add_file(str(file), name=str(file.relative_to(folder)), policy="immutable")
            run.log_artifact(artifact)

        self._guarded(attach)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self.run is not None:
            self._guarded(lambda run: run.finish(exit_code=0 if status in ("success", "finished") else 1))
            self.run, self._failed = None, True  # later calls must not start a second run

    def _guarded(self, action: Callable[[Any], Any]) -> None:
        """Call `action` with the W&B run, which is started at the first use."""
        if self._failed:
            return
        try:
            if self.run is None:
                self.run = self._start()
            if self.run is None:
                self._failed = True
            else:
                action(self.run)
        except Exception as error:  # no W&B error may end training
            self._failed = True
            log.warning("W&B is off for the rest of this run: %s", _first_line(error))

    def _start(self) -> Any:
        """Return a new W&B run; None if W&B is disabled."""
        mode = self._chosen_mode()
        if mode == "disabled":
            log.info("W&B: disabled")
            return None
        try:
            run = self._init(mode)
        except Exception as error:
            if mode == "offline":
                raise
            wandb.teardown()  # its service still has the run id
            log.warning("W&B is unreachable (%s); this run is logged offline.", _first_line(error))
            mode = "offline"
            run = self._init(mode)
        offline = f"offline in {self.run_dir / 'wandb'}; `wandb sync` uploads it"
        log.info("W&B: %s", offline if mode == "offline" else run.url)
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def _init(self, mode: Any) -> Any:
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", self.project),
            name=self.name,
            group=self.group or None,
            id=self.version,
            dir=self.run_dir,
            resume="allow",
            mode=mode,
            reinit="create_new",
            settings=wandb.Settings(silent=True, init_timeout=INIT_TIMEOUT, console="off"),
        )

    def _chosen_mode(self) -> str:
        """Return the mode that the environment sets, else `mode`, else the one of `wandb offline` or a login.

        Raises:
            ValueError: WANDB_MODE has no valid value.
        """
        if os.environ.get("WANDB_DISABLED", "").strip().lower() in TRUE:
            return "disabled"
        given = os.environ.get("WANDB_MODE", "").strip()
        if given and given.lower() not in MODES:
            raise ValueError(f"WANDB_MODE={given} is none of {', '.join(MODES)}")
        if os.environ.pop("WANDB_MODE", ""):  # W&B reads lower case only
            os.environ["WANDB_MODE"] = MODES[given.lower()]
        settings = wandb.setup(wandb.Settings(silent=True)).settings  # login prints otherwise
        if given or self.mode != "auto":
            return MODES[given.lower()] if given else self.mode
        stored = MODES[settings.mode]
        return self._available_mode() if stored == "online" else stored

    @staticmethod
    def _available_mode() -> str:
        try:
            return "online" if wandb.login(prompt=False, verify=False) else "offline"
        except (wandb.Error, OSError, ValueError):
            return "offline"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
