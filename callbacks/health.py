"""Health: tells when the training loss jumps, and ends the run where that is wanted."""

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
    """A loss is a spike when it lies `deviations` robust standard deviations and `margin` nats above the usual one.

    Usual is the median of the last `window` losses; the deviation is the median absolute one. A few spikes move
    neither, a falling loss is never one, and a loss that stays high becomes usual after half a window.
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
    """Looks at the training loss every `log_every` steps. NaN and infinity are the module's business: it ends.

    Args:
        on_spike: warn only tells; stop saves and ends the run. Neither changes what a step computes.
    """

    def __init__(self, on_spike: Literal["warn", "stop"] = "warn") -> None:
        if on_spike not in ("warn", "stop"):
            raise InputError(f"on_spike={on_spike} is not known; give warn or stop.")
        self.on_spike = on_spike
        self.detector = SpikeDetector()
        self._spike_step = -1

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.detector.recent), "spike_step": self._spike_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.detector.recent.extend(state_dict["losses"])
        self._spike_step = state_dict["spike_step"]

    def on_train_start(self, trainer: Trainer, pl_module: lightning.LightningModule) -> None:
        if self._spike_step == trainer.global_step:  # found just before the checkpoint was saved
            self._stop(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if (batch_idx + 1) % trainer.accumulate_grad_batches or step % trainer.log_every_n_steps:
            return
        if metric_names.TRAIN_LOSS not in trainer.callback_metrics:  # a step on text that the student wrote has none
            return
        loss = float(trainer.callback_metrics[metric_names.TRAIN_LOSS])
        if not self.detector.is_spike(loss):
            return
        usual = median(self.detector.recent)
        log.warning("Loss spike at step %d: train/loss %.3f, usual is %.3f.", step, loss, usual)
        if not trainer.should_stop:
            self._spike_step = step
            self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        if self.on_spike == "stop":
            for callback in trainer.callbacks:
                if isinstance(callback, Interrupt):
                    callback.request(LOSS_SPIKE)
