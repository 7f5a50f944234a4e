"""Stored weights: names, dtypes and shapes of the tensors in a model folder, checked against its config.json."""

import json
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

from gpt2lab.errors import InputError

# Raised when a file has unexpected content, with any size and nesting depth
UNREADABLE: tuple[type[Exception], ...] = (OSError, ValueError, struct.error, LookupError, TypeError, AttributeError)
UNREADABLE += (MemoryError, OverflowError, RecursionError)
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # one file, or shards listed in FILE.index.json
ADAPTER = "adapter_config.json"
FLOATS = ("F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16")  # in safetensors, in PyTorch
LFS_POINTER = b"version https://git-lfs"
MASKS = (".attn.bias", ".attn.masked_bias")  # buffers of old GPT-2 files, which are not loaded

Tensors = dict[str, tuple[str, list[int]]]  # name → (dtype, shape)


def check_weights(folder: Path, shape: dict[str, int]) -> None:
    """Check that a folder holds the weights of a plain GPT-2 of these sizes, in floats.

    Raises:
        InputError: files are missing or damaged, hold other tensors than config.json describes, or an adapter.
    """
    files = _weight_files(folder)
    check_no_adapter(folder, files)
    if not files:
        raise InputError(f"{folder} has a config.json but no weights ({WEIGHTS[0]}).\nGive a complete folder.")
    tensors: Tensors = {}
    for file in files:
        _check_fetched(file)
        tensors |= _safetensors_header(file) if file.suffix == ".safetensors" else _pickled_tensors(file)
    for name, (dtype, _) in tensors.items():
        if ".crossattention." in name:
            raise InputError(f"{folder} has weights of cross-attention, which is not supported: {name}.\nGive another.")
        if dtype not in FLOATS and not name.endswith(MASKS):
            raise InputError(
                f"{folder}: {name} is stored as {dtype}; quantized weights are not supported.\n"
                "Give the model that they were made from, with weights in fp32, fp16 or bf16."
            )
    _check_sizes(folder, shape, tensors)


def check_no_adapter(folder: Path, weights: Sequence[Path] = ()) -> None:
    """Check that a folder has no PEFT adapter; transformers would load the module that adapter_config.json names.

    Args:
        weights: files of a model beside it.

    Raises:
        InputError: it has one.
    """
    if not (folder / ADAPTER).is_file():
        return
    merge = "merge it into its base model with PEFT, merge_and_unload(), and give the merged model."
    if weights:
        raise InputError(
            f"{folder} contains an adapter ({ADAPTER}) beside full weights, which may or may not include it.\n"
            f"If they do, remove adapter_*; else {merge}"
        )
    raise InputError(f"{folder} contains an adapter ({ADAPTER}) without its base model.\nFirst {merge}")


def _check_sizes(folder: Path, shape: dict[str, int], tensors: Tensors) -> None:
    """Compare the sizes in config.json with those of the tensors."""
    try:
        found = _sizes({name.removeprefix("transformer."): size for name, (_, size) in tensors.items()})
    except UNREADABLE as error:
        raise InputError(f"{folder} lacks weights of a plain GPT-2: {error}.\nGive a complete model.") from error
    described = {**shape, "n_inner": 4 * shape["n_embd"]}
    wrong = [name for name, size in found.items() if described[name] != size]
    if wrong:
        theirs, ours = (", ".join(f"{name}={sizes[name]}" for name in wrong) for sizes in (described, found))
        raise InputError(
            f"{folder}/config.json has {theirs}, but the weights have {ours}.\n"
            "Correct config.json, or give the folder that the weights were saved in."
        )


def _sizes(tensors: dict[str, list[int]]) -> dict[str, int]:
    """Return the sizes of a GPT-2 with tensors of these shapes; the number of heads does not show in them."""
    (vocab_size, n_embd), (n_positions, _) = tensors["wte.weight"], tensors["wpe.weight"]
    if (head := tensors.get("lm_head.weight", [vocab_size, n_embd])) != [vocab_size, n_embd]:
        raise ValueError(f"lm_head.weight has the shape {head}, unlike wte.weight with {[vocab_size, n_embd]}")
    n_layer = len({name.split(".")[1] for name in tensors if name.startswith("h.")})
    n_inner = tensors["h.0.mlp.c_fc.weight"][1]
    sizes = {"n_layer": n_layer, "n_embd": n_embd, "n_positions": n_positions, "vocab_size": vocab_size}
    return {**sizes, "n_inner": n_inner}


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers loads: one, or the shards of an index; none if there are no weights."""
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            try:
                shards = sorted({folder / shard for shard in json.loads(index.read_bytes())["weight_map"].values()})
            except UNREADABLE as error:
                raise InputError(f"Cannot read {index}: {error}\nIt is damaged; give another folder.") from error
            if missing := [shard.name for shard in shards if not shard.is_file()]:
                raise InputError(f"{folder} lacks {missing[0]}, listed in {index.name}.\nGive a complete folder.")
            return shards
    return []


def _check_fetched(file: Path) -> None:
    """Raise an InputError for the pointer that Git leaves instead of a large file."""
    with file.open("rb") as stream:
        is_pointer = stream.read(len(LFS_POINTER)) == LFS_POINTER
    if is_pointer:
        raise InputError(f"{file} is a pointer of Git LFS, not the weights.\nFetch them: git lfs pull")


def _safetensors_header(file: Path) -> Tensors:
    """Return the tensors of a file; its length must be the one stated in its header."""
    try:
        with file.open("rb") as stream:
            (header_length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(header_length))
        header.pop("__metadata__", None)
        tensors = {name: (item["dtype"], item["shape"]) for name, item in header.items()}
        is_complete = file.stat().st_size == 8 + header_length + max(i["data_offsets"][1] for i in header.values())
    except UNREADABLE as error:
        reason = str(error) or "it is no safetensors file"
        raise InputError(f"Cannot read {file}: {reason}\nIt is damaged; give another folder.") from error
    if not is_complete:
        size = file.stat().st_size
        raise InputError(
            f"{file} is truncated or damaged: its {size} bytes are not those of its header.\n"
            "Copy it again, or give another folder."
        )
    return tensors


def _pickled_tensors(file: Path) -> Tensors:
    """Return the tensors of a file written by torch.save, which is mapped, not read, in PyTorch's present format."""
    from gpt2lab.storage.tensor_file import input_error_when_unreadable, read_tensor_file  # imports torch

    with input_error_when_unreadable(file):
        state = read_tensor_file(file, mmap=zipfile.is_zipfile(file))
        return {name: (str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in state.items()}
