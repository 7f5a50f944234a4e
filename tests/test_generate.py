"""generate.py: text from any checkpoint, prompts verbatim, mistakes answered with exit code 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2lab.backbone import Backbone, plain_hf
from gpt2lab.hf_folder import write_hf_folder
from gpt2lab.settings import ModelShape
from gpt2lab.tokenizer import train_bpe

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tokenizer = train_bpe(iter([Path(json.__file__).read_text()]), 300)
    shape = ModelShape(n_layer=1, n_head=2, n_embd=16, n_positions=32, vocab_size=len(tokenizer))
    write_hf_folder(plain_hf(Backbone(shape)), tokenizer, folder / "hf", {"title": "tiny"})
    return folder


def generate(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "generate.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_run_directory_continues_a_prompt_with_equals_commas_and_newlines(checkpoint: Path, tmp_path: Path) -> None:
    prompt = "def add(a, b=1):\n    return {a: b}"
    words = [f"checkpoint={checkpoint}", f"prompt={prompt}", "max_new_tokens=4", f"json={tmp_path / 'out.json'}"]
    done = generate(*words)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out.json").read_text())
    assert [set(entry) for entry in written] == [{"prompt", "completion", "tokens", "seconds"}]
    assert written[0]["prompt"] == prompt
    assert written[0]["tokens"] <= 4
    assert done.stdout.rstrip("\n") == (prompt + written[0]["completion"]).rstrip("\n")


def test_the_same_seed_gives_the_same_texts_and_samples_differ(checkpoint: Path, tmp_path: Path) -> None:
    texts = []
    for name in ("first", "second"):
        file = tmp_path / name
        done = generate(
            f"checkpoint={checkpoint / 'hf'}", "prompt=import", "num_samples=3", "max_new_tokens=12", f"json={file}"
        )
        assert done.returncode == 0, done.stderr
        texts.append([entry["completion"] for entry in json.loads(file.read_text())])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3


@pytest.mark.parametrize(
    "words",
    [
        ["prompt=x"],
        ["checkpoint=/nowhere/at/all", "prompt=x"],
        ["checkpoint={checkpoint}", "prompt=x", "max_new_tokens=32"],
        ["checkpoint={checkpoint}", "prompt=x", "temprature=1"],
        ["checkpoint={checkpoint}", "prompt=x", "json=/nowhere/at/all.json"],
    ],
)
def test_a_mistake_ends_with_exit_code_2_and_few_lines(words: list[str], checkpoint: Path) -> None:
    done = generate(*(word.format(checkpoint=checkpoint) for word in words))
    assert done.returncode == 2, done.stderr
    assert 1 <= len(done.stderr.strip().splitlines()) <= 5
    assert "Traceback" not in done.stderr
