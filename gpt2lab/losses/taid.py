"""TAID's teacher share in the target; it grows during training, and faster while the loss falls.

Source: TAID (arXiv 2501.16937) and the authors' code for the default constants.
"""

import math

from gpt2lab.settings import LossSettings


class AdaptiveMixing:
    """Schedule of the teacher share t, from `mixing_start` to `mixing_end` over the run.

    Each step adds mixing_step · sigmoid(m) · (1 − t), where m is the running mean of the relative decrease of the loss.
    The linear schedule between the two ends is the lower bound.
    """

    def __init__(self, settings: LossSettings, steps: int) -> None:
        self.settings = settings
        self.steps = steps
        self.share = settings.mixing_start
        self.improvement = 0.0
        self.last_loss = math.inf

    def update(self, step: int, loss: float) -> None:
        """Update the share after optimizer step `step`, counted from 0 as in the authors' code, with its mean loss."""
        start, end = self.settings.mixing_start, self.settings.mixing_end
        if math.isfinite(self.last_loss) and self.last_loss > 0:
            momentum = self.settings.mixing_momentum
            relative = (self.last_loss - loss) / self.last_loss
            self.improvement = momentum * self.improvement + (1 - momentum) * relative
            ahead = self.settings.mixing_step / (1 + math.exp(-self.improvement)) * (1 - self.share)
            self.share = min(end, max(start + (end - start) * step / self.steps, self.share + ahead))
        self.last_loss = loss

    def state(self) -> dict[str, float]:
        """Return the state for a checkpoint."""
        return {"share": self.share, "improvement": self.improvement, "last_loss": self.last_loss}

    def load(self, state: dict[str, float]) -> None:
        """Restore the result of `state`."""
        self.share, self.improvement, self.last_loss = state["share"], state["improvement"], state["last_loss"]
