"""Pairs of texts (prompt → response) as data for fine-tuning.

Step (1) source: rows of functions, catalogues, tables or a Hub data set (pair_sources.py).
Step (2) pairs: two columns of the rows, collected once in the cache, split by a hash of the source text or by files
         (pair_preparation.py).
Step (3) tokenizer: the model's own, or one trained on the training pairs.
Step (4) tokens: both sides through the template into PairFiles, once, in the cache.
Step (5) batches: pairs in the order of data_order.py, padded to the longest of each micro-batch (pair_batches.py).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from datamodules.micro_batches import SampleDataModule
from datamodules.ngram_overlap import NgramOverlap, log_share
from datamodules.pair_batches import PairSamples
from datamodules.pair_preparation import (
    SIDES,
    Pairs,
    collect_pairs,
    encode_side,
    split_by_files,
    split_by_hash,
    warn_of_truncation,
)
from datamodules.pair_sources import PairSource, open_hub_source, open_pair_source, open_tables
from gpt2lab.data.pair_file import PairFile
from gpt2lab.data.pair_template import PairTemplate
from gpt2lab.data.tokenizer import load_tokenizer, prepare_tokenizer, tokenizer_hash
from gpt2lab.errors import InputError
from gpt2lab.settings import DataFacts, ObjectiveSettings, TokenizerChoice
from gpt2lab.storage.prepared_cache import cache_folder, content_hash, get_or_build, read_ledger
from gpt2lab.system.terminal import track


class PairData(SampleDataModule):
    """Prompts and responses; only the responses are targets.

    Args:
        name: shown in reports and cache folders.
        reader: functions, catalogues or tables: the content of `path` (tables are recognised by any reader).
        prompt, response: templates with `{source}` and `{target}`.
        source, target: columns of the rows; `a.b` is b within a, `a+b` both with an empty line between.
        metrics: scores of generated text (gpt2lab.evaluation.text_metrics); the first is the watched one.
        language: language of the catalogues.
        dataset, config, revision, split, val_split: data set on the Hub or in a local folder, used if `path` is empty.
        path, val_path: files.
        on_bad_line: stop or skip, for records of files and data sets.
        val_fraction: share of the source texts held out without `val_path` and `val_split`.
        batch_sequences, accumulate, eval_batch_sequences, validate_tokens: see SampleDataModule; a sample is a pair.
        objective: prefix_lm makes attention within prompts bidirectional; None: causal.
        packing: whether several training pairs share a row, without attending to each other.

    Raises:
        InputError: a template lacks its field or has another.
    """

    train_samples: PairSamples
    val_samples: PairSamples

    kind: Literal["text", "pairs"] = "pairs"

    def __init__(
        self,
        *,
        name: str,
        prompt: str,
        response: str,
        source: str,
        target: str,
        reader: str = "tables",
        metrics: list[str] | None = None,
        language: str = "",
        dataset: str = "",
        config: str = "",
        revision: str = "",
        split: str = "train",
        val_split: str = "",
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
        self.template = PairTemplate(prompt, response)
        self.columns = (source, target)
        self.metrics = list(metrics or [])
        self.reader = reader
        self.language = language
        self.hub = (dataset, config, revision, split, val_split)
        self.files = (path, val_path, on_bad_line)
        self.tokenizer_choice = tokenizer
        self.context = context
        self.cache_dir = cache_folder(cache_dir)
        self.val_fraction = val_fraction

    def prepare(self) -> DataFacts:
        """Collect, split and tokenize the pairs unless they are in the cache, and open them. Idempotent.

        Raises:
            InputError: no pairs, no such column, an invalid line, no catalogue, or no pair fits in the context.
        """
        training, validation, identity = self._split()
        tokenizer_folder = prepare_tokenizer(
            self.tokenizer_choice, self.name, identity, lambda: self._texts(training), self.cache_dir
        )
        tokenizer = load_tokenizer(tokenizer_folder)
        key = {
            "data": identity,
            "template": [self.template.prompt, self.template.response],
            "tokenizer": tokenizer_hash(tokenizer),
            "context": self.context,
            "format": 1,
        }

        def build(folder: Path) -> dict[str, Any]:
            overlap, facts = NgramOverlap(), {}
            for side, pairs in zip(SIDES, (training, validation), strict=True):
                found = overlap.pairs(side, pairs())
                facts[side] = encode_side(folder / side, found, self.template, tokenizer, self.context, self.name)
            log_share(self.name, overlap.share())
            return {**facts, "val_overlap": overlap.share()}

        # The file layout does not change the pairs, so it is not part of the data hash.
        folder = get_or_build("tokenized_pairs", self.name, {**key, "layout": 4}, build, self.cache_dir)
        warn_of_truncation(folder, self.name, self.context)
        self.train_samples = self._open(folder / "train", tokenizer, with_references=False)
        self.val_samples = self._open(folder / "val", tokenizer, with_references=True)
        self.val_rows = self.validation_rows(self.validate_tokens)
        self._vocab_size = len(tokenizer)
        counts = read_ledger(folder)
        self._all_pairs = {side: counts[side]["pairs"] + counts[side]["too_long"] for side in SIDES}
        return DataFacts(
            name=self.name,
            hash=content_hash(key)[:16],
            tokenizer_folder=tokenizer_folder,
            vocab_size=self._vocab_size,
            train_tokens=counts["train"]["targets"],
            val_tokens=int(self.val_samples.target_counts(self.val_rows).sum()),
            val_bytes=counts["val"]["bytes"] if self.validates_all else self._response_bytes(self.val_rows),
            val_overlap=counts["val_overlap"],
        )

    def _response_bytes(self, rows: NDArray[np.int64]) -> int:
        """Return the UTF-8 bytes of the responses of the validation pairs `rows`."""
        targets = self.val_samples.file.texts(rows)[1]
        return sum(len(self.template.render_response(target).encode()) for target in targets)

    def train_dataloader(self) -> DataLoader:
        """Load micro-batches of this rank from the trainer's optimizer step on, without end."""
        _, world, _ = self._rank_and_step()
        if self.batch_sequences < self.accumulate * world:
            raise InputError(
                f"batch_sequences={self.batch_sequences} is less than one pair for each of {world} processes times "
                f"{self.accumulate} micro-batches.\nRaise batch_sequences, or use fewer devices."
            )
        return super().train_dataloader()

    def sample_prompts(self, tokenizer: PreTrainedTokenizerFast) -> list[str]:
        """Return the first three different validation prompts."""
        return list(self._samples(tokenizer))

    def sample_references(self, tokenizer: PreTrainedTokenizerFast) -> list[str]:
        return list(self._samples(tokenizer).values())

    def _samples(self, tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
        """Return prompt → reference of the first three different validation prompts."""
        batch = self.val_samples.batch(np.arange(min(len(self.val_samples), 16)), 0)
        assert batch.prompt_lengths is not None
        assert batch.references is not None
        lengths = batch.prompt_lengths.tolist()
        prompts = [tokenizer.decode(batch.input_ids[row, :length]) for row, length in enumerate(lengths)]
        first: dict[str, str] = {}
        for prompt, reference in zip(prompts, batch.references, strict=True):
            first.setdefault(prompt, reference)
        return dict(list(first.items())[:3])

    def token_counts(self) -> NDArray[np.int64]:
        """Count how often each token is a target of the training pairs: (V,)."""
        return self.train_samples.file.token_counts(self._vocab_size)

    def sides(self, all_text: bool) -> list[tuple[PairFile, int]]:
        """Return the validation side, or both, each with its number of pairs including skipped ones."""
        sides = {"val": self.val_samples.file, "train": self.train_samples.file}
        return [(sides[name], self._all_pairs[name]) for name in (sides if all_text else ["val"])]

    def training_pairs(self) -> Iterator[tuple[str, str]]:
        """Yield (source, target) texts of the training side."""
        return ((source, target) for source, target, _ in self._split()[0]())

    def val_texts(self, count: int) -> tuple[list[str], list[str]]:
        """Return original (sources, targets) of the first validated pairs."""
        return self.val_samples.file.texts(self.val_rows[:count])

    def val_groups(self, count: int) -> list[int]:
        """Return the document group of each of the first validated pairs."""
        return self.val_samples.file.pair_groups(self.val_rows[:count]).tolist()

    def val_prompts(self, count: int) -> list[list[int]]:
        """Return the token ids of the first validated pairs' prompts."""
        sequences = (self.val_samples.file.sequence(row) for row in self.val_rows[:count].tolist())
        return [tokens[:length].tolist() for tokens, length in sequences]

    def _split(self) -> tuple[Pairs, Pairs, dict[str, Any]]:
        """Return (training pairs, validation pairs, identity of both)."""
        training, validation = self._sources()
        folder = self._collect(training)
        ledger = read_ledger(folder)
        if validation is None:
            identity = {"pairs": ledger["sha256"], "val_fraction": self.val_fraction}
            return *split_by_hash(folder, ledger["hashes"], self.val_fraction, self.name), identity
        val_folder = self._collect(validation)
        identity = {"pairs": ledger["sha256"], "val_pairs": read_ledger(val_folder)["sha256"]}
        return *split_by_files(folder, val_folder), identity

    def _sources(self) -> tuple[PairSource, PairSource | None]:
        """Return the sources of training pairs and of separate validation pairs, if any."""
        path, val_path, on_bad_line = self.files
        dataset, config, revision, split, val_split = self.hub
        from_hub = bool(dataset) and not path
        if from_hub:
            training = open_hub_source(dataset, config, revision, split, on_bad_line)
        else:
            training = open_pair_source(self.reader, path, self.language, on_bad_line, self.columns)
        if val_path:
            return training, open_tables(val_path, "val_path", on_bad_line, self.columns)
        if from_hub and val_split:
            return training, open_hub_source(dataset, config, revision, val_split, on_bad_line)
        return training, None

    def _collect(self, source: PairSource) -> Path:
        key = {"source": source.identity, "columns": self.columns, "format": 3}
        return get_or_build(
            "pairs",
            self.name,
            key,
            lambda folder: collect_pairs(folder, source, self.columns, self.name),
            self.cache_dir,
        )

    def _texts(self, pairs: Pairs) -> Iterator[str]:
        for source, target, _ in track(pairs(), f"prepare {self.name}: tokenizer", unit="pairs"):
            yield from (source, target)

    def _open(self, folder: Path, tokenizer: PreTrainedTokenizerFast, *, with_references: bool) -> PairSamples:
        file, bidirectional = PairFile(folder, len(tokenizer)), self.objective.kind.bidirectional_prompt
        packing = self.packing and not with_references  # metrics on generated text need one prompt per row
        return PairSamples(file, self.context, tokenizer.eos_token_id, with_references, bidirectional, packing)
