"""Health: tells when the training loss jumps, and ends the run where that is wanted."""

import logging
from collections import deque
from statistics import median
from typing import Literal

import lightning
from lightning import Trainer

from callbacks.interrupt import Interrupt
from gpt2lab import metric_names
from gpt2lab.batch import Batch
from gpt2lab.errors import InputError

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
        self._seen_step = 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: lightning.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """The loss of a step is logged after the callbacks' turn at its end, so it is read before the next one."""
        step = trainer.global_step
        if step == self._seen_step or step % trainer.log_every_n_steps:  # reading it makes a GPU wait
            return
        self._seen_step = step
        logged = trainer.callback_metrics
        if metric_names.TRAIN_LOSS not in logged:  # so far all steps were on text that the student wrote
            return
        loss = float(logged[metric_names.TRAIN_LOSS])
        if not self.detector.is_spike(loss):
            return
        usual = median(self.detector.recent)
        log.warning("Loss spike at step %d: train/loss %.3f, usual is %.3f.", trainer.global_step, loss, usual)
        if self.on_spike == "stop":
            for callback in trainer.callbacks:
                if isinstance(callback, Interrupt):
                    callback.request("loss spike")
