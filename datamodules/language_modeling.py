"""Language-modelling data: corpus → tokens on disk → windows → batches.

Step (1) corpus: documents and an identity (documents.py, hub_documents.py).
Step (2) split: by a hash of each document's text, or the corpus's separate validation documents.
Step (3) tokenizer: trained on the training documents, or a given one.
Step (4) tokens: both sides into flat files, once, in the cache.
Step (5) batches: windows in the order of gpt2lab.data.data_order, a pure function of (seed, step).
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from datamodules.documents import Corpus, packages_corpus, stdlib_corpus, text_corpus
from datamodules.hub_documents import hub_corpus
from datamodules.micro_batches import SampleDataModule
from datamodules.ngram_overlap import NgramOverlap, log_share
from datamodules.token_bins import bin_facts
from datamodules.token_preparation import TRAIN, VAL, count_bytes, split_corpus, write_token_files
from gpt2lab.data.batch import IGNORE_INDEX
from gpt2lab.data.document_groups import WindowDocuments
from gpt2lab.data.objectives import Objective
from gpt2lab.data.special_tokens import MASK_PLACEHOLDER, find_special_tokens
from gpt2lab.data.token_file import TokenFile, token_dtype
from gpt2lab.data.tokenizer import load_tokenizer, prepare_tokenizer, tokenizer_hash
from gpt2lab.data.windows import SlidingWindows, Windows
from gpt2lab.errors import InputError
from gpt2lab.settings import DataFacts, ObjectiveSettings, TokenizerChoice
from gpt2lab.storage.prepared_cache import cache_folder, content_hash, get_or_build, read_ledger
from gpt2lab.system.terminal import Phase

SOURCE_PROMPTS = (
    "def add(a, b):\n",
    "class Stack:\n    def __init__(self",
    'import os\n\ndef read_lines(path):\n    """',
)
PROMPT_TOKENS, GAP_EVERY = 16, 5
TEXT_FORMAT = 3  # changes when the same files yield other text or another split
TOKEN_FORMAT = 3  # changes when the same tokens have other files or facts
VALIDATION_SEED = 0  # random choices of validation are the same in every run
COUNTED_AT_A_TIME = 2**24
WINDOWS_AT_A_TIME = 1024


class LanguageModelingData(SampleDataModule):
    """Windows of running text.

    Args:
        name: shown in reports and cache folders.
        source: stdlib, packages, text, hub or bin.
        dataset, config, revision, split, val_split, streaming: for source hub.
        text_column: for source hub, and for record files.
        path, val_path, val_fraction: for files; bin takes a folder with train.bin and val.bin.
        on_bad_line: stop or skip, for records of files and data sets.
        batch_sequences, accumulate, eval_batch_sequences, validate_tokens: as for SampleDataModule; a sample is a
            window.
        objective: training objective; None: clm.
        packing: whether documents in one window do not attend to each other.
    """

    kind: Literal["text", "pairs"] = "text"

    def __init__(
        self,
        *,
        name: str,
        source: str,
        text_column: str = "text",
        dataset: str = "",
        config: str = "",
        revision: str = "",
        split: str = "train",
        val_split: str = "",
        streaming: bool = False,
        tokenizer: TokenizerChoice,
        context: int,
        batch_sequences: int,
        accumulate: int,
        seed: int,
        workers: int = 0,
        cache_dir: str = "",
        val_fraction: float = 0.05,
        val_path: str = "",
        path: str = "",
        on_bad_line: str = "stop",
        eval_batch_sequences: int = 16,
        objective: ObjectiveSettings | None = None,
        packing: bool = False,
        validate_tokens: int | None = None,
    ) -> None:
        super().__init__(batch_sequences, accumulate, seed, workers, eval_batch_sequences, validate_tokens)
        self.name: str = name
        self.objective = objective or ObjectiveSettings()
        self.packing = packing
        self.source = source
        self.hub_arguments = (dataset, config, revision, split, val_split, text_column, streaming)
        self.tokenizer_choice = tokenizer
        self.context = context
        self.cache_dir = cache_folder(cache_dir)
        self.val_fraction = val_fraction
        self.path = path
        self.on_bad_line = on_bad_line
        self.file_arguments = (path, val_path, text_column, on_bad_line)

    def prepare(self) -> DataFacts:
        """Make tokenizer and token files unless they are in the cache, and open them. Idempotent.

        Raises:
            InputError: no text, an invalid line, too little text for one window, no space left, and so on.
        """
        if self.source == "bin":
            folder = Path(self.path).expanduser()
            tokenizer_folder, facts = bin_facts(folder, self.tokenizer_choice, self.cache_dir)
        else:
            folder, tokenizer_folder, facts = self._token_folder()
        dtype = np.dtype(facts["dtype"])
        train_file = TokenFile(folder / "train.bin", dtype, self.context)
        val_file = TokenFile(folder / "val.bin", dtype, self.context, keep_short=True)
        for side, file in (("training", train_file), ("validation", val_file)):
            if file.windows == 0:
                raise InputError(
                    f"data={self.name}: the {side} text has {len(file.tokens)} tokens; "
                    f"one window of context={self.context} needs {self.context + 1 if side == 'training' else 2}.\n"
                    "Give more text, or lower context."
                )
        self._vocab_size = int(facts["vocab_size"])
        self.train_samples = Windows(train_file, self._objective(tokenizer_folder, self.seed))
        val_objective = self._objective(tokenizer_folder, VALIDATION_SEED)
        end_of_text = load_tokenizer(tokenizer_folder).eos_token_id
        val_documents, train_documents = (
            WindowDocuments(file.tokens, end_of_text, f"data={self.name}, {side} text")
            for side, file in (("validation", val_file), ("training", train_file))
        )
        self.val_samples = Windows(val_file, val_objective, val_documents)
        self.val_rows = self.validation_rows(self.validate_tokens)
        whole_file = TokenFile(folder / "train.bin", dtype, self.context, keep_short=True)
        self.all_train_samples = Windows(whole_file, val_objective, train_documents)
        return DataFacts(
            name=self.name,
            hash=facts["hash"],
            tokenizer_folder=tokenizer_folder,
            vocab_size=self._vocab_size,
            train_tokens=len(train_file.tokens),
            val_tokens=int(self.val_samples.target_counts(self.val_rows).sum()),
            val_bytes=self._validated_bytes(val_file, facts["val_bytes"], tokenizer_folder),
            val_overlap=facts.get("val_overlap"),
        )

    def _validated_bytes(self, file: TokenFile, of_split: int, tokenizer_folder: str) -> int:
        """Return the UTF-8 bytes of the validated targets; 0 if unknown.

        Args:
            of_split: bytes of the whole split; 0 if unknown.
        """
        if not self.objective.kind.scores_all_text or not of_split:
            return 0
        if self.validates_all:
            return of_split
        tokenizer, starts = load_tokenizer(tokenizer_folder), range(0, len(self.val_rows), WINDOWS_AT_A_TIME)
        labels = (file.read(self.val_rows[start : start + WINDOWS_AT_A_TIME])[1].numpy() for start in starts)
        return sum(count_bytes(part[part != IGNORE_INDEX], tokenizer) for part in labels)

    def text_bytes(self) -> int:
        """Approximate size of both sides of the split in bytes; 0 if unknown before reading.

        Raises:
            InputError: there is no text.
        """
        return 0 if self.source in ("bin", "hub") else self.corpus().size

    def sample_prompts(self, tokenizer: PreTrainedTokenizerFast) -> list[str]:
        """Return code prompts for Python source, else the beginnings of validation windows; with gaps for mlm."""
        if self.source in ("stdlib", "packages") and not self.objective.kind.fills_masks:
            return list(SOURCE_PROMPTS)
        assert isinstance(self.val_samples, Windows)
        windows = np.unique(np.arange(3) * len(self.val_samples) // 3)
        input_ids, _ = self.val_samples.file.read(windows)
        prompts = input_ids[:, :PROMPT_TOKENS].tolist()  # (≤ 3, ≤ PROMPT_TOKENS)
        if self.objective.kind.fills_masks:
            return [
                MASK_PLACEHOLDER.join(
                    tokenizer.decode(part, skip_special_tokens=True) for part in _split_at_gaps(row[1:])
                )
                for row in prompts
            ]
        return [tokenizer.decode(row, skip_special_tokens=True) for row in prompts]

    def token_counts(self) -> NDArray[np.int64]:
        """Count how often each token occurs in the training text: (V,)."""
        assert isinstance(self.train_samples, Windows)
        tokens = self.train_samples.file.tokens
        counts = np.zeros(self._vocab_size, np.int64)
        for start in range(0, len(tokens), COUNTED_AT_A_TIME):
            counts += np.bincount(tokens[start : start + COUNTED_AT_A_TIME], minlength=self._vocab_size)
        return counts

    def train_eval_dataloader(self) -> DataLoader:
        """Load the whole training text once with its last short window, so that tokenizers score the same bytes."""
        return self._sequential_loader(self.all_train_samples)

    def sliding_batches(self, stride: int, all_text: bool) -> list[SlidingWindows]:
        """Return overlapping windows (windows.py) of a validation, or with `all_text` of both sides of the split."""
        assert isinstance(self.val_samples, Windows)
        sides = [self.val_samples, self.all_train_samples] if all_text else [self.val_samples]
        size = self.eval_batch_sequences
        limit = None if all_text else self.validate_tokens
        return [SlidingWindows(side.file.tokens, self.context, stride, size, side.documents, limit) for side in sides]

    def _objective(self, tokenizer_folder: str, seed: int) -> Objective:
        needs_special = self.objective.kind.rewrites_text
        if not needs_special and not self.packing:
            return Objective(self.objective, seed=seed)
        tokenizer = load_tokenizer(tokenizer_folder)
        special = find_special_tokens(tokenizer) if needs_special else None
        end_of_text = tokenizer.eos_token_id if self.packing else None
        return Objective(self.objective, special, end_of_text=end_of_text, seed=seed)

    def corpus(self) -> Corpus:
        """Return the documents; a subclass overrides it for other text.

        Raises:
            InputError: there is no text, or `source` has no such value.
        """
        if self.source == "stdlib":
            return stdlib_corpus()
        if self.source == "packages":
            return packages_corpus()
        if self.source == "text":
            return text_corpus(*self.file_arguments)
        if self.source == "hub":
            return hub_corpus(self.name, *self.hub_arguments, self.on_bad_line)
        raise InputError(f"data.source={self.source}: not one of stdlib, packages, text, hub, bin.")

    def _token_folder(self) -> tuple[Path, str, dict[str, Any]]:
        """Return (folder with train.bin and val.bin, tokenizer folder, facts)."""
        corpus = self.corpus()
        if not 0 < self.val_fraction < 1:
            raise InputError(f"val_fraction={self.val_fraction}: not between 0 and 1; the default is 0.05.")
        identity = self._identity(corpus)
        # Lazy: with a full cache no text is read
        split = functools.cache(lambda: split_corpus(corpus, self.val_fraction))

        def training_texts() -> Iterator[str]:
            with self._progress("tokenizer", corpus.size) as progress:
                for side, document in split()():
                    progress.advance(len(document.text.encode(errors="surrogateescape")))
                    if side == TRAIN:
                        yield document.text

        tokenizer_folder = prepare_tokenizer(self.tokenizer_choice, self.name, identity, training_texts, self.cache_dir)
        tokenizer = load_tokenizer(tokenizer_folder)

        def build(folder: Path) -> dict[str, Any]:
            overlap = NgramOverlap()
            documents = overlap.documents(split()())
            sides = write_token_files(folder, documents, tokenizer, self._progress("tokens", corpus.size))
            log_share(self.name, overlap.share())
            return {
                "val_overlap": overlap.share(),
                "vocab_size": len(tokenizer),
                "dtype": token_dtype(len(tokenizer)).str,
                "val_bytes": sides[VAL]["bytes"],
                "sides": sides,
                "hash": content_hash([sides[TRAIN]["sha256"], sides[VAL]["sha256"]])[:16],
            }

        key = {"data": identity, "tokenizer": tokenizer_hash(tokenizer), "format": TOKEN_FORMAT}
        folder = get_or_build("tokens", self.name, key, build, self.cache_dir)
        return folder, tokenizer_folder, read_ledger(folder)

    def _identity(self, corpus: Corpus) -> dict[str, Any]:
        return {**corpus.identity, "val_fraction": self.val_fraction, "text": TEXT_FORMAT}

    def _progress(self, what: str, size: int) -> Phase:
        """Return the progress of reading the text, of which `size` bytes are known; 0: unknown."""
        return Phase(f"prepare {self.name}: {what}", size or None, "B")


def _split_at_gaps(tokens: list[int]) -> list[list[int]]:
    """Remove every fifth token and return the parts between."""
    return [tokens[start : start + GAP_EVERY - 1] for start in range(0, len(tokens), GAP_EVERY)]
