"""Compared models: resolves checkpoints, teacher and baseline, and checks that their losses are comparable."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2lab.errors import InputError
from gpt2lab.settings import DataFacts
from gpt2lab.storage.model_folder import read_shape, resolve_model_folder
from gpt2lab.storage.path_patterns import matching_paths

if TYPE_CHECKING:
    from gpt2lab.model.backbone import Backbone


@dataclass(frozen=True)
class NamedModel:
    """A model given as an argument.

    Attributes:
        key: the argument: checkpoint, teacher or baseline.
        source: its value: run directory, Hugging Face folder or Hub id.
        folder: local Hugging Face folder.
        positions: maximum context length.
        vocab_size: rows of the embedding.
    """

    key: str
    source: str
    folder: Path
    positions: int
    vocab_size: int


def resolve_checkpoints(sources: str) -> list[NamedModel]:
    """Resolve `checkpoint`: one source, several with commas in between, or a glob pattern of folders.

    Raises:
        InputError: a checkpoint does not exist or is not a GPT-2, or a pattern matches no folder.
    """
    if not all(part.strip() for part in sources.split(",")):
        raise InputError(f"checkpoint={sources} has an empty entry.\nGive a run directory, or several: A,B")
    found: list[str] = []
    for source in [sources] if _exists(sources) else [part.strip() for part in sources.split(",")]:
        if any(sign in source for sign in "*?[") and not _exists(source):
            matches = [str(path) for path in matching_paths(source) if path.is_dir()]
            if not matches:
                raise InputError(f"checkpoint={source} matches no folder.\nGive a run directory, or another pattern.")
            found += matches
        else:
            found.append(source)
    return [_resolve("checkpoint", source) for source in found]


def resolve_models(sources: dict[str, str]) -> list[NamedModel]:
    """Resolve `teacher` and `baseline`; empty sources are left out.

    Raises:
        InputError: a model does not exist or is not a GPT-2, or `baseline` is given without `teacher`.
    """
    if sources.get("baseline") and not sources.get("teacher"):
        raise InputError("baseline= measures the gap between baseline and teacher.\nGive teacher= too.")
    return [_resolve(key, source) for key, source in sources.items() if source]


def _exists(source: str) -> bool:
    try:
        return Path(source).expanduser().exists()
    except OSError:  # a list of several sources may be too long for a path
        return False


def _resolve(key: str, source: str) -> NamedModel:
    folder = resolve_model_folder(source, key)
    shape = read_shape(folder)
    return NamedModel(key, source, folder, shape["n_positions"], shape["vocab_size"])


def check_context(models: list[NamedModel], context: int) -> None:
    """Check that every model has enough positions for the context.

    Raises:
        InputError: a model has not.
    """
    for model in models:
        if not 2 <= context <= model.positions:
            raise InputError(
                f"context={context}: {model.key}={model.source} supports a context of 2 to {model.positions} tokens.\n"
                f"Give context={model.positions} or less."
            )


def check_vocabularies(models: list[NamedModel], facts: DataFacts) -> None:
    """Check that every model has an embedding for every token, and the same token ids as the data's tokenizer.

    A model may have more embeddings than tokens, because vocabularies are padded.

    Raises:
        InputError: a vocabulary is too small, or token ids differ; the message shows the first that differ.
    """
    from gpt2lab.data.tokenizer import describe_difference, differing_tokens, load_tokenizer

    for model in models:
        if facts.vocab_size > model.vocab_size:
            fix = (
                "Leave out tokenizer= to use the checkpoint's own."
                if model.key == "checkpoint"
                else f"Give a {model.key} trained with the tokenizer of the checkpoint."
            )
            different = describe_difference(model.folder, load_tokenizer(facts.tokenizer_folder))
            raise InputError(
                f"tokenizer={facts.tokenizer_folder} has {facts.vocab_size} tokens, "
                f"{model.key}={model.source} {model.vocab_size}.{different}\n{fix}"
            )
    if len(models) < 2:
        return  # the data use the checkpoint's tokenizer, or the one given instead
    data_tokenizer = load_tokenizer(facts.tokenizer_folder)
    for model in models[1:]:
        different = differing_tokens(data_tokenizer, load_tokenizer(str(model.folder)))
        if different:
            raise InputError(
                f"{models[0].key}={models[0].source} and {model.key}={model.source} have different token ids,\n"
                f"for example {different}: their predictions cannot be compared.\n"
                f"Give a {model.key} trained with the same tokenizer; "
                f"python evaluate.py checkpoint={shlex.quote(model.source)} scores it alone."
            )


def load(model: NamedModel) -> "Backbone":
    """Load the weights of a model.

    Raises:
        InputError: as `load_backbone`.
    """
    from gpt2lab.model.backbone import load_backbone

    return load_backbone(str(model.folder))
