"""Model folders: weights and config.json of a plain GPT-2 that fit each other; others are refused with the reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt2lab.errors import InputError
from gpt2lab.model.backbone import Backbone, load_backbone, to_hf
from gpt2lab.settings import ModelShape
from gpt2lab.storage.model_folder import resolve_model_folder

QUERY = "transformer.h.0.attn.c_attn.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 2 layers, 32 positions and 300 tokens."""
    folder = tmp_path_factory.mktemp("plain")
    to_hf(Backbone(ModelShape(2, 2, 16, 32, 300))).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    return shutil.copytree(plain, tmp_path / "model")


def config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        stored = load_file(folder / "model.safetensors")
        change(stored)
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_shards(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {"a.safetensors": {QUERY: stored.pop(QUERY)}, "b.safetensors": stored}
    for name, part in parts.items():
        save_file(part, folder / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, part in parts.items() for tensor in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "gpt2"}')
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")


def both(*changes: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def write(name: str, content: bytes, keep: bool = False) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(((folder / name).read_bytes() if keep else b"") + content)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
QUANTIZED = {"quant_method": "bitsandbytes", "load_in_8bit": True}
HEAD = "lm_head.weight"
CROSS = "transformer.h.0.crossattention.c_attn.weight"
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cross-attention": (config(add_cross_attention=True), "has add_cross_attention=True, a variant"),
    "cross-attention weights": (tensors(lambda t: t.update({CROSS: torch.ones(2)})), "cross-attention, which is not"),
    "quantization_config": (config(quantization_config=QUANTIZED), "has quantization_config"),
    "int8": (tensors(lambda t: t.update({QUERY: t[QUERY].to(torch.int8)})), f"{QUERY} is stored as I8"),
    "int8 pickle": (
        both(tensors(lambda t: t.update({QUERY: t[QUERY].to(torch.int8)})), as_pickle),
        f"{QUERY} is stored as int8",
    ),
    "adapter beside weights": (adapter, "beside full weights"),
    "adapter alone": (
        both(adapter, lambda folder: (folder / "model.safetensors").unlink()),
        "without its base model",
    ),
    "adapter without config.json": (
        both(adapter, lambda folder: (folder / "config.json").unlink()),
        "without its base model",
    ),
    "n_layer below": (config(n_layer=1), "has n_layer=1, but the weights have n_layer=2"),
    "n_layer above": (config(n_layer=3), "has n_layer=3, but the weights have n_layer=2"),
    "n_embd": (config(n_embd=32), "but the weights have n_embd=16"),
    "n_head": (config(n_head=3), "has n_embd=16, which is not a multiple of n_head=3"),
    "n_positions": (config(n_positions=64), "has n_positions=64, but the weights have n_positions=32"),
    "vocab_size": (config(vocab_size=200), "has vocab_size=200, but the weights have vocab_size=300"),
    "vocab_size, pickle": (both(config(vocab_size=200), as_pickle), "but the weights have vocab_size=300"),
    "vocab_size, shards": (both(config(vocab_size=200), as_shards), "but the weights have vocab_size=300"),
    "no embedding": (
        tensors(lambda t: t.pop("transformer.wte.weight")),
        "lacks weights of a plain GPT-2: 'wte.weight'",
    ),
    "size as text": (config(n_layer="2"), "n_layer='2' is no whole number"),
    "size with a fraction": (config(n_positions=32.5), "n_positions=32.5 is no whole number"),
    "pointer of Git LFS": (write("model.safetensors", POINTER), "is a pointer of Git LFS"),
    "pointer of Git LFS, pickle": (both(as_pickle, write("pytorch_model.bin", POINTER)), "is a pointer of Git LFS"),
    "text as weights": (write("model.safetensors", b"no weights at all"), "it is no safetensors file"),
    "bytes after the weights": (write("model.safetensors", b"x", keep=True), "is truncated or damaged"),
    "lost shard": (both(as_shards, lambda folder: (folder / "a.safetensors").unlink()), "lacks a.safetensors"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_unfit_model_folder_is_refused_with_the_reason(kind: str, folder: Path) -> None:
    change, reason = REFUSED[kind]
    change(folder)
    with pytest.raises(InputError) as caught:
        resolve_model_folder(str(folder), "init")
    message = str(caught.value)
    assert reason in message
    assert str(folder) in message
    assert len(message.splitlines()) == 2


NOT_LOADED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "output head": (tensors(lambda t: t.update({HEAD: t["transformer.wte.weight"] * 3})), "an output head of its own"),
    "larger output head": (tensors(lambda t: t.update({HEAD: torch.ones(301, 16)})), f"{HEAD} has the shape [301, 16]"),
    "narrow layer": (tensors(lambda t: t.update({QUERY: torch.ones(16, 40)})), f"{QUERY} has the shape [16, 40]"),
    "diverged": (
        tensors(lambda t: t["transformer.ln_f.bias"].fill_(float("nan"))),
        "ln_f.bias has values that are NaN",
    ),
    "lost tensor": (tensors(lambda t: t.pop("transformer.ln_f.bias")), "lacks weights required by its config.json"),
}


@pytest.mark.parametrize("kind", NOT_LOADED)
def test_weights_that_the_model_has_no_use_for_are_refused(kind: str, folder: Path) -> None:
    change, reason = NOT_LOADED[kind]
    change(folder)
    with pytest.raises(InputError) as caught:
        load_backbone(str(folder))
    assert reason in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    "change",
    [
        as_pickle,
        as_shards,
        tensors(lambda t: t.update({f"transformer.h.{n}.attn.bias": torch.ones(1, dtype=torch.bool) for n in (0, 1)})),
        tensors(lambda t: [t.update({name.removeprefix("transformer."): t.pop(name)}) for name in list(t)]),
        tensors(lambda t: t.update({name: tensor.half() for name, tensor in t.items()})),
    ],
    ids=["pickle", "shards", "mask buffers", "no prefix", "fp16"],
)
def test_stored_forms_of_one_model_load_alike(change: Callable[[Path], None], plain: Path, folder: Path) -> None:
    change(folder)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        ours, expected = (load_backbone(str(source)).eval().logits(ids) for source in (folder, plain))
    assert (ours - expected).abs().max() < 1e-3
