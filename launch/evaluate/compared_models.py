"""Compared models: whether a checkpoint, its teacher and a baseline can be scored on the same tokens."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2lab.errors import InputError
from gpt2lab.settings import DataFacts
from gpt2lab.storage.model_folder import folder_of, read_shape

if TYPE_CHECKING:
    from gpt2lab.model.backbone import Backbone


@dataclass(frozen=True)
class NamedModel:
    """A model that an argument names.

    Attributes:
        key: checkpoint, teacher or baseline.
        source: as given.
        folder: its Hugging Face folder.
    """

    key: str
    source: str
    folder: Path
    positions: int
    vocab_size: int


def named_checkpoints(sources: str) -> list[NamedModel]:
    """The checkpoints that were named: one, several with commas between, or a pattern of folders.

    Raises:
        InputError: one of them is not there or holds no GPT-2, or a pattern fits nothing.
    """
    if not all(part.strip() for part in sources.split(",")):
        raise InputError(f"checkpoint={sources} names nothing at one place.\nGive a run directory, or several: A,B")
    found: list[str] = []
    for source in [sources] if _is_there(sources) else [part.strip() for part in sources.split(",")]:
        if any(sign in source for sign in "*?[") and not _is_there(source):
            fitting = _folders(Path(source).expanduser())
            if not fitting:
                raise InputError(f"checkpoint={source} fits no folder.\nGive a run directory, or another pattern.")
            found += fitting
        else:
            found.append(source)
    return [_named("checkpoint", source) for source in found]


def named_models(sources: dict[str, str]) -> list[NamedModel]:
    """The models that were named: key → run directory, Hugging Face folder or Hub id, or nothing.

    Raises:
        InputError: one of them is not there or holds no GPT-2, or there is a baseline and no teacher.
    """
    if sources.get("baseline") and not sources.get("teacher"):
        raise InputError(
            "baseline= says how far a student came from it to its teacher, and there is no teacher.\nGive teacher= too."
        )
    return [_named(key, source) for key, source in sources.items() if source]


def _is_there(source: str) -> bool:
    try:
        return Path(source).expanduser().exists()
    except OSError:  # many names together are too long for one
        return False


def _folders(pattern: Path) -> list[str]:
    root = Path(pattern.anchor)
    return sorted(str(path) for path in root.glob(str(pattern.relative_to(root))) if path.is_dir())


def _named(key: str, source: str) -> NamedModel:
    folder = folder_of(source, key)
    shape = read_shape(folder)
    return NamedModel(key, source, folder, shape["n_positions"], shape["vocab_size"])


def check_context(models: list[NamedModel], context: int) -> None:
    """Every model has room for the windows.

    Raises:
        InputError: names the first that has not.
    """
    for model in models:
        if not 2 <= context <= model.positions:
            raise InputError(
                f"context={context}: {model.key}={model.source} takes windows of 2 to {model.positions} tokens.\n"
                f"Give context={model.positions} or less."
            )


def check_vocabularies(models: list[NamedModel], facts: DataFacts) -> None:
    """Every model has an entry for every token, and numbers tokens as the data's tokenizer does.

    Heads may have more entries than the tokenizer: vocabularies are padded to round numbers.

    Raises:
        InputError: shows the first tokens that differ.
    """
    from gpt2lab.data.tokenizer import difference_in_words, differing_tokens, load_tokenizer

    for model in models:
        if facts.vocab_size > model.vocab_size:
            cure = (
                "Leave out tokenizer=, which takes the checkpoint's own."
                if model.key == "checkpoint"
                else f"Give a {model.key} trained with the tokenizer of the checkpoint."
            )
            different = difference_in_words(model.folder, load_tokenizer(facts.tokenizer_folder))
            raise InputError(
                f"tokenizer={facts.tokenizer_folder} has {facts.vocab_size} entries, "
                f"{model.key}={model.source} {model.vocab_size}.{different}\n{cure}"
            )
    if len(models) < 2:
        return  # the checkpoint's tokenizer is the data's, or the one that was named in its place
    of_data = load_tokenizer(facts.tokenizer_folder)
    for model in models[1:]:
        different = differing_tokens(of_data, load_tokenizer(str(model.folder)))
        if different:
            raise InputError(
                f"{models[0].key}={models[0].source} and {model.key}={model.source} number tokens differently,\n"
                f"for example {different}: their predictions cannot be compared.\n"
                f"Give a {model.key} trained with the same tokenizer; "
                f"python evaluate.py checkpoint={shlex.quote(model.source)} scores it alone."
            )


def loaded(model: NamedModel) -> "Backbone":
    """The weights.

    Raises:
        InputError: not all of them are finite numbers.
    """
    from gpt2lab.model.backbone import load_backbone

    backbone = load_backbone(str(model.folder))
    if not all(parameter.isfinite().all() for parameter in backbone.parameters()):
        raise InputError(
            f"{model.key}={model.source}: not all of its weights are finite numbers, so it predicts nothing.\n"
            "Its training diverged; give an earlier checkpoint, or another model."
        )
    return backbone
