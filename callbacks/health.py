"""Health: detect spikes of the training loss; warn or stop the run."""

import logging
from collections import deque
from statistics import median
from typing import Any, Literal

import lightning
from lightning import Trainer

from callbacks.interrupt import Interrupt
from gpt2lab import metric_names
from gpt2lab.data.batch import Batch
from gpt2lab.errors import InputError
from gpt2lab.system.stop_request import LOSS_SPIKE

log = logging.getLogger(__name__)

NORMAL = 1.4826  # median absolute deviation → standard deviation of a normal distribution


class SpikeDetector:
    """Detector of losses `deviations` robust standard deviations and at least `margin` nats above the median.

    The median and the median absolute deviation are those of the last `window` losses, so a few spikes do not change
    them, a falling loss is never a spike, and a loss that stays high is normal after half a window.
    """

    def __init__(self, window: int = 20, deviations: float = 6.0, margin: float = 0.3) -> None:
        self.window = window
        self.deviations = deviations
        self.margin = margin
        self.recent: deque[float] = deque(maxlen=window)

    def is_spike(self, loss: float) -> bool:
        before = list(self.recent)
        self.recent.append(loss)
        if len(before) < self.window // 2:
            return False
        centre = median(before)
        spread = NORMAL * median(abs(value - centre) for value in before)
        return loss > centre + max(self.deviations * spread, self.margin)


class Health(lightning.Callback):
    """Check the training loss every `log_every` steps. NaN and infinity are handled by the module.

    Args:
        on_spike: warn logs a warning; stop saves and ends the run. Neither changes a step.
    """

    def __init__(self, on_spike: Literal["warn", "stop"] = "warn") -> None:
        if on_spike not in ("warn", "stop"):
            raise InputError(f"on_spike={on_spike} is unknown; give warn or stop.")
        self.on_spike = on_spike
        self.detector = SpikeDetector()
        self.spikes: list[tuple[int, float]] = []  # (step, loss)
        self._spike_step = -1

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.detector.recent), "spike_step": self._spike_step, "spikes": self.spikes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.detector.recent.extend(state_dict["losses"])
        self._spike_step = state_dict["spike_step"]
        self.spikes = [(step, loss) for step, loss in state_dict["spikes"]]

    def on_train_start(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        if self._spike_step == trainer.global_step:  # detected just before the checkpoint was saved
            self._stop(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if (batch_idx + 1) % trainer.accumulate_grad_batches or step % trainer.log_every_n_steps:
            return
        if metric_names.TRAIN_LOSS not in trainer.callback_metrics:  # on-policy steps have none
            return
        loss = float(trainer.callback_metrics[metric_names.TRAIN_LOSS])
        if not self.detector.is_spike(loss):
            return
        recent = median(self.detector.recent)
        self.spikes.append((step, loss))
        log.warning("Loss spike at step %d: train/loss %.3f, recent median %.3f.", step, loss, recent)
        if not trainer.should_stop:
            self._spike_step = step
            self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        if self.on_spike == "stop":
            for callback in trainer.callbacks:
                if isinstance(callback, Interrupt):
                    callback.request(LOSS_SPIKE)
