"""On-policy distillation: at which steps the student trains on text that it wrote itself, and the text it keeps.

Everything follows from the seed, the step and the validation losses, so all ranks agree and a resumed run goes on as
the unbroken one would.

Source: GKD (arXiv 2306.13649) for λ; DistiLLM (arXiv 2402.03898) and its authors' code for threshold and buffer.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpt2lab.data.data_order import permute, uniforms
from gpt2lab.distillation.generation_batches import Written
from gpt2lab.settings import SequenceSettings

DATA, STUDENT, BUFFER = "data", "student", "buffer"
OF_THE_CHOICE = 0x5EED  # apart from what else is drawn with the run's seed


class TextChoice:
    """Whose text a step trains on: the data's, the student's, written now, or the student's out of the buffer.

    gkd takes the student's with probability λ. distillm has a threshold φ, 0 at first, that grows by `threshold_step`
    whenever the validation loss has risen by `tolerance` over what it was when φ last grew (at first: over the first
    one). With probability φ a step is the student's: written now with probability φ · (1 − progress of the run) or
    while the buffer is not full, else out of the buffer.
    """

    def __init__(self, settings: SequenceSettings, steps: int, seed: int) -> None:
        self.settings = settings
        self.steps = steps
        self.seed = seed
        self.threshold = 0.0
        self.reference: float | None = None  # validation loss

    def of_step(self, step: int, buffer_is_full: bool) -> str:
        """For optimizer step `step`, from 0."""
        draw = float(uniforms(np.array([step]), self.seed ^ OF_THE_CHOICE)[0])
        if self.settings.name == "gkd":
            return STUDENT if draw < self.settings.lmbda else DATA
        if draw >= self.threshold:
            return DATA
        fresh = draw < self.threshold * (1 - step / self.steps)
        return STUDENT if fresh or not buffer_is_full else BUFFER

    def validated(self, loss: float) -> None:
        """Take in a validation loss, nats per token."""
        if self.reference is None:
            self.reference = loss
        elif loss >= self.reference + self.settings.tolerance:
            self.threshold = min(self.threshold + self.settings.threshold_step, 1.0)
            self.reference = loss

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"threshold": self.threshold, "reference": self.reference}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.threshold, self.reference = state["threshold"], state["reference"]


class ReplayBuffer:
    """The last `capacity` sequences that the student wrote, the same on every rank."""

    def __init__(self, capacity: int, seed: int) -> None:
        self.seed = seed
        self._kept: deque[Written] = deque(maxlen=capacity)

    @property
    def is_full(self) -> bool:
        return len(self._kept) == self._kept.maxlen

    def add(self, written: Sequence[Written]) -> None:
        """Where there is no room, the oldest goes."""
        self._kept.extend(written)

    def sample(self, count: int, step: int) -> list[Written]:
        """`count` different sequences, at most as many as there are, drawn by (seed, step)."""
        return [self._kept[place] for place in permute(np.arange(count), len(self._kept), self.seed, epoch=step)]

    def state(self) -> list[tuple[int, list[int], list[int]]]:
        """For the checkpoint."""
        return [(written.sample, written.prompt, written.text) for written in self._kept]

    def load(self, state: list[tuple[int, list[int], list[int]]]) -> None:
        """Go on from what `state` gave."""
        self._kept.clear()
        self._kept.extend(Written(*written) for written in state)
