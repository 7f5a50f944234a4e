"""Synthetic corpus and tokenizer of any vocabulary size, for benchmarks without network access.

The corpus has nanoGPT's format, train.bin and val.bin of uint16; the tokenizer is a byte-level BPE folder whose tokens
other than bytes are fillers.
"""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.train_command import bin_data

END_OF_TEXT = "<|endoftext|>"


def write_data(folder: Path, vocab_size: int, train_tokens: int = 1_000_000, val_tokens: int = 8_192) -> list[str]:
    """Write folder/corpus and folder/tokenizer and return the arguments of train.py for them."""
    write_corpus(folder / "corpus", vocab_size, train_tokens, val_tokens)
    write_tokenizer(folder / "tokenizer", vocab_size)
    return bin_data(folder / "corpus", folder / "tokenizer")


def write_corpus(folder: Path, vocab_size: int, train_tokens: int = 1_000_000, val_tokens: int = 8_192) -> None:
    """Write folder/train.bin and folder/val.bin with token frequencies proportional to 1 / rank (Zipf)."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for name, count in (("train", train_tokens), ("val", val_tokens)):
        ids = np.exp(random.random(count) * np.log(vocab_size - 1)).astype(np.uint16)  # (count,)
        ids.tofile(folder / f"{name}.bin")


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer folder with exactly `vocab_size` tokens, the last of which is <|endoftext|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fillers = [f"{number}" * 2 for number in range(10_000, 10_000 + vocab_size - len(alphabet) - 1)]
    vocabulary = {token: number for number, token in enumerate([*alphabet, *fillers, END_OF_TEXT])}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
    tokenizer.save_pretrained(folder)
