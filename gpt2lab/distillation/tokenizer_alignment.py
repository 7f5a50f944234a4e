"""Tokenizer alignment: a student's batch as tokens of a teacher with a different tokenizer, and matching positions.

Step (1) text: split each sequence, including its last target, into runs of bytes between special tokens. The prompt and
         the response of a pair are separate runs, as they are tokenized separately.
Step (2) tokens: encode each run with the teacher's tokenizer. Bytes of an incomplete character, at the ends of a
         window, become single-byte tokens, so that both models receive exactly the same bytes.
Step (3) positions: match the student's position that predicts a token beginning at byte b with the teacher's position
         that predicts a token beginning at b. Both have the same context; their next tokens may differ.

Offsets are in bytes; a special token counts as one. Shapes: B sequences, T student tokens, U teacher tokens.
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

NO_CHARACTER = re.compile("([\udc80-\udcff]+)")  # bytes of no character, as decoded by `surrogateescape`
UNMATCHED = -1

Ids = NDArray[np.int64]


class Alignment:
    """Alignment of a student's tokenizer with a teacher's.

    Args:
        student, teacher: byte-level tokenizers.
        teacher_source: source of the teacher, for error messages.
        positions: n_positions of the teacher; text beyond is truncated, and student positions there are unmatched.

    Raises:
        InputError: a tokenizer is not byte-level.
    """

    def __init__(
        self, student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, teacher_source: str, positions: int
    ) -> None:
        self._token_bytes = spell_tokens(student, "the student")
        theirs = spell_tokens(teacher, teacher_source)
        self._sizes, self._their_sizes = _sizes(self._token_bytes), _sizes(theirs)
        self._specials = map_special_tokens(teacher, student)
        ids = {token: number for number, token in enumerate(theirs)}
        self._byte_tokens = [ids[bytes([byte])] for byte in range(256)]
        self._encode = TextEncoder(teacher)
        self._padding = int(teacher.eos_token_id)
        self._positions = positions
        self.vocab_size = len(teacher)

    def __call__(self, batch: Batch) -> AlignedText:
        """Return the batch in the teacher's tokens, on the CPU."""
        batch = batch.on_cpu or batch
        inputs, labels = batch.input_ids.cpu().numpy(), batch.labels.cpu().numpy()  # (B, T)
        is_target = labels != IGNORE_INDEX
        lengths = np.where(is_target.any(1), inputs.shape[1] - is_target[:, ::-1].argmax(1), 0)  # (B,)
        # A rank without samples left receives a batch with one row and no prompt.
        given = None if batch.prompt_lengths is None else batch.prompt_lengths.tolist()
        prompts = given or [0] * len(inputs)
        rows = [
            [*inputs[row, :length].tolist(), int(labels[row, length - 1])] if length else []
            for row, length in enumerate(lengths.tolist())
        ]
        theirs = self._retokenize(rows, prompts)
        ends = np.zeros((len(rows), inputs.shape[1] + 1), np.int64)
        for row, numbers in enumerate(rows):
            ends[row, : len(numbers)] = self._sizes[numbers]
        ends = ends.cumsum(1)  # (B, T + 1)
        return self._match(is_target, lengths, ends, theirs)

    def _retokenize(self, rows: list[list[int]], prompts: list[int]) -> list[list[int]]:
        """Convert the student's ids to the teacher's ids of the same text; rows may have any length."""
        texts: list[str] = []
        parts_of_rows: list[list[list[int] | int]] = []  # ids, or the index of a text that is encoded below
        for row, prompt in zip(rows, prompts, strict=True):
            parts: list[list[int] | int] = []
            for run in self._runs(row, prompt):
                if isinstance(run, int):
                    parts.append([run])
                    continue
                for number, part in enumerate(NO_CHARACTER.split(run.decode("utf-8", "surrogateescape"))):
                    if number % 2:
                        parts.append([self._byte_tokens[ord(escaped) - 0xDC00] for escaped in part])
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
        """Split a row into the bytes between special tokens, and the teacher's ids of special tokens."""
        runs: list[bytes | int] = []
        run: list[bytes] = []
        for position, number in enumerate(row):
            token = self._token_bytes[number]
            if run and (token is None or position == prompt):
                runs.append(b"".join(run))
                run = []
            if token is None:
                runs.append(self._specials.get(number, self._padding))
            else:
                run.append(token)
        return [*runs, b"".join(run)] if run else runs

    def _match(self, is_target: NDArray[np.bool_], lengths: Ids, ends: Ids, rows: list[list[int]]) -> AlignedText:
        """Match positions by the byte offsets of both models' tokens.

        Args:
            is_target: (B, T).
            lengths: (B,) number of student positions up to the last target.
            ends: (B, T + 1) end offsets of the student's tokens; constant past the last token of a row.
            rows: teacher's ids, B rows of any length.
        """
        counts = np.array([min(max(len(row) - 1, 0), self._positions) for row in rows])  # (B,) teacher positions
        width = max(int(counts.max()), 1)
        tokens = np.full((len(rows), width + 1), self._padding)
        for row, numbers in enumerate(rows):
            tokens[row, : min(len(numbers), width + 1)] = numbers[: width + 1]
        their_ends = self._their_sizes[tokens].cumsum(1)  # (B, U + 1)
        is_position = np.arange(width) < counts[:, None]  # (B, U)

        # Shift each row's offsets past those of the previous row, to look up all rows at once.
        base = (np.arange(len(rows)) * (max(int(ends.max()), int(their_ends.max())) + 1))[:, None]
        positions = np.full(is_target.shape, UNMATCHED)
        if is_position.any():
            keys, queries = (their_ends[:, :-1] + base)[is_position], ends[:, :-1] + base  # (M',), (B, T)
            found = np.minimum(keys.searchsorted(queries), len(keys) - 1)
            fits = (keys[found] == queries) & (np.arange(is_target.shape[1]) < lengths[:, None])
            positions[fits] = np.flatnonzero(is_position)[found[fits]]

        # Bytes of student targets before each teacher offset, which are linear between the ends of student tokens.
        starts = np.pad(ends, ((0, 0), (1, 0)))  # (B, T + 2): a row's first offset, then the ends
        before = np.pad(np.where(is_target, np.diff(ends), 0), ((0, 0), (2, 0))).ravel().cumsum()
        covered = np.interp(their_ends + base, (starts + base).ravel(), before)  # (B, U + 1)
        sizes = np.diff(their_ends)
        counted = is_position & (np.diff(covered) == sizes)
        return AlignedText(
            input_ids=torch.from_numpy(tokens[:, :-1].copy()),
            labels=torch.from_numpy(np.where(counted, tokens[:, 1:], IGNORE_INDEX).ravel()),
            teacher_positions=torch.from_numpy(positions.ravel()),
            label_bytes=int(sizes[counted].sum()),
            target_bytes=int(before[-1]),
        )


def _sizes(tokens: list[bytes | None]) -> Ids:
    return np.array([1 if token is None else len(token) for token in tokens])
