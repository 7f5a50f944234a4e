"""Exported folder: files that any machine and version of transformers reads, and a model card whose example runs."""

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from gpt2lab.data.pair_template import PairTemplate
from gpt2lab.data.tokenizer import load_tokenizer, tokenizer_hash, train_bpe
from gpt2lab.generation.text_model import load_model
from gpt2lab.model.backbone import Backbone, hf_from_state
from gpt2lab.reports.card_usage import SOURCES
from gpt2lab.reports.hf_folder import write_hf_folder
from gpt2lab.settings import ModelShape

POSITIONS = 64
TEMPLATES = [
    {"prompt": "{source}\n\nTL;DR:", "response": " {target}"},
    {"prompt": "```\n'{source}'\n``` \"{}\" \\n\u2028é =", "response": "{target}\n"},
]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose files name this machine, a class of transformers 5 and added special tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = train_bpe(iter([Path(json.__file__).read_text()]), 300)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<tool>"], "pad_token": "<pad>"})
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    named = {name: str(folder / "x") for name in ("name_or_path", "tokenizer_file", "special_tokens_map_file")}
    file.write_text(json.dumps({**json.loads(file.read_text()), **named}))
    return folder


def export(given: Path, folder: Path, objective: str, template: dict[str, str]) -> Path:
    tokenizer = load_tokenizer(str(given))
    shape = ModelShape(n_layer=1, n_head=2, n_embd=16, n_positions=POSITIONS, vocab_size=len(tokenizer))
    torch.manual_seed(0)
    backbone = Backbone(shape)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.mul_(12)  # far from an even distribution
    write_hf_folder(hf_from_state(backbone.lm.state_dict(), shape, objective, template), tokenizer, folder, {})
    return folder


def values(node: Any) -> Iterator[Any]:
    """Yield every value and key of nested JSON."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield key
            yield from values(value)
    elif isinstance(node, list):
        for value in node:
            yield from values(value)
    else:
        yield node


def test_exported_files_describe_no_machine(given: Path, tmp_path: Path) -> None:
    folder = export(given, tmp_path / "hf", "clm", TEMPLATES[0])
    found = {file.name: json.loads(file.read_text()) for file in folder.rglob("*.json")}
    assert found.keys() == {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    texts = [value for content in found.values() for value in values(content) if isinstance(value, str)]
    assert not [text for text in texts if str(given.parent) in text or "name_or_path" in text or "local" in text]
    assert found["config.json"]["pair_template"] == TEMPLATES[0]


def test_exported_tokenizer_fits_transformers_4_and_5(given: Path, tmp_path: Path) -> None:
    """Version 4.57 has PreTrainedTokenizerFast, which by default returns token types and adds no space in front."""
    folder = export(given, tmp_path / "hf", "clm", {})
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_max_length"] == POSITIONS
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert config["add_prefix_space"]
    assert config["additional_special_tokens"] == ["<tool>"]
    assert not {"extra_special_tokens", "backend"} & config.keys()
    loaded, before = AutoTokenizer.from_pretrained(folder), load_tokenizer(str(given))
    assert tokenizer_hash(loaded) == tokenizer_hash(before)
    assert loaded.all_special_tokens == before.all_special_tokens
    assert loaded.model_max_length == POSITIONS
    assert (
        load_tokenizer(str(export(folder, tmp_path / "again", "clm", {}))).all_special_tokens
        == loaded.all_special_tokens
    )


CASES = [("clm", TEMPLATES[0]), ("prefix_lm", TEMPLATES[0]), ("clm", TEMPLATES[1]), ("clm", {}), ("prefix_lm", {})]


def in_fresh_process(program: str, folder: Path) -> str:
    """Run Python code with transformers only: this project is not on the path."""
    command = [sys.executable, "-PE", "-X", "utf8", "-c", program]
    return subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, check=True).stdout.decode()


def in_this_process(program: str, folder: Path) -> str:
    with redirect_stdout(io.StringIO()) as shown:
        exec(compile(program, "card", "exec"), {})
    return shown.getvalue()


@pytest.mark.parametrize("run", [in_this_process, pytest.param(in_fresh_process, marks=pytest.mark.slow)])
def test_card_example_writes_text_by_the_template(run: Callable[[str, Path], str], given: Path, tmp_path: Path) -> None:
    """Each example runs as printed, and writes what this project writes."""
    program, expected = "", ""
    for number, (objective, stored) in enumerate(CASES):
        folder = export(given, tmp_path / str(number), objective, stored)
        code = (folder / "README.md").read_text().split("```python\n")[1].split("\n```\n")[0]
        program += code.replace("path/to/this/folder", str(folder)) + "\n"
        sources = SOURCES if objective == "clm" else SOURCES[:1]
        prompts = [PairTemplate(**stored).render_prompt(one) for one in sources] if stored else ["def add(a, b):"]
        model = load_model(folder)
        length = max(model.encode(prompt).shape[1] for prompt in prompts)
        for prompt in prompts:
            expected += prompt + model.generate([prompt], max_new_tokens=min(64, POSITIONS - length))[0] + "\n"
    assert run(program, tmp_path) == expected
