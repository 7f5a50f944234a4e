"""Inspection: attention, losses and divergence from a teacher equal plain formulas; pages are self-contained."""

import base64
import bisect
import copy
import json
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.projector.projector_plugin import ProjectorPlugin
from torch import Tensor
from transformers import GPT2LMHeadModel
from werkzeug.test import Client

import generate as generate_command
from callbacks.inspection import Inspect
from gpt2lab.data.batch import IGNORE_INDEX, Batch, PairTokens, pad_pairs
from gpt2lab.data.special_tokens import find_special_tokens
from gpt2lab.data.tokenizer import train_bpe
from gpt2lab.generation.completion import fill_masks, prompt_ids
from gpt2lab.model.attention_masks import spans_to_mask
from gpt2lab.model.backbone import Backbone, to_hf
from gpt2lab.reports.embedding_projector import kind, write_projector
from gpt2lab.reports.head_summary import habits
from gpt2lab.reports.hf_folder import write_hf_folder
from gpt2lab.reports.inspection import (
    Reading,
    inspect_reading,
    nearest,
    reading_of_batch,
    reading_of_gaps,
    reading_of_text,
    tokens_shown,
)
from gpt2lab.reports.inspection_html import write_inspection
from gpt2lab.reports.token_display import token_texts, with_signs
from gpt2lab.settings import ModelShape
from launch import exit_codes
from tests.conftest import Train
from tests.support import tiny_run
from tests.support.chromium import PROGRAM, Browser, faults

SOURCE = Path(bisect.__file__).read_text()
TOKENIZER = train_bpe(iter([SOURCE]), 300)
ENTRIES = len(TOKENIZER)


def model(seed: int = 0, heads: int = 2, width: int = 16, positions: int = 64, padding: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    backbone = Backbone(ModelShape(2, heads, width, n_positions=positions, vocab_size=ENTRIES + padding, dropout=0.1))
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.mul_(6)  # far from an even distribution
    return backbone.lm


def reading(objective: str) -> Reading:
    """A text in the form that a model of this objective reads."""
    ids = TOKENIZER(SOURCE)["input_ids"][:20]
    if objective == "mlm":
        gaps = prompt_ids("def <|mask|>(a):\n    re<|mask|>", TOKENIZER, "mlm")
        return reading_of_gaps(
            gaps, fill_masks(model(), gaps, find_special_tokens(TOKENIZER)), find_special_tokens(TOKENIZER).mask
        )
    return reading_of_text(ids[:12], ids[12:], objective, written=True, max_tokens=64)


def by_hand(lm: GPT2LMHeadModel, ids: list[int], seen: Tensor) -> tuple[Tensor, Tensor]:
    """Compute attention (L, H, T, T) and logits (T, V) of a GPT-2 by plain formulas; `seen` is (T, T)."""
    inner, heads = lm.transformer, lm.config.n_head
    x = inner.wte.weight[ids] + inner.wpe.weight[: len(ids)]
    maps = []
    for block in inner.h:
        width = x.shape[1] // heads
        q, k, v = block.attn.c_attn(block.ln_1(x)).split(x.shape[1], dim=1)
        q, k, v = (part.view(len(ids), heads, width).transpose(0, 1) for part in (q, k, v))
        scores = (q @ k.transpose(1, 2) / math.sqrt(width)).masked_fill(~seen, -math.inf)
        maps.append(scores.softmax(2))
        x = x + block.attn.c_proj((maps[-1] @ v).transpose(0, 1).reshape(x.shape))
        x = x + block.mlp.c_proj(torch.nn.functional.gelu(block.mlp.c_fc(block.ln_2(x)), approximate="tanh"))
    return torch.stack(maps), inner.ln_f(x) @ inner.wte.weight.T


@pytest.mark.parametrize("objective", ["clm", "prefix_lm", "mlm"])
def test_attention_and_figures_equal_the_formulas(objective: str) -> None:
    lm, text = model(padding=7), reading(objective)
    seen = spans_to_mask(text.spans)[0, 0]
    expected_both_ways = {"clm": 0, "prefix_lm": 11, "mlm": len(text.ids)}[objective]
    assert int((seen.triu(1).sum(1) > 0).sum()) == max(expected_both_ways - 1, 0)
    with torch.no_grad():
        maps, logits = by_hand(lm.eval(), text.ids, seen)
    found = inspect_reading(lm, text, ENTRIES)
    torch.testing.assert_close(found.attention, maps, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.attention.sum(3), torch.ones(found.attention.shape[:3]), rtol=0, atol=1e-5)
    assert (found.attention[:, :, ~seen] == 0).all()
    q = logits[:, :ENTRIES].softmax(1)
    shift = 0 if objective == "mlm" else 1
    assert found.positions == [place + shift for place, label in enumerate(text.labels) if label != IGNORE_INDEX]
    assert len(found.positions) == {"clm": 19, "prefix_lm": 8, "mlm": 2}[objective]
    for row, place in enumerate(found.positions):
        here, token = q[place - shift], text.text[place]
        assert found.expectations.losses[row] == pytest.approx(-math.log(here[token]), abs=1e-4)
        assert found.expectations.ranks[row] == 1 + int((here > here[token]).sum())
        assert found.expectations.entropies[row] == pytest.approx(-float((here * here.log()).sum()), abs=1e-4)
        likeliest = found.expectations.top_tokens[row]
        assert [entry for entry, _ in likeliest] == here.argsort(descending=True)[:5].tolist()
        assert [chance for _, chance in likeliest] == pytest.approx(here[[e for e, _ in likeliest]].tolist(), abs=1e-5)


def test_prefix_lm_reads_the_source_as_generation_does() -> None:
    """The losses after the prompt are those of the next token with the mask of `generate_ids`."""
    from gpt2lab.generation.sampling import _prefill_bidirectional

    lm, text = model().eval(), reading("prefix_lm")
    prompt = torch.tensor([text.ids[:12]])
    with torch.no_grad():
        cache = _prefill_bidirectional(lm, prompt[:, :-1], torch.ones_like(prompt[:, :-1]))
        logits = lm(prompt[:, -1:], past_key_values=cache, position_ids=torch.tensor([[11]])).logits[0, -1]
    found = inspect_reading(lm, text, ENTRIES)
    assert found.positions[0] == 12
    assert found.expectations.losses[0] == pytest.approx(-float(logits.log_softmax(0)[text.ids[12]]), abs=1e-4)


def test_teacher_is_compared_at_every_token_without_padding() -> None:
    text = reading("clm")
    student, teacher = model(padding=9), model(seed=1, heads=4, width=32)
    beside = inspect_reading(student, text, ENTRIES, teacher).disagreement
    assert beside is not None
    seen = spans_to_mask(text.spans)[0, 0]
    with torch.no_grad():
        q, p = (by_hand(lm.eval(), text.ids, seen)[1][:-1, :ENTRIES].softmax(1) for lm in (student, teacher))
    torch.testing.assert_close(torch.tensor(beside.kl), (p * (p / q).log()).sum(1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.tensor(beside.tvd), (p - q).abs().sum(1) / 2, rtol=0, atol=1e-5)
    losses = -p[torch.arange(len(p)), text.ids[1:]].log()
    torch.testing.assert_close(torch.tensor(beside.expectations.losses), losses, rtol=0, atol=1e-4)
    alike = inspect_reading(student, text, ENTRIES, student).disagreement
    assert alike is not None
    assert max(map(abs, alike.kl)) < 1e-5
    assert max(alike.tvd) < 1e-6


@pytest.mark.parametrize("training", [True, False])
def test_inspection_keeps_the_model_and_the_rng_state(training: bool) -> None:
    lm = model().train(training)
    before, implementation = torch.get_rng_state(), lm.config._attn_implementation
    inspect_reading(lm, reading("clm"), ENTRIES)
    assert torch.equal(torch.get_rng_state(), before)
    assert lm.training is training
    assert lm.config._attn_implementation == implementation
    assert not any(block.attn._forward_hooks for block in lm.transformer.h)


def test_long_text_is_read_whole_and_shows_its_last_tokens() -> None:
    lm, ids = model(), TOKENIZER(SOURCE)["input_ids"][:60]
    text = reading_of_text(ids, [], "clm", written=False, max_tokens=64)
    whole, part = inspect_reading(lm, text, ENTRIES), inspect_reading(lm, text, ENTRIES, most=10)
    assert part.attention.shape == (2, 2, 10, 10)
    assert torch.equal(part.attention, whole.attention[:, :, -10:, -10:])
    assert part.expectations == whole.expectations
    assert part.habits == whole.habits
    assert float(part.attention[0, 0, 0].sum()) < 0.999
    assert tokens_shown(48, 25, 1024) ** 2 * 48 * 25 <= 6_000_000
    assert tokens_shown(2, 2, 1024) == 192


def test_the_reading_of_a_batch_has_its_masks_and_no_padding() -> None:
    pairs = [[PairTokens(torch.arange(10, 41), 24, 0)], [PairTokens(torch.arange(50), 3, 1)]]
    batch = pad_pairs(pairs, target_tokens=10, context=64, pad_id=0, bidirectional=True)
    text = reading_of_batch(batch, "prefix_lm", 16)
    assert text.ids == list(range(10, 40))  # includes the response, although the prompt is longer than 16
    assert [label for label in text.labels if label != IGNORE_INDEX] == list(range(34, 40))
    assert text.spans[0, 0].tolist() == [0, 23]
    assert text.spans.max() == 30
    ids = torch.arange(40)[None]
    window = Batch(ids, ids + 1, 40, torch.tensor([0]))
    assert reading_of_batch(window, "clm", 16).ids == list(range(16))
    assert reading_of_batch(window, "clm", 64).labels == [*range(1, 40), IGNORE_INDEX]
    hidden = replace(
        window, labels=torch.where(ids % 7 == 3, ids, IGNORE_INDEX), spans=torch.tensor([[0, 40]] * 40)[None]
    )
    text = reading_of_batch(hidden, "mlm", 16)
    assert text.labels[3] == 3
    assert text.spans.max() == 16


def test_head_summaries_name_the_attended_tokens() -> None:
    size, spans = 12, reading_of_text(range(12), [], "clm", written=False, max_tokens=12).spans[0]
    previous, first, even = (torch.zeros(size, size) for _ in range(3))
    previous[range(1, size), range(size - 1)] = previous[0, 0] = 1
    first[:, 0] = 1
    even += torch.ones(size, size).tril() / torch.arange(1, size + 1)[:, None]
    summaries = habits(torch.stack([previous, first, torch.eye(size), even]), spans)
    choices = math.exp(sum(math.log(seen) for seen in range(2, size + 1)) / (size - 1))
    assert summaries == ["previous 100%", "first 100%", "itself 100%", f"≈ {choices:.0f} tokens"]
    bidirectional = torch.tensor([[0, size]] * size)
    assert habits(torch.eye(size).roll(1, 1)[None], bidirectional) == ["next 100%"]


def test_nearest_tokens_have_the_largest_cosine() -> None:
    weight = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    cosines = torch.nn.functional.cosine_similarity(weight[:40, None], weight[None, :40], dim=2)
    near = nearest(weight, [3, 7], 40, 5)
    for token, found in zip((3, 7), near, strict=True):
        order = [entry for entry in cosines[token].argsort(descending=True).tolist() if entry != token][:5]
        assert [entry for entry, _ in found] == order
        assert [cosine for _, cosine in found] == pytest.approx(cosines[token, order].tolist(), abs=1e-5)


def test_invisible_tokens_are_shown_as_symbols() -> None:
    marks = find_special_tokens(TOKENIZER)
    accent = TOKENIZER("é")["input_ids"]
    assert len(accent) == 2
    ids = [marks.mask, marks.prefix, *accent, TOKENIZER.eos_token_id]
    assert token_texts(TOKENIZER, ids) == ["<|mask|>", "<|prefix|>", "\\xc3", "\\xa9", "<|endoftext|>"]
    assert with_signs(" a\n\t\x00") == "␣a↵⇥\\x00"


# Pages


class Links(HTMLParser):
    """Collects the links of a page, its scripts and its data."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.scripts = 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [f"{tag} {value}" for name, value in attrs if name in ("src", "href")]
        self.scripts += tag == "script"


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found.group(1))


def test_page_is_self_contained_and_escapes_any_text(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_tokens("</script><script>")  # one token
    text = "</script><script>alert(1)</script> <b>&amp;\n\t\"'"
    given = reading_of_text(tokenizer(text)["input_ids"], [], "clm", written=False, max_tokens=64)
    file = tmp_path / "page.html"
    write_inspection(
        file,
        "<i>run</i>",
        model(padding=1),
        given,
        tokenizer,
        objective="clm",
        teacher=model(1, padding=1),
        teacher_name="<u>",
    )
    page = file.read_text()
    assert Links(page).loaded == []
    assert Links(page).scripts == 2
    assert not re.search(r"https?://|url\(|@import|fetch\(", page)
    assert "<i>run" not in page
    data = data_of(page)
    assert "".join(data["signs"]) == with_signs(text)
    assert len(data["teacher"]["kl"]) == len(data["places"]) == len(given.ids) - 1
    encoded = np.frombuffer(base64.b64decode(data["attention"]), dtype=np.uint8)
    weights = (encoded.reshape(2, 2, len(given.ids), len(given.ids)) / 255) ** 2
    found = inspect_reading(model(padding=1), given, ENTRIES + 1).attention.numpy()
    np.testing.assert_allclose(weights, found, atol=1 / 255)
    assert (weights[:, :, ~np.tri(len(given.ids), dtype=bool)] == 0).all()


@pytest.mark.skipif(PROGRAM is None, reason="needs a browser: apt install chromium")
def test_page_shows_figures_and_maps_that_follow_the_pointer(tmp_path: Path) -> None:
    tokenizer, lm, ids = copy.deepcopy(TOKENIZER), model(padding=1), TOKENIZER(SOURCE)["input_ids"][:60]
    tokenizer.add_tokens("#" * 64)  # wider than a phone screen, and near to a token of the text
    with torch.no_grad():
        lm.transformer.wte.weight[ENTRIES] = lm.transformer.wte.weight[ids[5]]
    given, file = reading_of_text(ids[:50], ids[50:], "clm", written=True, max_tokens=64), tmp_path / "page.html"
    teacher = model(1, padding=1)
    write_inspection(file, "run", lm, given, tokenizer, objective="clm", teacher=teacher, teacher_name="teacher")
    data, browser = data_of(file.read_text()), Browser(tmp_path / "browser")
    try:
        browser.open(f"file://{file}")
        browser.point("#strip .t[data-i='7']")
        shown = browser.value("document.querySelector('#card').innerText")
        for expected in (data["model"], data["teacher"]):
            assert f"{expected['losses'][6]:.3f} nats" in shown
        assert f"{data['teacher']['tvd'][6]:.3f}" in shown
        browser.point("#heat td[data-i='9']")
        assert "token 10 of 60" in browser.value("document.querySelector('#heat-card').innerText")
        browser.click(".map[value='3']")
        assert browser.value("document.querySelector('#which').innerText").startswith("Layer 2, head 2")
        browser.point("#attended .t[data-i='20']")
        weights = np.frombuffer(base64.b64decode(data["attention"]), dtype=np.uint8).reshape(4, 60, 60)[3, 20]
        most, sign = (weights.max() / 255) ** 2, data["signs"][int(weights.argmax())]
        told = browser.value("document.querySelector('#attends').innerText")
        assert f"attends: {100 * most:.{0 if most >= 0.0995 else 1}f} % to {sign}" in told
        # The map is drawn: in the row of the chosen token is more than one colour, above the diagonal none.
        pixels = """(() => { const c = document.querySelector(".map[value='3'] canvas"), size = c.width;
            const row = c.getContext("2d").getImageData(0, 20, size, 1).data;
            return [...Array(size).keys()].map((k) => [...row.slice(4 * k, 4 * k + 4)].join()); })()"""
        row = browser.value(pixels)
        assert len(set(row[:21])) > 1
        assert set(row[21:]) == {"0,0,0,0"}
        for width in (1440, 768, 390):
            for scheme in ("light", "dark"):
                browser.resize(width, scheme)
                assert faults(browser, width) == {}
    finally:
        browser.close()


@pytest.mark.parametrize("length", [1, 2])
def test_the_shortest_texts_have_a_page(length: int, tmp_path: Path) -> None:
    given = reading_of_text(TOKENIZER(SOURCE)["input_ids"][:length], [], "clm", written=False, max_tokens=64)
    write_inspection(tmp_path / "page.html", "run", model(), given, TOKENIZER, objective="clm", teacher=model(1))
    assert data_of((tmp_path / "page.html").read_text())["places"] == [1][: length - 1]


def test_tensorboard_serves_every_embedding_with_its_token(tmp_path: Path) -> None:
    weight = model(padding=5).transformer.wte.weight
    write_projector(tmp_path, weight, TOKENIZER)
    data = MultiplexerDataProvider(EventMultiplexer(), str(tmp_path))
    pages = ProjectorPlugin(TBContext(logdir=str(tmp_path), data_provider=data)).get_plugin_apps()

    def served(page: str, name: str = "") -> Any:
        return Client(pages[page]).get("/", query_string={"run": ".", "name": name})

    (embedding,) = served("/info").get_json()["embeddings"]
    assert embedding["tensorShape"] == [ENTRIES, 16]
    tensors = np.frombuffer(served("/tensor", embedding["tensorName"]).data, dtype=np.float32).reshape(ENTRIES, 16)
    np.testing.assert_allclose(tensors, weight[:ENTRIES].detach().numpy(), rtol=1e-4)
    lines = served("/metadata", embedding["tensorName"]).text.split("\n")[:-1]
    assert lines[0] == "token\tid\tkind"
    tokens = [line.split("\t") for line in lines[1:]]
    assert [token[:2] for token in tokens] == [
        [with_signs(text), str(number)] for number, text in enumerate(token_texts(TOKENIZER, range(ENTRIES)))
    ]
    assert [kind(text) for text in (" def", "x", "\n ", "42", "):", "a.b")] == [
        "word",
        "part of a word",
        "whitespace",
        "number",
        "punctuation",
        "mixed",
    ]


# generate.py


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with one tokenizer, and one with another."""
    folder = tmp_path_factory.mktemp("runs")
    others = train_bpe(iter([Path(json.__file__).read_text()]), 300)
    for name, seed, tokenizer in (("student", 0, TOKENIZER), ("teacher", 1, TOKENIZER), ("other", 2, others)):
        backbone = Backbone(ModelShape(1 + seed, 2, 16, n_positions=32, vocab_size=300))
        write_hf_folder(to_hf(backbone), tokenizer, folder / name / "hf", {"title": name})
    (folder / "student" / "config.yaml").touch()
    return folder


def generate(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["generate.py", *words, "max_new_tokens=6"])
    return exit_codes.exit_code(generate_command.main)


def test_generate_writes_the_page_to_the_printed_path(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ("prompt=def add(a):", "sampling.temperature=1")
    places = {
        f"{checkpoints}/student": checkpoints / "student" / "inspect.html",
        f"{checkpoints}/teacher": tmp_path / "inspect.html",
    }
    for checkpoint, place in places.items():
        assert generate(monkeypatch, f"checkpoint={checkpoint}", *given, "inspect=true", "json=written.json") == 0
        assert str(place) in capsys.readouterr().err
        data = data_of(place.read_text())
        written = json.loads((tmp_path / "written.json").read_text())[0]
        assert data["written"].count(1) == written["tokens"] == 6
        assert set(written) == {"prompt", "completion", "tokens", "seconds"}
    words = (f"checkpoint={checkpoints}/student", *given, "inspect=true", f"teacher={checkpoints}/teacher")
    (tmp_path / "pages").mkdir()
    assert generate(monkeypatch, *words, "inspect_file=pages") == 0
    assert data_of((tmp_path / "pages" / "inspect.html").read_text())["teacher"]["tvd"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prompt=a", "inspect=perhaps"], "is not true or false"),
        (["inspect=true"], "Give prompt="),
        (["prompt=a", "inspect=true", "num_samples=2"], "shows one text"),
        (["prompt=a", "inspect=true", "inspect_file=/nowhere/page.html"], "cannot be written"),
        (["prompt=a", "teacher=x"], "with inspect=true only"),
        (["prompt=a", "inspect=true", "teacher=/nowhere"], "no such folder"),
        (["prompt=a", "inspect=true", "teacher={}/other"], "has another tokenizer"),
    ],
)
def test_unsupported_inspection_is_refused(
    words: list[str],
    message: str,
    checkpoints: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [word.format(checkpoints) for word in words]
    assert generate(monkeypatch, f"checkpoint={checkpoints}/student", *given) == 2
    error = capsys.readouterr().err.partition("error: ")[2]
    assert message in error
    assert len(error.splitlines()) <= 5


# In training


def test_inspection_callback_changes_no_weight(tmp_path: Path) -> None:
    """Dropout is on: use of the global random state, or another mode, would change the weights."""
    folder, cache = tmp_path / "run", tmp_path / "cache"
    _, plain = tiny_run.train(tmp_path / "plain", cache, steps=10)  # validated at 8 and 10
    trainer, watched = tiny_run.train(folder, cache, steps=10, extra=[Inspect([])])
    for one, other in zip(plain.backbone.parameters(), watched.backbone.parameters(), strict=True):
        assert torch.equal(one, other)
    pages = sorted((folder / "inspect").glob("*.html"))
    assert [page.name for page in pages] == ["step-000008.html", "step-000010.html"]
    data = data_of(pages[1].read_text())
    assert len(data["places"]) == 31
    assert (folder / "inspect" / "projector" / "projector_config.pbtxt").is_file()
    assert 'href="inspect/step-000010.html"' in (folder / "report.html").read_text()
    # The page shows the averaged weights, which are also the validated ones.
    batch = trainer.datamodule.val_samples.batch(np.zeros(1, dtype=np.int64), 0)
    with torch.no_grad():
        logits = watched.export_model()(batch.input_ids).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, batch.labels[0, :-1], reduction="none")
    assert data["model"]["losses"] == pytest.approx(losses.tolist(), abs=1e-3)
    # A resume from step 8 removes the pages of later steps.
    callback, step = Inspect([]), SimpleNamespace(is_global_zero=True, global_step=8)
    callback.setup(trainer, watched, "fit")
    callback.on_train_start(step, watched)  # type: ignore[arg-type]
    assert [page.name for page in (folder / "inspect").glob("*.html")] == ["step-000008.html"]


@pytest.mark.slow
def test_distilled_run_shows_its_teacher_and_given_texts(distil: Train, tmp_path: Path) -> None:
    keys = ["callbacks=inspect", "callbacks.inspect.texts=[def add,class Stack]", "sample_every=100"]
    keys += ["callbacks.checkpoint.verify_export=false", "validate_every=4"]
    distil(*keys, "run_dir=run", without=("callbacks",))
    pages = sorted(path.name for path in (tmp_path / "run" / "inspect").glob("*.html"))
    assert pages == ["step-000004-2.html", "step-000004.html"]
    data = data_of((tmp_path / "run" / "inspect" / pages[1]).read_text())
    assert "".join(data["signs"]) == "def␣add"
    assert min(data["teacher"]["kl"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_write_the_page_of_one(strategy: str, train_process: Train, tiny: list[str], tmp_path: Path) -> None:
    losses = []
    given = [key for key in tiny if not key.startswith("callbacks")]
    for devices in (1, 2):
        keys = (
            "steps=2",
            "callbacks=inspect",
            "validate_every=2",
            "micro_batch=2",
            f"devices={devices}",
            f"run_dir=run{devices}",
        )
        keys += ("callbacks.checkpoint.verify_export=false", *([f"strategy={strategy}"] if devices == 2 else []))
        ended = train_process(*given, *keys)
        assert ended.code == 0, ended.stderr
        page = tmp_path / f"run{devices}" / "inspect" / "step-000002.html"
        losses.append(data_of(page.read_text())["model"]["losses"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
