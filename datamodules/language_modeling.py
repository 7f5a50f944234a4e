"""Language-modelling data: corpus → tokens on disk → windows → batches.

Step (1) corpus: documents and an identity (documents.py, hub_documents.py).
Step (2) split: by a hash of each document's key, or by the corpus's own validation part.
Step (3) tokenizer: trained on the training documents, or a given one.
Step (4) tokens: both sides into flat files, once, in the cache.
Step (5) batches: windows in the order of gpt2lab.order, a pure function of (seed, step).
"""

from pathlib import Path
from typing import Any

import lightning
import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from datamodules.documents import Corpus, packages_corpus, stdlib_corpus, text_corpus
from datamodules.hub_documents import hub_corpus
from datamodules.token_preparation import bytes_spelt, split_corpus, write_tokens
from datamodules.windows import TrainingWindows, WindowsInOrder
from gpt2lab.cache import cache_folder, content_hash, prepared, read_ledger
from gpt2lab.errors import InputError
from gpt2lab.settings import DataFacts, TokenizerChoice
from gpt2lab.token_file import TokenFile, token_dtype
from gpt2lab.tokenizer import load_tokenizer, prepare_tokenizer, tokenizer_hash


class LanguageModelingData(lightning.LightningDataModule):
    """Windows of running text.

    Args:
        name: shown in reports and cache folders.
        source: stdlib, packages, text, hub or bin.
        text_column, dataset, config, split, val_split, streaming: for source hub; text_column for record files too.
        path, val_path, val_fraction, on_bad_line: for files; bin takes a folder with train.bin and val.bin.
        batch_sequences: windows of the global batch of one optimizer step.
        accumulate: micro-batches of one step on each rank.
        eval_batch_sequences: windows of one validation batch.
    """

    def __init__(
        self,
        *,
        name: str,
        source: str,
        text_column: str = "text",
        dataset: str = "",
        config: str = "",
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
    ) -> None:
        super().__init__()
        self.name = name
        self.source = source
        self.hub_arguments = (dataset, config, split, val_split, text_column, streaming)
        self.tokenizer_choice = tokenizer
        self.context = context
        self.batch_sequences = batch_sequences
        self.accumulate = accumulate
        self.seed = seed
        self.workers = workers
        self.cache_dir = cache_folder(cache_dir)
        self.val_fraction = val_fraction
        self.file_arguments = (path, val_path, text_column, on_bad_line)
        self.eval_batch_sequences = eval_batch_sequences
        self.train_file: TokenFile
        self.val_file: TokenFile

    def prepare(self) -> DataFacts:
        """Make tokenizer and token files unless they are there, and open them. Idempotent.

        Raises:
            InputError: no text, a broken line, too little text for one window, no space left, and so on.
        """
        if self.source == "bin":
            folder, tokenizer_folder, facts = self._bin_folder()
        else:
            folder, tokenizer_folder, facts = self._token_folder()
        dtype = token_dtype(facts["vocab_size"])
        self.train_file = TokenFile(folder / "train.bin", dtype, self.context)
        self.val_file = TokenFile(folder / "val.bin", dtype, self.context, keep_short=True)
        for side, file in (("training", self.train_file), ("validation", self.val_file)):
            if file.windows == 0:
                raise InputError(
                    f"data={self.name}: the {side} text has {len(file.tokens)} tokens; "
                    f"one window of context={self.context} needs {self.context + 1 if side == 'training' else 2}.\n"
                    "Give more text, or lower context."
                )
        return DataFacts(
            name=self.name,
            hash=facts["hash"],
            tokenizer_folder=tokenizer_folder,
            vocab_size=facts["vocab_size"],
            train_tokens=len(self.train_file.tokens),
            val_tokens=self.val_file.targets,
            val_bytes=facts["val_bytes"],
        )

    def train_dataloader(self) -> DataLoader:
        """Micro-batches of this rank from the trainer's optimizer step on, without end."""
        rank, world, first_step = self._place()
        windows = TrainingWindows(
            self.train_file, self.batch_sequences, self.accumulate, self.seed, rank, world, first_step
        )
        return DataLoader(windows, batch_size=None, shuffle=False, num_workers=self.workers)

    def val_dataloader(self) -> DataLoader:
        """The whole validation split once; ranks take turns."""
        rank, world, _ = self._place()
        windows = WindowsInOrder(self.val_file, self.eval_batch_sequences, rank, world)
        return DataLoader(windows, batch_size=None, shuffle=False)

    def train_eval_dataloader(self) -> DataLoader:
        """The whole training split once, in file order, for evaluation."""
        rank, world, _ = self._place()
        return DataLoader(
            WindowsInOrder(self.train_file, self.eval_batch_sequences, rank, world), batch_size=None, shuffle=False
        )

    def _place(self) -> tuple[int, int, int]:
        """(rank, number of ranks, optimizer step to start from)."""
        if self.trainer is None:
            return 0, 1, 0
        return self.trainer.global_rank, self.trainer.world_size, self.trainer.global_step

    def _corpus(self) -> Corpus:
        if self.source == "stdlib":
            return stdlib_corpus()
        if self.source == "packages":
            return packages_corpus()
        if self.source == "text":
            return text_corpus(*self.file_arguments)
        if self.source == "hub":
            return hub_corpus(self.name, *self.hub_arguments)
        raise ValueError(f"unknown source {self.source!r}: one of stdlib, packages, text, hub, bin.")

    def _token_folder(self) -> tuple[Path, str, dict[str, Any]]:
        """(folder with train.bin and val.bin, tokenizer folder, facts)."""
        corpus = self._corpus()
        training, validation = split_corpus(corpus, self.val_fraction)
        identity = {**corpus.identity, "val_fraction": self.val_fraction}
        tokenizer_folder = prepare_tokenizer(
            self.tokenizer_choice,
            self.name,
            identity,
            lambda: (doc.text for doc in tqdm(training(), f"{self.name}: tokenizer", unit=" documents", disable=None)),
            self.cache_dir,
        )
        tokenizer = load_tokenizer(tokenizer_folder)

        def build(folder: Path) -> dict[str, Any]:
            sides = {"train": training, "val": validation}
            counts = {side: write_tokens(folder / f"{side}.bin", sides[side](), tokenizer, self.name) for side in sides}
            return {
                "vocab_size": len(tokenizer),
                "val_bytes": counts["val"]["bytes"],
                "counts": counts,
                "hash": content_hash([identity, tokenizer_hash(tokenizer)])[:16],
            }

        key = {"data": identity, "tokenizer": tokenizer_hash(tokenizer), "format": 1}
        folder = prepared("tokens", self.name, key, build, self.cache_dir)
        return folder, tokenizer_folder, read_ledger(folder)

    def _bin_folder(self) -> tuple[Path, str, dict[str, Any]]:
        """nanoGPT's train.bin and val.bin (uint16), used where they lie."""
        folder = Path(self.file_arguments[0]).expanduser()
        missing = [name for name in ("train.bin", "val.bin") if not (folder / name).is_file()]
        if missing or not self.file_arguments[0]:
            raise InputError(
                f"data=bin path={self.file_arguments[0]}: {' and '.join(missing)} not found.\n"
                "Give the folder in which nanoGPT's prepare.py wrote train.bin and val.bin: path=FOLDER"
            )
        tokenizer_folder = self.tokenizer_choice.source
        if self.tokenizer_choice.kind != "pretrained":
            raise InputError("data=bin holds tokens already; name the tokenizer that made them: tokenizer=hub")
        tokenizer = load_tokenizer(tokenizer_folder)
        tokens = np.memmap(folder / "val.bin", dtype="<u2", mode="r")
        stamp = [
            [(folder / name).stat().st_size, (folder / name).stat().st_mtime_ns] for name in ("train.bin", "val.bin")
        ]
        highest = int(tokens.max()) if len(tokens) else 0
        if highest >= len(tokenizer):
            raise InputError(
                f"{folder / 'val.bin'} holds token {highest}, but {tokenizer_folder} has {len(tokenizer)} entries.\n"
                "Name the tokenizer that made the file: tokenizer=hub tokenizer.source=FOLDER_OR_HUB_ID"
            )
        return (
            folder,
            tokenizer_folder,
            {
                "vocab_size": len(tokenizer),
                "val_bytes": bytes_spelt(tokens[1:], tokenizer),
                "hash": content_hash([str(folder.resolve()), stamp])[:16],
            },
        )
