"""Tokenizers: train a byte-level BPE, load a Hugging Face tokenizer, compare two."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gpt2lab.errors import InputError
from gpt2lab.settings import TokenizerChoice
from gpt2lab.storage.damaged_files import warn_once
from gpt2lab.storage.hub import is_hub_id, require_hub
from gpt2lab.storage.model_folder import TOKENIZER_FILES, embedding_rows, has_tokenizer
from gpt2lab.storage.prepared_cache import content_hash, get_or_build

END_OF_TEXT = "<|endoftext|>"
BYTE_TOKENS = 256
BPE_TEXT = 256 * 2**20  # characters
# Text is tokenized without the tokens that a tokenizer adds around it, and "<|endoftext|>" in it is ordinary text.
PLAIN_TEXT = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
LONG_WORD = re.compile(r"\w{512,}|[^\w\s]{512,}")  # encoded data; training time is quadratic in the length of a word


def load_tokenizer(source: str) -> PreTrainedTokenizerFast:
    """Load from a run directory, a folder with tokenizer files, or the Hub.

    Added tokens for which the model in the same folder has no embedding are left out.

    Raises:
        InputError: no tokenizer found, it has no eos_token, or it has more tokens than the model in the same folder.
    """
    folder = _find_tokenizer_folder(source)
    fix = (
        "Give a folder with tokenizer files or a Hub id: tokenizer=hub tokenizer.source=…,\n"
        "or train one on your data: tokenizer=bpe"
    )
    if folder is None and not _in_hub_cache(source):
        require_hub(f"The tokenizer {source}", fix.replace(" or a Hub id", ""))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder or source, local_files_only=folder is not None, trust_remote_code=False
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"Cannot load the tokenizer {source}: {reason}\n{fix}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"The tokenizer {source} is not a fast tokenizer (no tokenizer.json); {fix}")
    if folder is not None and (rows := embedding_rows(folder)):
        tokenizer = _without_tokens_from(rows, tokenizer, folder)
    if tokenizer.eos_token_id is None:
        raise InputError(f"The tokenizer {source} has no eos_token; add it to its tokenizer_config.json.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _without_tokens_from(rows: int, tokenizer: PreTrainedTokenizerFast, folder: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer without the added tokens of id `rows` and above, such as a [PAD] that no text contains.

    Raises:
        InputError: other tokens, or the end-of-text token, have such ids too.
    """
    beyond = {token for token, number in tokenizer.get_vocab().items() if number >= rows}
    if not beyond:
        return tokenizer
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    fix = "Give the tokenizer that the model was trained with, or resize the embedding: resize_token_embeddings()"
    if not beyond <= {token["content"] for token in content["added_tokens"]}:
        raise InputError(
            f"{folder}: the tokenizer has {len(tokenizer):,} tokens, but the model has {rows:,} embeddings.\n{fix}"
        )
    if tokenizer.eos_token in beyond:
        raise InputError(f"{folder}: the model has no embedding for the eos_token {tokenizer.eos_token!r}.\n{fix}")
    warn_once(f"{folder}: tokens without an embedding are left out of the tokenizer: {', '.join(sorted(beyond))}")
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in beyond]
    named = {name: token for name, token in tokenizer.special_tokens_map.items() if token not in beyond}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        extra_special_tokens=[token for token in tokenizer.extra_special_tokens if token not in beyond],
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        add_prefix_space=tokenizer.add_prefix_space,
        **named,
    )


def _find_tokenizer_folder(source: str) -> Path | None:
    """Return the tokenizer folder of `source`; None for a Hub id.

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
            f"{source} contains no tokenizer: none of {', '.join(TOKENIZER_FILES)}.\n"
            "Give a folder with tokenizer files: tokenizer=hub tokenizer.source=FOLDER"
        )
    return folder


def _in_hub_cache(source: str) -> bool:
    """Whether this Hub id is in the Hugging Face cache."""
    return any(isinstance(try_to_load_from_cache(source, name), str) for name in TOKENIZER_FILES)


def train_bpe(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `vocab_size` tokens as in GPT-2: 256 bytes, merges, and <|endoftext|> as id 0.

    Uses the first 256 Mi characters without words of more than 511, because the trainer keeps every distinct word in
    memory. Little text gives a smaller vocabulary.

    Raises:
        InputError: `vocab_size` is too small for the bytes.
    """
    if vocab_size <= BYTE_TOKENS:
        raise InputError(f"vocab_size={vocab_size} is too small; the 256 bytes and {END_OF_TEXT} need at least 257.")
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
    tokenizer.train_from_iterator((LONG_WORD.sub(" ", text) for text in _first(texts, BPE_TEXT)), trainer)
    return _with_end_of_text(tokenizer)


def _first(texts: Iterator[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def make_numbered_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer that decodes each token to its id, <17>, for token files without their tokenizer.

    The last id is <|endoftext|>, as in GPT-2. Other text is encoded as <|endoftext|>.
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
    """Return a folder in the cache that `load_tokenizer` and, offline, `AutoTokenizer.from_pretrained` can load.

    A BPE is trained once per data identity and size. A given tokenizer is copied to the cache: it is downloaded from
    the Hub once, and a run can be resumed after its source folder was deleted.

    Raises:
        InputError: the given tokenizer cannot be loaded, or there is no text to train on.
    """
    if choice.kind == "pretrained":
        return str(_copy_tokenizer(choice.source, cache_dir))

    def build(folder: Path) -> dict[str, Any]:
        return _save(train_bpe(training_texts(), choice.vocab_size), folder)

    key = {"data": identity, "vocab_size": choice.vocab_size, "algorithm": "byte-level BPE 2"}
    return str(get_or_build("tokenizers", name, key, build, cache_dir))


def _copy_tokenizer(source: str, cache_dir: Path) -> Path:
    if _find_tokenizer_folder(source) is None:
        name, key = source.replace("/", "--"), {"hub": source}
        return get_or_build("tokenizers", name, key, lambda folder: _save(load_tokenizer(source), folder), cache_dir)
    tokenizer = load_tokenizer(source)
    key = {"tokenizer": tokenizer_hash(tokenizer)}
    return get_or_build("tokenizers", "given", key, lambda folder: _save(tokenizer, folder), cache_dir)


def _save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> dict[str, Any]:
    tokenizer.save_pretrained(folder)
    return {"vocab_size": len(tokenizer), "tokenizer": tokenizer_hash(tokenizer)}


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the SHA-256 of all that determines the ids of a text; padding and truncation settings do not count."""
    return content_hash([_plain_backend(tokenizer).to_str(), tokenizer.eos_token_id])


def _plain_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Return a copy without padding and truncation."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return backend


def differing_tokens(first: PreTrainedTokenizerFast, second: PreTrainedTokenizerFast) -> str:
    """Return the first three tokens whose ids differ, as text for a message; empty if the vocabularies are equal."""
    ours, theirs = first.get_vocab(), second.get_vocab()
    if ours == theirs:
        return ""
    different = [token for token in sorted({**ours, **theirs}) if ours.get(token) != theirs.get(token)]
    return ", ".join(f"{token!r}: {ours.get(token)} and {theirs.get(token)}" for token in different[:3])


def describe_difference(folder: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """Return a line of a message, with a line break before it, on ids that differ from a model folder's tokenizer.

    It is empty if the folder has no tokenizer or the vocabularies are equal.
    """
    different = differing_tokens(load_tokenizer(str(folder)), tokenizer) if has_tokenizer(folder) else ""
    return f"\nThe two tokenizers have different ids, for example {different}." if different else ""


def encode_texts(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Tokenize a few texts as TextEncoder does."""
    return tokenizer(texts, return_attention_mask=False, **PLAIN_TEXT)["input_ids"]


class TextEncoder:
    """Batched tokenizer on all cores. Text like <|endoftext|> is encoded as ordinary text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = _plain_backend(tokenizer)
        self._backend.encode_special_tokens = True

    def __call__(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
