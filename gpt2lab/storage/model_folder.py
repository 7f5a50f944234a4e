"""Model folder: resolve init=, teacher= or checkpoint= to a folder with a GPT-2, and read its config.json."""

import json
from pathlib import Path
from typing import Any

from gpt2lab.errors import InputError
from gpt2lab.settings import OBJECTIVES, PAIR_SIDES
from gpt2lab.storage.hub import is_hub_id, require_hub
from gpt2lab.storage.stored_weights import UNREADABLE, check_no_adapter, check_weights
from gpt2lab.storage.utf8 import check_text

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
# Key of config.json → supported values; gpt2lab/model/backbone.py does not implement GPT-2's other variants
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
    "n_inner": (None,),
    "add_cross_attention": (False,),
}
HUB_FILES = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"]
HUB_FILES += ["README.md", "merges.txt", "tokenizer_config.json", *TOKENIZER_FILES]


def resolve_model_folder(source: str, key: str) -> Path:
    """Return the export of a run directory, a Hugging Face folder itself, or the local copy of a Hub model.

    A Hub model is downloaded if it is not in the cache.

    Args:
        source: run directory, folder or Hub id.
        key: init, teacher or checkpoint, for messages.

    Raises:
        InputError: missing, not reachable, not a GPT-2, or damaged.
    """
    folder = Path(source).expanduser()
    if not folder.exists():
        if not is_hub_id(source):
            raise InputError(
                f"{key}={source}: there is no such folder.\nGive a run directory, a model folder or a Hub id."
            )
        folder = _from_hub(source, key)
    check_text(str(folder.resolve()), f"{key}={source}: {folder.resolve()}")
    for candidate in (folder / "hf", folder):
        if (candidate / "config.json").is_file():
            check_weights(candidate, read_shape(candidate))
            return candidate.resolve()
    check_no_adapter(folder)
    if (folder / ".metadata").is_file():
        raise InputError(
            f"{key}={source} is a sharded checkpoint.\n"
            f"Give its run directory, or convert it to a model folder: python -m launch.commands.consolidate {source}"
        )
    raise InputError(
        f"{key}={source} contains no model: neither hf/config.json (run directory) nor config.json (model folder).\n"
        "Give a run that has saved at least once, a Hugging Face folder, or a Hub id."
    )


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder contains tokenizer files."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def read_shape(folder: Path) -> dict[str, int]:
    """Read the sizes of the GPT-2 in a folder: n_layer, n_head, n_embd, n_positions, vocab_size.

    Raises:
        InputError: config.json cannot be read, or describes another architecture or an unsupported variant.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config["model_type"]
        defaults = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257}
        shape = {name: config.get(name, default) for name, default in defaults.items()}
        if wrong := [f"{name}={size!r}" for name, size in shape.items() if type(size) is not int]:
            raise ValueError(f"{', '.join(wrong)} is no whole number")
    except UNREADABLE as error:
        raise InputError(f"Cannot read {folder}/config.json: {error}\nGive a folder with a GPT-2 in it.") from error
    if kind != "gpt2":
        raise InputError(f"{folder} contains a {kind} model; give a GPT-2.")
    if min(shape.values()) < 1:
        raise InputError(f"{folder}/config.json has a size below 1: {shape}.\nGive a folder with a GPT-2 in it.")
    if shape["n_embd"] % shape["n_head"]:
        raise InputError(
            f"{folder}/config.json has n_embd={shape['n_embd']}, which is not a multiple of n_head={shape['n_head']}.\n"
            "Correct config.json, or give another folder."
        )
    if config.get("quantization_config"):
        raise InputError(
            f"{folder}/config.json has quantization_config; quantized models are not supported.\n"
            "Give the model that it was made from, or convert it in transformers: model.dequantize()"
        )
    for key, values in SUPPORTED.items():
        given = config.get(key, values[0])
        if given not in values and not (key == "n_inner" and given == 4 * shape["n_embd"]):
            raise InputError(
                f"{folder}/config.json has {key}={given}, a variant of GPT-2 that is not supported.\n"
                f"Give a model with {key}={values[0]}, the value of OpenAI's GPT-2."
            )
    return shape


def embedding_rows(folder: Path) -> int | None:
    """Return the vocabulary size of the GPT-2 in a folder; None if there is none, as in a folder of a tokenizer."""
    try:
        return read_shape(folder)["vocab_size"]
    except InputError:
        return None


def read_objective(folder: Path) -> str:
    """Return the objective in a model folder's config.json; clm where it names none of ours."""
    name = str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("objective", "clm"))
    return name if name in OBJECTIVES else "clm"


def read_pair_template(folder: Path) -> dict[str, str]:
    """Return the templates of a model trained on pairs, `prompt` and `response`; empty for other models."""
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("pair_template")
    is_template = isinstance(stored, dict) and all(isinstance(stored.get(side), str) for side in PAIR_SIDES)
    return {side: stored[side] for side in PAIR_SIDES} if is_template else {}


def parameter_count(shape: dict[str, Any]) -> int:
    """Number of parameters of a GPT-2, tied head counted once."""
    width = shape["n_embd"]
    block = 12 * width * width + 13 * width
    return (shape["vocab_size"] + shape["n_positions"]) * width + shape["n_layer"] * block + 2 * width


def matmul_parameter_count(shape: dict[str, Any]) -> int:
    """Number of parameters in matrix products, for FLOP: all except the position embeddings."""
    return parameter_count(shape) - shape["n_positions"] * shape["n_embd"]


def _from_hub(source: str, key: str) -> Path:
    """Return the local copy of a Hub model; download it if it is not in the cache and the Hub is reachable."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=HUB_FILES, local_files_only=True))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        require_hub(f"{key}={source} is not a local folder", "Give a run directory or a model folder.")
    try:
        return Path(snapshot_download(source, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{key}={source} is neither a local folder nor a model on the Hugging Face Hub: "
            f"{str(error).strip().splitlines()[0][:120]}\n"
            "Check the spelling, or give a run directory or a model folder."
        ) from error
