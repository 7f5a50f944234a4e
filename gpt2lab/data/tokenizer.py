"""Tokenizers: train a byte-level BPE, load any Hugging Face one, tell whether two are the same."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gpt2lab.errors import InputError
from gpt2lab.settings import TokenizerChoice
from gpt2lab.storage.hub import is_hub_id, require_hub
from gpt2lab.storage.model_folder import TOKENIZER_FILES, has_tokenizer
from gpt2lab.storage.prepared_cache import content_hash, prepared

END_OF_TEXT = "<|endoftext|>"
BYTE_ENTRIES = 256
BPE_TEXT = 256 * 2**20
ENDLESS_WORD = re.compile(r"\w{512,}|[^\w\s]{512,}")  # encoded data: the time to learn from a word grows as its square


def load_tokenizer(source: str) -> PreTrainedTokenizerFast:
    """Load from a run directory, a folder with tokenizer files, or the Hub.

    Raises:
        InputError: nothing to be found there, or it names no end-of-text token.
    """
    folder = _tokenizer_folder(source)
    cure = (
        "Give a folder with tokenizer files or a Hub id: tokenizer=hub tokenizer.source=…,\n"
        "or train one on your data: tokenizer=bpe"
    )
    if folder is None and not _in_hub_cache(source):
        require_hub(f"The tokenizer {source}", cure.replace(" or a Hub id", ""))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder or source, local_files_only=folder is not None, trust_remote_code=False
        )
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"Cannot load the tokenizer {source}: {reason}\n{cure}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"The tokenizer {source} has no tokenizer.json (a `tokenizers` one); {cure}")
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"The tokenizer {source} names no end-of-text token; add eos_token to its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _tokenizer_folder(source: str) -> Path | None:
    """The folder that `source` means, None for a Hub id.

    Raises:
        InputError: a path that leads nowhere, or a folder without tokenizer files.
    """
    folder = Path(source).expanduser()
    if not source or not folder.is_dir():
        if not is_hub_id(source):
            raise InputError(
                f"The tokenizer {source!r}: no such folder.\nGive a folder with tokenizer files or a Hub id."
            )
        return None
    inner = folder / "hf"
    folder = inner if inner.is_dir() else folder
    if not has_tokenizer(folder):
        raise InputError(
            f"{source} holds no tokenizer: none of {', '.join(TOKENIZER_FILES)}.\n"
            "Give a folder with tokenizer files: tokenizer=hub tokenizer.source=FOLDER"
        )
    return folder


def _in_hub_cache(source: str) -> bool:
    """Whether an earlier download of this Hub id lies in the Hugging Face cache."""
    return any(isinstance(try_to_load_from_cache(source, name), str) for name in TOKENIZER_FILES)


def train_bpe(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocab_size` entries as in GPT-2: the 256 bytes, merges, and <|endoftext|> as number 0.

    Learnt from the first 256 Mi characters, words of more than 511 left out: the trainer holds every distinct word in
    memory. Little text gives fewer entries than asked for.

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
    tokenizer.train_from_iterator((ENDLESS_WORD.sub(" ", text) for text in _first(texts, BPE_TEXT)), trainer)
    return _with_end_of_text(tokenizer)


def _first(texts: Iterator[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def numbered_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Writes every token as its number, <17>: for token files whose own tokenizer is not at hand.

    The last entry is <|endoftext|>, where GPT-2 has it. Text that is no such number becomes <|endoftext|>.
    """
    names = [f"<{number}>" for number in range(vocab_size - 1)] + [END_OF_TEXT]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END_OF_TEXT))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _with_end_of_text(tokenizer)


def _with_end_of_text(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
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
    """A folder in the cache that `load_tokenizer` and, offline, `AutoTokenizer.from_pretrained` take.

    A BPE is trained once for each data identity and size. A given tokenizer is copied there: one of the Hub is asked
    for once, and a run can go on when the folder it came from is gone.

    Raises:
        InputError: the given tokenizer cannot be had, or there is no text to train on.
    """
    if choice.kind == "pretrained":
        return str(_copied_tokenizer(choice.source, cache_dir))

    def build(folder: Path) -> dict[str, Any]:
        return _save(train_bpe(training_texts(), choice.vocab_size), folder)

    key = {"data": identity, "vocab_size": choice.vocab_size, "algorithm": "byte-level BPE 2"}
    return str(prepared("tokenizers", name, key, build, cache_dir))


def _copied_tokenizer(source: str, cache_dir: Path) -> Path:
    if _tokenizer_folder(source) is None:
        name, key = source.replace("/", "--"), {"hub": source}
        return prepared("tokenizers", name, key, lambda folder: _save(load_tokenizer(source), folder), cache_dir)
    tokenizer = load_tokenizer(source)
    key = {"tokenizer": tokenizer_hash(tokenizer)}
    return prepared("tokenizers", "given", key, lambda folder: _save(tokenizer, folder), cache_dir)


def _save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> dict[str, Any]:
    tokenizer.save_pretrained(folder)
    return {"vocab_size": len(tokenizer), "tokenizer": tokenizer_hash(tokenizer)}


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of everything that decides which ids a text gets; how it last padded or cut a batch does not count."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return content_hash([backend.to_str(), tokenizer.eos_token_id])


def differing_tokens(first: PreTrainedTokenizerFast, second: PreTrainedTokenizerFast, shown: int = 3) -> str:
    """The first few tokens whose ids differ, as text for a message; empty when the two agree."""
    ours, theirs = first.get_vocab(), second.get_vocab()
    if ours == theirs:
        return ""
    different = [token for token in sorted({**ours, **theirs}) if ours.get(token) != theirs.get(token)]
    return ", ".join(f"{token!r}: {ours.get(token)} and {theirs.get(token)}" for token in different[:shown])


def difference_in_words(folder: Path, tokenizer: PreTrainedTokenizerFast, shown: int = 3) -> str:
    """How the tokenizer in a model folder numbers tokens differently, as a sentence with a line end before it.

    Empty where the folder holds no tokenizer, or both agree.
    """
    different = differing_tokens(load_tokenizer(str(folder)), tokenizer, shown) if has_tokenizer(folder) else ""
    return f"\nThe two number tokens differently, for example {different}." if different else ""


class TextEncoder:
    """Token ids of texts, many at once on all cores. Text that spells a special token gets no special treatment."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True

    def __call__(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
