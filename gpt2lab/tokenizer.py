"""Tokenizers: train a byte-level BPE, load any Hugging Face one, tell whether two are the same."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gpt2lab.cache import content_hash, prepared
from gpt2lab.errors import InputError
from gpt2lab.settings import TokenizerChoice

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
BYTE_ENTRIES = 256


def load_tokenizer(source: str) -> PreTrainedTokenizerFast:
    """Load from a run directory, a folder with tokenizer files, or the Hub.

    Raises:
        InputError: nothing to be found there, or it names no end-of-text token.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        inner = folder / "hf"
        folder = inner if inner.is_dir() else folder
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise InputError(
                f"{source} holds no tokenizer: none of {', '.join(TOKENIZER_FILES)}.\n"
                "Give a folder with tokenizer files: tokenizer=hub tokenizer.source=FOLDER"
            )
        source = str(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InputError(
            f"Cannot load the tokenizer {source}: {str(error).splitlines()[0]}\n"
            "Give a folder with tokenizer files or a Hub id that can be reached (tokenizer=hub tokenizer.source=…),\n"
            "or train one on your data: tokenizer=bpe"
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"The tokenizer {source} names no end-of-text token; add eos_token to its tokenizer_config.json."
        )
    return tokenizer


def train_bpe(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocab_size` entries as in GPT-2: the 256 bytes, merges, and <|endoftext|> as number 0.

    Raises:
        InputError: `vocab_size` does not even hold the bytes.
    """
    if vocab_size <= BYTE_ENTRIES:
        raise InputError(
            f"vocab_size={vocab_size} is too small: the 256 bytes and {END_OF_TEXT} come before any merge."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def prepare_tokenizer(
    choice: TokenizerChoice,
    name: str,
    identity: dict[str, Any],
    training_texts: Callable[[], Iterator[str]],
    cache_dir: Path,
) -> str:
    """A folder or Hub id that `load_tokenizer` takes; a BPE is trained once for each data identity and size."""
    if choice.kind == "pretrained":
        return choice.source

    def build(folder: Path) -> dict[str, Any]:
        tokenizer = train_bpe(training_texts(), choice.vocab_size)
        tokenizer.save_pretrained(folder)
        return {"vocab_size": len(tokenizer)}

    key = {"data": identity, "vocab_size": choice.vocab_size, "algorithm": "byte-level BPE 1"}
    return str(prepared("tokenizers", name, key, build, cache_dir))


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of everything that decides which ids a text gets."""
    return content_hash([tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id])


def differing_tokens(first: PreTrainedTokenizerFast, second: PreTrainedTokenizerFast, shown: int = 3) -> str:
    """The first few tokens whose ids differ, as text for a message; empty when the two agree."""
    ours, theirs = first.get_vocab(), second.get_vocab()
    if ours == theirs:
        return ""
    different = [token for token in sorted({**ours, **theirs}) if ours.get(token) != theirs.get(token)]
    return ", ".join(f"{token!r}: {ours.get(token)} and {theirs.get(token)}" for token in different[:shown])


def encode_batch(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens, on all cores."""
    return [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
