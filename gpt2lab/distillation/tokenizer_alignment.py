"""Alignment: a student's batch in the tokens of a teacher with another tokenizer, position laid beside position.

Step (1) text: each sequence, its last target included, as runs of bytes between special tokens; of pairs, prompt and
         response are runs of their own, as they are when a model is trained on pairs.
Step (2) tokens: every run by the teacher's tokenizer. Bytes that are no whole character (a window may begin or end
         within one) become the teacher's single-byte tokens, so that both models read exactly the same.
Step (3) places: the student's position that predicts the token beginning at byte b belongs to the teacher's position
         that predicts a token beginning at b. Both have then read the same text; what they predict next begins with
         the same byte, but need not be the same token.

Offsets count bytes, and a special token as one. Shapes: B sequences, T of the student's tokens, U of the teacher's.
"""

import re

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from gpt2lab.data.batch import IGNORE_INDEX, Batch
from gpt2lab.data.token_bytes import map_special_tokens, spell_tokens
from gpt2lab.data.tokenizer import TextEncoder
from gpt2lab.losses.aligned_teacher import AlignedText

NO_CHARACTER = re.compile("([\udc80-\udcff]+)")  # bytes that decode to no character, as `surrogateescape` marks them
NOWHERE = -1

Ids = NDArray[np.int64]


class Alignment:
    """Of one student's tokenizer with one teacher's.

    Args:
        student, teacher: byte-level tokenizers.
        teacher_source: where the teacher comes from, for messages.
        positions: that the teacher has; what goes beyond is cut, and the student's positions there have no partner.

    Raises:
        InputError: one of them does not spell text byte by byte.
    """

    def __init__(
        self, student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, teacher_source: str, positions: int
    ) -> None:
        self._spelled = spell_tokens(student, "the student")
        theirs = spell_tokens(teacher, teacher_source)
        self._sizes, self._their_sizes = _sizes(self._spelled), _sizes(theirs)
        self._specials = map_special_tokens(teacher, student)
        number_of = {entry: number for number, entry in enumerate(theirs)}
        self._of_byte = [number_of[bytes([byte])] for byte in range(256)]
        self._encode = TextEncoder(teacher)
        self._padding = int(teacher.eos_token_id)
        self._positions = positions
        self.entries = len(teacher)

    def __call__(self, batch: Batch) -> AlignedText:
        """The batch as the teacher reads it, on the CPU."""
        inputs, labels = batch.input_ids.cpu().numpy(), batch.labels.cpu().numpy()  # (B, T)
        is_target = labels != IGNORE_INDEX
        lengths = np.where(is_target.any(1), inputs.shape[1] - is_target[:, ::-1].argmax(1), 0)  # (B,) up to the last
        # A batch without samples, which a rank with none left is given, has one row and no prompt.
        given = None if batch.prompt_lengths is None else batch.prompt_lengths.tolist()
        prompts = given or [0] * len(inputs)
        rows = [
            [*inputs[row, :length].tolist(), int(labels[row, length - 1])] if length else []
            for row, length in enumerate(lengths.tolist())
        ]
        theirs = self._retokenized(rows, prompts)
        ends = np.zeros((len(rows), inputs.shape[1] + 1), np.int64)
        for row, numbers in enumerate(rows):
            ends[row, : len(numbers)] = self._sizes[numbers]
        ends = ends.cumsum(1)  # (B, T + 1)
        return self._laid_beside(is_target, lengths, ends, theirs)

    def _retokenized(self, rows: list[list[int]], prompts: list[int]) -> list[list[int]]:
        """Student's ids → teacher's ids of the same text, every row of any length."""
        texts: list[str] = []
        parts_of_rows: list[list[list[int] | int]] = []  # ids, or the number of a text whose ids are still to come
        for row, prompt in zip(rows, prompts, strict=True):
            parts: list[list[int] | int] = []
            for run in self._runs(row, prompt):
                if isinstance(run, int):
                    parts.append([run])
                    continue
                for number, part in enumerate(NO_CHARACTER.split(run.decode("utf-8", "surrogateescape"))):
                    if number % 2:
                        parts.append([self._of_byte[ord(escaped) - 0xDC00] for escaped in part])
                    elif part:
                        parts.append(len(texts))
                        texts.append(part)
            parts_of_rows.append(parts)
        encoded = self._encode(texts)
        return [
            [number for part in parts for number in (encoded[part] if isinstance(part, int) else part)]
            for parts in parts_of_rows
        ]

    def _runs(self, row: list[int], prompt: int) -> list[bytes | int]:
        """The text between special tokens, and these as the teacher's ids."""
        runs: list[bytes | int] = []
        run: list[bytes] = []
        for place, number in enumerate(row):
            spelled = self._spelled[number]
            if run and (spelled is None or place == prompt):
                runs.append(b"".join(run))
                run = []
            if spelled is None:
                runs.append(self._specials.get(number, self._padding))
            else:
                run.append(spelled)
        return [*runs, b"".join(run)] if run else runs

    def _laid_beside(self, is_target: NDArray[np.bool_], lengths: Ids, ends: Ids, rows: list[list[int]]) -> AlignedText:
        """From where tokens end on both sides to the teacher's batch.

        Args:
            is_target: (B, T).
            lengths: (B,) positions of the student up to the last target.
            ends: (B, T + 1) of the student's tokens; past the last of a row they stay where they are.
            rows: the teacher's ids, B rows of any length.
        """
        counts = np.array([min(max(len(row) - 1, 0), self._positions) for row in rows])  # (B,) positions it has
        width = max(int(counts.max()), 1)
        tokens = np.full((len(rows), width + 1), self._padding)
        for row, numbers in enumerate(rows):
            tokens[row, : min(len(numbers), width + 1)] = numbers[: width + 1]
        their_ends = self._their_sizes[tokens].cumsum(1)  # (B, U + 1)
        has = np.arange(width) < counts[:, None]  # (B, U)

        # One row's offsets lie beyond the last one's, so that all rows are looked up at once.
        base = (np.arange(len(rows)) * (max(int(ends.max()), int(their_ends.max())) + 1))[:, None]
        places = np.full(is_target.shape, NOWHERE)
        if has.any():
            keys, wanted = (their_ends[:, :-1] + base)[has], ends[:, :-1] + base  # (M',), (B, T)
            found = np.minimum(keys.searchsorted(wanted), len(keys) - 1)
            fits = (keys[found] == wanted) & (np.arange(is_target.shape[1]) < lengths[:, None])
            places[fits] = np.flatnonzero(has)[found[fits]]

        # Where the student's targets lie: how many of their bytes stand before an offset is linear between token ends.
        starts = np.pad(ends, ((0, 0), (1, 0)))  # (B, T + 2): each row's first offset, then the ends
        before = np.pad(np.where(is_target, np.diff(ends), 0), ((0, 0), (2, 0))).ravel().cumsum()
        covered = np.interp(their_ends + base, (starts + base).ravel(), before)  # (B, U + 1)
        sizes = np.diff(their_ends)
        counted = has & (np.diff(covered) == sizes)
        return AlignedText(
            input_ids=torch.from_numpy(tokens[:, :-1].copy()),
            labels=torch.from_numpy(np.where(counted, tokens[:, 1:], IGNORE_INDEX).ravel()),
            teacher_positions=torch.from_numpy(places.ravel()),
            label_bytes=int(sizes[counted].sum()),
            target_bytes=int(before[-1]),
        )


def _sizes(spelled: list[bytes | None]) -> Ids:
    return np.array([1 if entry is None else len(entry) for entry in spelled])
