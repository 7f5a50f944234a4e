"""generate.py: text from any checkpoint, prompts verbatim, exit code 2 for user errors."""

import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import generate as generate_command
from gpt2lab.data.tokenizer import train_bpe
from gpt2lab.evaluation.acceptance import MOST_DRAFTS
from gpt2lab.generation import speculative
from gpt2lab.generation.decoder import Decoder
from gpt2lab.model.backbone import Backbone, to_hf
from gpt2lab.reports.hf_folder import write_hf_folder
from gpt2lab.settings import ModelShape
from launch import exit_codes
from launch.generate.generator import Arguments, TextGenerator
from launch.generate.prompts import stdin_lines
from tests.conftest import ROOT, command_here
from tests.support.pseudo_terminal import PseudoTerminal


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tokenizer = train_bpe(iter([Path(json.__file__).read_text()]), 300)
    shape = ModelShape(n_layer=1, n_head=2, n_embd=16, n_positions=32, vocab_size=len(tokenizer))
    torch.manual_seed(0)
    backbone = Backbone(shape)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.mul_(12)  # far from an even distribution
    write_hf_folder(to_hf(backbone), tokenizer, folder / "hf", {"title": "tiny"})
    return folder


def generate(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "generate.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_prompt_with_equals_commas_and_newlines_is_continued(checkpoint: Path, tmp_path: Path) -> None:
    prompt = "def add(a, b=1):\n    return {a: b}"
    words = [f"checkpoint={checkpoint}", f"prompt={prompt}", "max_new_tokens=4", f"json={tmp_path / 'out.json'}"]
    done = generate(*words)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out.json").read_text())
    assert [set(entry) for entry in written] == [{"prompt", "completion", "tokens", "seconds"}]
    assert written[0]["prompt"] == prompt
    assert written[0]["tokens"] <= 4
    assert done.stdout.rstrip("\n") == (prompt + written[0]["completion"]).rstrip("\n")


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
def test_user_error_has_exit_code_2_and_few_lines(
    words: list[str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    generate_here = command_here("generate.py", generate_command.main, monkeypatch, capfd)
    done = generate_here(*(word.format(checkpoint=checkpoint) for word in words))
    assert done.code == 2, done.stderr
    assert 1 <= len(done.stderr.strip().splitlines()) <= 5
    assert "Traceback" not in done.stderr


# In this process: the same as from the shell, without the seconds of imports


@dataclass
class Written:
    """Output of the command: stdout, stderr and its JSON file."""

    shown: str
    stderr: str
    texts: list[dict[str, Any]]


Write = Callable[..., Written]


@pytest.fixture
def write(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Write:
    def run(*words: str, stdin: str = "") -> Written:
        file = tmp_path / "written.json"
        file.unlink(missing_ok=True)
        length = [] if any(word.startswith("max_new_tokens") for word in words) else ["max_new_tokens=8"]
        given = [f"checkpoint={checkpoint}", f"json={file}", *length, *words]
        monkeypatch.setattr(sys, "argv", ["generate.py", *given])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capfd.readouterr()
        code = exit_codes.exit_code(generate_command.main)
        shown, stderr = capfd.readouterr()
        assert code == (2 if "error:" in stderr else 0), stderr
        return Written(shown, stderr, json.loads(file.read_text()) if file.is_file() else [])

    return run


def test_the_same_seed_gives_the_same_texts_and_samples_differ(write: Write) -> None:
    words = ["prompt=import", "num_samples=3", "max_new_tokens=12"]
    first, second = ([text["completion"] for text in write(*words).texts] for _ in range(2))
    assert first == second
    assert len(set(first)) == 3


@pytest.mark.parametrize("seed", [1337, 2**63 - 1])
def test_samples_of_several_batches_differ(seed: int, write: Write) -> None:
    words = ["prompt=import", "max_new_tokens=24", "sampling.temperature=1", "sampling.top_p=1", f"seed={seed}"]
    many, few = ([text["completion"] for text in write(*words, f"num_samples={count}").texts] for count in (33, 16))
    assert len(set(many)) == 33
    assert many[:16] == few


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_prompts_of_a_file_equal_single_prompts(ending: str, write: Write, tmp_path: Path) -> None:
    prompts = ["def add(a, b):", "import", "class Stack:"]
    lines = prompts if ending == "txt" else [json.dumps({"prompt": prompt}) for prompt in prompts]
    file = tmp_path / f"prompts.{ending}"
    file.write_text("\n".join(lines) + "\n")
    together = write(f"prompts={file}", "sampling=greedy").texts
    assert [text["prompt"] for text in together] == prompts
    alone = [write(f"prompt={prompt}", "sampling=greedy").texts[0]["completion"] for prompt in prompts]
    assert [text["completion"] for text in together] == alone


def test_beams_and_penalties_equal_transformers(write: Write, checkpoint: Path) -> None:
    lm = AutoModelForCausalLM.from_pretrained(checkpoint / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "hf")
    given = tokenizer("import", return_tensors="pt")
    found = set()
    for beams, penalty in ((1, 1.0), (4, 1.0), (1, 3.0), (4, 3.0)):
        method = "sampling=beam" if beams > 1 else "sampling=greedy"
        ids = lm.generate(**given, max_new_tokens=16, num_beams=beams, repetition_penalty=penalty, do_sample=False)
        theirs = tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
        words = [method, "max_new_tokens=16", f"sampling.repetition_penalty={penalty}"]
        ours = write("prompt=import", *words).texts[0]["completion"]
        assert ours == theirs
        found.add(ours)
    assert len(found) == 4, "beams and penalties both change what is written"


@pytest.mark.parametrize("word", ["sampling.min_p=1", "sampling.top_k=1", "sampling.top_p=0.01"])
def test_every_filter_can_leave_one_token(word: str, write: Write) -> None:
    keys = ["prompt=import", "sampling.temperature=1", word, *([] if "top_p" in word else ["sampling.top_p=1"])]
    tight = [write(*keys, f"seed={seed}") for seed in (1, 2)]
    assert tight[0].texts[0]["completion"] == tight[1].texts[0]["completion"]
    loose = [write("prompt=import", "sampling.temperature=1", "sampling.top_p=1", f"seed={seed}") for seed in (1, 2)]
    assert loose[0].texts[0]["completion"] != loose[1].texts[0]["completion"]
    typical = write("prompt=import", "sampling.temperature=1", "sampling.top_p=1", "sampling.typical_p=0.2", "seed=1")
    assert typical.texts[0]["completion"] != loose[0].texts[0]["completion"]


def test_no_repeat_ngram_and_stop_texts_work(write: Write) -> None:
    free = write("prompt=import", "sampling=greedy", "max_new_tokens=20").texts[0]
    once = write("prompt=import", "sampling=greedy", "max_new_tokens=20", "sampling.no_repeat_ngram=1").texts[0]
    assert once["completion"] != free["completion"]
    stop = next(letter for letter in once["completion"][3:] if letter.isascii() and letter.isprintable())
    stopped = write(
        "prompt=import", "sampling=greedy", "max_new_tokens=20", "sampling.no_repeat_ngram=1", f"stop=~never~||{stop}"
    ).texts[0]
    assert stopped["completion"] == once["completion"].partition(stop)[0]
    assert stopped["tokens"] < once["tokens"]


@pytest.mark.parametrize("stop", ["", "~never~"])
def test_text_is_streamed_to_a_terminal(
    stop: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text that may belong to a stop text is held back."""
    screen, terminal = pty.openpty()
    os.set_blocking(screen, False)
    shown, read = [""], Decoder.read  # the shown text before each forward pass

    def look() -> None:
        with suppress(BlockingIOError):
            shown.append(shown[-1] + os.read(screen, 65536).decode().replace("\r\n", "\n"))

    def watched(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
        look()
        return read(decoder, ids)

    words = [
        "prompt=import",
        "max_new_tokens=24",
        f"checkpoint={checkpoint}",
        f"stop={stop}",
        "sampling.temperature=100",
        "sampling.top_p=1",
    ]
    monkeypatch.setattr(Decoder, "read", watched)
    monkeypatch.setattr(sys, "argv", ["generate.py", *words, f"json={tmp_path / 'written.json'}"])
    with monkeypatch.context() as on_a_terminal, os.fdopen(terminal, "w") as stdout:
        on_a_terminal.setattr(sys, "stdout", stdout)
        generate_command.main()
        early = shown[1:]
        stdout.flush()
        look()
    os.close(screen)
    (text,) = json.loads((tmp_path / "written.json").read_text())
    assert shown[-1].rstrip("\n").endswith(("import" + text["completion"]).rstrip("\n"))
    written_early = sum("import" in part for part in early)
    assert written_early == 0 if stop else written_early > 1, "the prompt, and then text before its last token"


def test_prompt_in_a_terminal_is_edited_and_has_several_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    keyboard, terminal = pty.openpty()
    with os.fdopen(terminal, "r+b", buffering=0) as raw:
        stdin, stdout = os.fdopen(os.dup(raw.fileno())), os.fdopen(os.dup(raw.fileno()), "w")
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(sys, "stdout", stdout)
        os.write(keyboard, b"def f():\\\n    return 1\n" + b"import\n" + b"\x04")
        assert list(stdin_lines()) == ["def f():\n    return 1", "import"]
    assert "readline" in sys.modules
    os.close(keyboard)


def test_in_bf16_text_is_that_of_a_bf16_model(write: Write, checkpoint: Path) -> None:
    prompt = "import json"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "hf")
    stock = AutoModelForCausalLM.from_pretrained(checkpoint / "hf", dtype=torch.bfloat16)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    written = stock.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    for words in ((), (f"draft={checkpoint}",)):
        done = write(f"prompt={prompt}", "max_new_tokens=12", "sampling=greedy", "precision=bf16", *words)
        assert done.texts[0]["completion"] == tokenizer.decode(written)
    generator = TextGenerator(Arguments(str(checkpoint), max_new_tokens=8, precision="bf16"))
    assert {parameter.dtype for parameter in generator.model.parameters()} == {torch.bfloat16}


def test_every_line_of_stdin_is_continued_without_a_prompt(write: Write) -> None:
    shown = write("sampling=greedy", stdin="import\nclass A:\n").shown.splitlines()
    assert shown[0].startswith("import")
    assert any(line.startswith("class A:") for line in shown)


def test_draft_writes_the_same_and_prints_its_acceptance(write: Write, checkpoint: Path) -> None:
    plain = write("prompt=import", "sampling=greedy").texts[0]
    drafted = write("prompt=import", "sampling=greedy", f"draft={checkpoint}")
    assert drafted.texts[0]["completion"] == plain["completion"]
    assert drafted.texts[0]["acceptance"] == 1
    assert 1 <= drafted.texts[0]["tokens_per_call"] <= 8
    assert "tokens per call" in drafted.stderr


def test_stop_text_ends_drafted_and_plain_text_equally(
    write: Write, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculative, "cost_ratio", lambda *_: 0.01)  # long drafts, with the stop text early or late
    monkeypatch.setattr(speculative, "verification_costs", lambda *_: [1.0] * (MOST_DRAFTS + 1))
    words = ["prompt=import", "sampling=greedy", "max_new_tokens=20", "sampling.no_repeat_ngram=1"]
    whole = write(*words).texts[0]
    places = set()
    for stop in {letter for letter in whole["completion"] if "!" <= letter < "|"}:
        plain, drafted = (write(*words, f"stop=~never~||{stop}", *more) for more in ((), (f"draft={checkpoint}",)))
        assert drafted.texts[0]["completion"] == plain.texts[0]["completion"] == whole["completion"].partition(stop)[0]
        tokens, per_call = drafted.texts[0]["tokens"], drafted.texts[0]["tokens_per_call"]
        assert tokens == plain.texts[0]["tokens"]
        places.add(tokens)
        assert per_call == pytest.approx(tokens / max(round(tokens / per_call), 1), abs=1e-4), "whole calls"
        assert drafted.shown.rstrip("\n") == ("import" + plain.texts[0]["completion"]).rstrip("\n")
    assert len(places) > 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prompt=a", "prompts=b"], "prompt and prompts are both given"),
        (["prompts=/nowhere.txt"], "cannot be read"),
        (["prompt=a", "draft=/nowhere"], "draft=/nowhere: there is no such folder"),
        (["prompt=a", "draft={checkpoint}", "sampling=beam"], "Leave out sampling=beam"),
        (["draft={checkpoint}"], "draft needs prompt= or prompts="),
        (["prompt=a", "num_samples=2", "sampling=greedy"], "num_samples=2 texts would all be the same"),
        (["prompt=a", "num_samples=2", "sampling=beam"], "Leave num_samples out"),
        (["prompt=a <|mask|>"], "fills none"),
    ],
)
def test_unsupported_generation_is_refused(words: list[str], message: str, write: Write, checkpoint: Path) -> None:
    assert message in write(*(word.format(checkpoint=checkpoint) for word in words)).stderr


@pytest.mark.slow
def test_ctrl_c_ends_the_text_and_at_the_prompt_the_program(tmp_path: Path) -> None:
    tokenizer = train_bpe(iter([Path(json.__file__).read_text()]), 300)
    shape = ModelShape(n_layer=4, n_head=2, n_embd=64, n_positions=1024, vocab_size=len(tokenizer))
    write_hf_folder(to_hf(Backbone(shape)), tokenizer, tmp_path / "hf", {"title": "tiny"})
    written, program = tmp_path / "written.json", [sys.executable, "generate.py", f"checkpoint={tmp_path}"]
    shown = PseudoTerminal([*program, "max_new_tokens=1000", f"json={written}"], 60, ROOT)
    shown.wait_for("Loading ")
    shown.wait_for("> ")
    for keys in ("import os\n", "\x1b[A\n"):  # then the same prompt, from the history
        shown.type(keys)
        shown.wait_for("\r\nimport os")
        shown.type("\x03")
        shown.wait_for("\r\nThis text was stopped. Ctrl-D ends the program.\r\n")
        shown.wait_for("> ")
    shown.interrupt_until("\r\nEnded by Ctrl-C.\r\n")
    assert shown.end() == exit_codes.INTERRUPTED
    assert "Traceback" not in shown.shown
    assert json.loads(written.read_text()) == []


@pytest.mark.slow
def test_ctrl_d_at_the_prompt_ends_with_its_message(checkpoint: Path) -> None:
    shown = PseudoTerminal([sys.executable, "generate.py", f"checkpoint={checkpoint}", "max_new_tokens=4"], 60, ROOT)
    shown.wait_for("> ")
    shown.type("import\n")
    shown.wait_for("\r\n> ")
    shown.type("\x04")
    assert shown.end() == exit_codes.FINISHED
    assert shown.lines[-1] == "Ended by Ctrl-D."
