"""Prompts of generate.py and the playground: read as written, tokenized like training text, within a template."""

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import generate
from gpt2lab.data.pair_template import PairTemplate, encode_pairs
from gpt2lab.data.tokenizer import TextEncoder, load_tokenizer, train_bpe
from gpt2lab.errors import InputError
from gpt2lab.generation.text_model import load_model
from gpt2lab.model.backbone import Backbone, hf_from_state
from gpt2lab.reports.hf_folder import write_hf_folder
from gpt2lab.settings import GREEDY, ModelShape, OptimizerSettings, ScheduleSettings, TrainingSettings
from launch.generate.generator import Arguments, TextGenerator
from launch.generate.playground import Playground
from launch.generate.prompts import Prompt, given_prompts, stdin_lines
from lightning_modules import backbone_module
from lightning_modules.pretrain import Pretrain
from tests.conftest import Answer, command_here

SUMMARIZE = {"prompt": "{source}\n\nTL;DR:", "response": " {target}"}
SOURCE = "def add(a, b):\n    return a + b"
SHAPE = ModelShape(n_layer=1, n_head=2, n_embd=16, n_positions=64, vocab_size=300)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models trained on running text and on pairs, with a tokenizer that puts end-of-text around what it encodes."""
    tokenizer = train_bpe(iter([Path(json.__file__).read_text()]), 300)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", tokenizer.eos_token_id)]
    )
    torch.manual_seed(0)
    state, found = Backbone(SHAPE).lm.state_dict(), {}
    for name, template in (("pretrained", {}), ("finetuned", SUMMARIZE)):
        found[name] = tmp_path_factory.mktemp(name)
        write_hf_folder(hf_from_state(state, SHAPE, "clm", template), tokenizer, found[name] / "hf", {"title": name})
    return found


Run = Callable[..., Answer]


@pytest.fixture
def run(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Run:
    """generate.py in this process, with bytes on standard input; texts are written to written.json."""
    monkeypatch.chdir(tmp_path)
    here = command_here("generate.py", generate.main, monkeypatch, capfd)

    def command(*words: str, stdin: bytes = b"", model: str = "finetuned") -> Answer:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="latin-1"))
        length = [] if any(word.startswith("max_new_tokens") for word in words) else ["max_new_tokens=6"]
        return here(f"checkpoint={models[model]}", "sampling=greedy", "json=written.json", *length, *words)

    return command


def written() -> list[dict[str, Any]]:
    return json.loads(Path("written.json").read_text())


# Text as written

READ: dict[str, tuple[str, bytes, list[str]]] = {
    "BOM": ("txt", b"\xef\xbb\xbfna\xc3\xafve\nb\n", ["naïve", "b"]),
    "BOM in jsonl": ("jsonl", b'\xef\xbb\xbf{"prompt": "a"}\n', ["a"]),
    "separators": ("txt", "a\u2028b\x0cc\u0085d\x1ce\nf".encode(), ["a\u2028b\x0cc\u0085d\x1ce", "f"]),
    "separators in jsonl": ("jsonl", '{"prompt": "a\u2028b\x0cc\u0085d"}\n\n'.encode(), ["a\u2028b\x0cc\u0085d"]),
    "CRLF": ("txt", b"a\r\n\r\nb\r\n", ["a", "b"]),
    "CRLF in jsonl": ("jsonl", b'{"prompt": "a\\nb"}\r\n{"prompt": "c"}\r\n', ["a\nb", "c"]),
    "capital suffix": ("JSONL", b'{"prompt": "a"}', ["a"]),
}


@pytest.mark.parametrize("kind", READ)
def test_prompt_file_is_read_as_written(kind: str, tmp_path: Path) -> None:
    suffix, content, expected = READ[kind]
    file = tmp_path / f"prompts.{suffix}"
    file.write_bytes(content)
    assert given_prompts("", "", str(file)) == [Prompt(text) for text in expected]


def test_stdin_is_read_as_a_prompt_file_is(monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"\xef\xbb\xbf" + "naïve\u2028\x0c\u0085\r\n\r\nb".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))
    assert list(stdin_lines()) == ["naïve\u2028\x0c\u0085", "", "b"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\nb\0\n")))
    with pytest.raises(InputError, match="line 2 of the standard input contains NUL"):
        list(stdin_lines())


def put(name: str, content: bytes) -> str:
    Path(name).write_bytes(content)
    return f"prompts={name}"


def on_the_page(folder: Path, body: bytes) -> Answer:
    playground = Playground(TextGenerator(Arguments(str(folder), serve=True, max_new_tokens=4)))
    with pytest.raises(InputError) as refused:
        playground.read(body)
    return Answer(2, "", str(refused.value))


LATIN_1, SURROGATE = b"caf\xe9 au lait", b'{"prompt": "caf\\ud83d"}'
ENTRIES: dict[str, Callable[[Run, Path], Answer]] = {
    "prompt=": lambda run, _: run(f"prompt={os.fsdecode(LATIN_1)}"),
    "source=": lambda run, _: run(f"source={os.fsdecode(LATIN_1)}"),
    "surrogate in prompt=": lambda run, _: run("prompt=caf\ud83d"),
    "stdin": lambda run, _: run(stdin=b"import\n" + LATIN_1),
    "text file": lambda run, _: run(put("a.txt", b"import\n" + LATIN_1)),
    "long line": lambda run, _: run(put("a.txt", b"import\n" + b"x = 1; " * 500 + LATIN_1)),
    "jsonl": lambda run, _: run(put("a.jsonl", b'{"prompt": "a"}\n{"prompt": "' + LATIN_1 + b'"}')),
    "surrogate in jsonl": lambda run, _: run(put("a.jsonl", b'{"prompt": "a"}\n' + SURROGATE)),
    "UTF-16": lambda run, _: run(put("a.txt", "\nnaïve".encode("utf-16"))),
    "page": lambda run, folder: on_the_page(folder, b'{"prompt": "' + LATIN_1 + b'"}'),
    "surrogate on the page": lambda run, folder: on_the_page(folder, SURROGATE),
    "source on the page": lambda run, folder: on_the_page(folder, SURROGATE.replace(b"prompt", b"source")),
}
IN_LINE_2 = ("stdin", "text file", "long line", "jsonl", "surrogate in jsonl")


@pytest.mark.parametrize("entry", ENTRIES)
def test_invalid_utf8_is_refused_by_one_message(entry: str, run: Run, models: dict[str, Path]) -> None:
    ended = ENTRIES[entry](run, models["finetuned"])
    assert ended.code == 2, ended.stderr
    first, last = ended.stderr.strip().splitlines()
    assert "is not valid UTF-8; text, files and folders are read and stored as UTF-8." in first
    assert last.startswith("Remove the invalid bytes or half a character")
    assert ("line 2" in first.lower()) == (entry in IN_LINE_2)
    assert "\\xff\\xfe" in first or "caf\\" in first, "the place in the text"


INVALID: dict[str, tuple[str, bytes, str]] = {
    "NUL": ("txt", "a\nb".encode("utf-16-le"), "line 1 contains NUL"),
    "JSON": ("jsonl", b'{"prompt": "a"}\n{"prompt": "b"', "line 2 is not JSON"),
    "depth": ("jsonl", b"[" * 100_000, "line 1 is not JSON"),
    "no field": ("jsonl", b'\n{"text": "a"}', "line 2 has no text in `prompt` or `source`"),
    "number": ("jsonl", b'{"prompt": 1}', "line 1 has no text in `prompt` or `source`"),
    "list": ("jsonl", b'["prompt"]', "line 1 has no text in `prompt` or `source`"),
    "empty": ("txt", b"\xef\xbb\xbf\n", "contains no prompt"),
}


@pytest.mark.parametrize("kind", INVALID)
def test_invalid_prompt_file_is_refused_with_its_line(kind: str, tmp_path: Path) -> None:
    suffix, content, reason = INVALID[kind]
    file = tmp_path / f"prompts.{suffix}"
    file.write_bytes(content)
    with pytest.raises(InputError) as refused:
        given_prompts("", "", str(file))
    assert str(refused.value).startswith(f"prompts={file}")
    assert reason in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 3


# Tokens

TEXT = "import json\n<|endoftext|>"


def ids_of_samples(folder: Path, patch: pytest.MonkeyPatch) -> list[int]:
    """Token ids of a prompt of the samples callback."""
    seen: list[list[int]] = []

    def complete(
        lm: object, tokenizer: object, objective: str, prompts: list[list[int]], *_: object, **__: object
    ) -> list:
        seen.extend(prompts)
        return []

    patch.setattr(backbone_module, "complete", complete)
    settings = (OptimizerSettings("adamw", lr=1e-3, weight_decay=0.0), ScheduleSettings("constant", 0, 0.0))
    module = Pretrain(TrainingSettings(SHAPE, str(folder / "hf"), "scratch", *settings, 1, 1, 1, 1))
    module.configure_model()
    module.generate([TEXT], GREEDY, 4)
    return seen[0]


def ids_of_pairs(folder: Path, _: pytest.MonkeyPatch) -> list[int]:
    """Token ids of a prompt of fine-tuning, its validation and evaluate.py."""
    (pair,) = encode_pairs([(TEXT, "x")], PairTemplate("{source}", "{target}"), load_tokenizer(str(folder)), 60)
    assert pair is not None
    return pair.prompt


TOKENIZED: dict[str, Callable[[Path, pytest.MonkeyPatch], list[int]]] = {
    "generate.py": lambda folder, _: TextGenerator(Arguments(str(folder), TEXT, max_new_tokens=4))._ids(TEXT),
    "playground": lambda folder, _: (
        Playground(TextGenerator(Arguments(str(folder), serve=True, max_new_tokens=4)))
        .read(json.dumps({"prompt": TEXT}).encode())
        .ids
    ),
    "library": lambda folder, _: load_model(folder).encode(TEXT)[0].tolist(),
    "samples": ids_of_samples,
    "pairs": ids_of_pairs,
}


@pytest.mark.parametrize("entry", TOKENIZED)
def test_prompt_is_tokenized_like_training_text(
    entry: str, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(str(models["finetuned"]))
    assert len(tokenizer("import")["input_ids"]) == len(tokenizer.tokenize("import")) + 2
    (expected,) = TextEncoder(tokenizer)([TEXT])
    assert tokenizer.eos_token_id not in expected
    assert TOKENIZED[entry](models["finetuned"], monkeypatch) == expected


# The prompt template of a fine-tuned model


def test_source_is_continued_within_the_template(run: Run, tmp_path: Path) -> None:
    prompt = f"{SOURCE}\n\nTL;DR:"
    assert run(f"prompt={prompt}").code == 0
    expected = [{**text, "seconds": 0} for text in written()]
    for words in (f"source={SOURCE}", put("a.jsonl", json.dumps({"source": SOURCE}).encode())):
        ended = run(words)
        assert ended.code == 0, ended.stderr
        assert ended.stdout.startswith(prompt)
        assert [{**text, "seconds": 0} for text in written()] == expected


def test_end_of_a_long_source_is_cut(run: Run) -> None:
    ended = run("source=" + "import json  # first\n" * 20)
    assert ended.code == 0, ended.stderr
    assert "A source is longer than the context of the model; its end is cut." in ended.stderr
    (text,) = written()
    assert text["prompt"].startswith("import json  # first\nimport json")
    assert text["prompt"].endswith("\n\nTL;DR:")


def test_page_puts_a_source_into_the_template(models: dict[str, Path]) -> None:
    settings = {"serve": True, "max_new_tokens": 4}
    playground = Playground(TextGenerator(Arguments(str(models["finetuned"]), source=SOURCE, **settings)))
    facts = playground.facts()
    assert (facts["prompt"], facts["template"], facts["templated"]) == (SOURCE, SUMMARIZE["prompt"], True)
    assert playground.read(json.dumps({"source": SOURCE}).encode()).prompt == f"{SOURCE}\n\nTL;DR:"
    for body in (b'{"source": " "}', b'{"source": ["a"]}', b'{"source": "a", "prompt": "b"}'):
        with pytest.raises(InputError):
            playground.read(body)
    plain = Playground(TextGenerator(Arguments(str(models["pretrained"]), **settings)))
    assert (plain.facts()["template"], plain.facts()["templated"]) == ("", False)
    with pytest.raises(InputError, match="no prompt template"):
        plain.read(b'{"source": "a"}')


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["source=a", "prompt=b"], "prompt and source are both given"),
        (["source=a", "prompts=b"], "source and prompts are both given"),
        (["source=a", "max_new_tokens=60"], "does not fit into 4 tokens"),
    ],
)
def test_unusable_source_is_refused(words: list[str], reason: str, run: Run) -> None:
    ended = run(*words)
    assert ended.code == 2, ended.stderr
    assert reason in ended.stderr


def test_model_without_a_template_refuses_a_source(run: Run) -> None:
    ended = run("source=a", model="pretrained")
    assert ended.code == 2
    assert "stores no prompt template" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 2
