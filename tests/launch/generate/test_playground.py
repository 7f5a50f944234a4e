"""The playground: tokens with their probabilities, a page for this machine alone, and robust handling of requests."""

import asyncio
import dataclasses
import itertools
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import ClientSession
from aiohttp.test_utils import TestClient, TestServer

from gpt2lab.data.tokenizer import train_bpe
from gpt2lab.errors import InputError
from gpt2lab.generation.sampling import generate_ids
from gpt2lab.generation.speculative import speculative_ids
from gpt2lab.model.backbone import Backbone, to_hf
from gpt2lab.reports.hf_folder import write_hf_folder
from gpt2lab.reports.samples_jsonl import Sample, append_samples
from gpt2lab.reports.token_probabilities import Chance, IncrementalDecoder, Rounds, chances, pieces
from gpt2lab.settings import BEAM, GREEDY, ModelShape, SamplingSettings
from launch.generate import serve
from launch.generate.generator import Arguments, TextGenerator
from launch.generate.playground import Playground
from launch.generate.playground_server import MAX_WAITING, Site
from tests.conftest import ROOT
from tests.support.chromium import PROGRAM, Browser, faults

PROMPT = "def add(a, b):\n    return"
POSITIONS = 256
CLIPBOARD = ["clipboardReadWrite", "clipboardSanitizedWrite"]
HANG = 200  # seconds until a request counts as hanging


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run directories of a model and of its draft model."""
    tokenizer = train_bpe(iter([Path(json.__file__).read_text()]), 300)
    shape = ModelShape(n_layer=2, n_head=2, n_embd=32, n_positions=POSITIONS, vocab_size=len(tokenizer))
    torch.manual_seed(0)
    backbone, found = Backbone(shape), {}
    for name, factor, noise in (("model", 6, 0.0), ("draft", 1, 0.02)):  # far from an even distribution; near the model
        with torch.no_grad():
            for parameter in backbone.parameters():
                parameter.mul_(factor).add_(noise * torch.randn_like(parameter))
            backbone.lm.transformer.ln_f.bias.fill_(1)
            backbone.lm.transformer.wte.weight[tokenizer.eos_token_id].fill_(-1)  # no text ends before max_new_tokens
        found[name] = tmp_path_factory.mktemp(name)
        write_hf_folder(to_hf(backbone), tokenizer, found[name] / "hf", {"title": name})
    return found


@pytest.fixture(scope="module")
def playground(folders: dict[str, Path]) -> Playground:
    arguments = Arguments(str(folders["model"]), draft=str(folders["draft"]), serve=True, max_new_tokens=20)
    return Playground(TextGenerator(arguments))


def request(**values: Any) -> bytes:
    return json.dumps({"prompt": PROMPT, **values}).encode()


def written(playground: Playground, **values: Any) -> dict[str, dict[str, Any]]:
    """Return the last event of each panel."""
    events: list[dict[str, Any]] = []
    playground.write(playground.read(request(**values)), events.append)
    assert events[-1] == {"finished": True}
    return {event["panel"]: event["done"] for event in events if "done" in event}


def text_of(done: dict[str, Any]) -> str:
    return "".join(piece["text"] for piece in done["pieces"])


# Tokens as text


@pytest.mark.parametrize("text", ["naïve café", "中文 🙂\n\n\tx", "plain", "🙂", ""])
def test_pieces_join_to_the_text_without_split_characters(text: str, playground: Playground) -> None:
    ids = playground.tokenizer(text)["input_ids"] if text else []
    spelling = IncrementalDecoder(playground.tokenizer)
    parts = [spelling.add(token) for token in ids]
    assert "".join(parts) + spelling.rest() == text
    found = pieces(playground.tokenizer, ids, [Chance(0.5, [(ids[0], 0.5)]) for _ in ids])
    assert "".join(piece.text for piece in found) == text
    assert all(piece.text and "\ufffd" not in piece.text for piece in found)


def test_character_of_several_tokens_is_one_piece(playground: Playground) -> None:
    ids = playground.tokenizer("a🙂b")["input_ids"]
    assert len(ids) == 6, "four of them for the smiley, which the tokenizer has never seen"
    found = pieces(playground.tokenizer, ids, [Chance(0.5, [(ids[0], 0.5)]) for _ in ids], [True] * 4 + [False, True])
    assert [(piece.text, piece.probability, piece.drafted) for piece in found] == [
        ("a", 0.5, True),
        ("🙂", 0.5**4, False),
        ("b", 0.5, True),
    ]
    cut_off = pieces(playground.tokenizer, ids[:3], [Chance(0.5, [(ids[0], 0.5)]) for _ in ids[:3]])
    assert "".join(piece.text for piece in cut_off) == playground.tokenizer.decode(ids[:3])


def test_each_token_has_its_model_probability(playground: Playground) -> None:
    ids = playground.tokenizer(PROMPT)["input_ids"]
    prompt, rest = ids[:4], ids[4:]
    found = chances(playground.generator.model, prompt, rest, vocab_size=len(playground.tokenizer))
    for number, token in enumerate(rest):
        with torch.no_grad():
            logits = playground.generator.model(torch.tensor([ids[: 4 + number]])).logits[0, -1]
        expected = logits.double().softmax(0)
        assert found[number].probability == pytest.approx(float(expected[token]), rel=1e-4)  # float32 against float64
        assert [entry for entry, _ in found[number].top_tokens] == expected.topk(5).indices.tolist()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_greedy_writes_the_argmax_for_causal_and_prefix_models(bidirectional: bool, playground: Playground) -> None:
    model, tokenizer = playground.generator.model, playground.tokenizer
    prompt, entries = tokenizer(PROMPT)["input_ids"], len(playground.tokenizer)
    (ids,) = generate_ids(
        model, [prompt], GREEDY, max_new_tokens=30, end_of_text=tokenizer.eos_token_id, bidirectional=bidirectional
    )
    agree = [
        [chance.top_tokens[0][0] for chance in chances(model, prompt, ids, vocab_size=entries, bidirectional=way)]
        == ids
        for way in (bidirectional, not bidirectional)
    ]
    assert agree == [True, False]


def test_drafted_tokens_are_those_of_the_draft_model(playground: Playground) -> None:
    assert playground.draft is not None
    model, draft, tokenizer = playground.generator.model, playground.draft, playground.tokenizer
    prompt, share = tokenizer(PROMPT)["input_ids"], list[float]()
    for assistant in (draft, model):
        rounds = Rounds(tokenizer, lambda text: None)
        ids, _ = speculative_ids(
            model,
            assistant,
            prompt,
            GREEDY,
            max_new_tokens=40,
            end_of_text=tokenizer.eos_token_id,
            vocab_size=len(tokenizer),
            streamer=rounds,
        )
        assert [token for one in rounds.rounds for token in one][: len(ids)] == ids
        proposals = chances(assistant, prompt, ids, vocab_size=len(tokenizer), top_tokens=1)
        for token, kept, proposal in zip(ids, rounds.drafted, proposals, strict=False):
            assert not kept or proposal.top_tokens[0][0] == token
        share.append(sum(rounds.drafted) / len(ids))
    assert 0.1 < share[0] < share[1], "a model agrees with itself the most"


def test_text_is_streamed_without_prompt_and_end_of_text(playground: Playground) -> None:
    streamed: list[str] = []
    rounds = Rounds(playground.tokenizer, streamed.append)
    ids = playground.tokenizer("a🙂b")["input_ids"]
    for given in (ids, ids[:2], ids[2:5], [ids[5], playground.tokenizer.eos_token_id]):
        rounds.put(torch.tensor([given]))
    rounds.end()
    assert streamed == ["a", "🙂", "b", ""]
    assert rounds.drafted == [True, False, True, True, False, True, False]


# Requests


def test_panels_write_the_text_of_the_command_line(playground: Playground) -> None:
    found = written(playground, temperature=0, max_new_tokens=24)
    model, tokenizer = playground.generator.model, playground.tokenizer
    prompt = tokenizer(PROMPT)["input_ids"]
    for name, alone in (("model", model), ("draft", playground.draft)):
        assert alone is not None
        (ids,) = generate_ids(alone, [prompt], GREEDY, max_new_tokens=24, end_of_text=tokenizer.eos_token_id)
        assert text_of(found[name]) == tokenizer.decode(ids)
    assert text_of(found["both"]) == text_of(found["model"]), "a draft changes no greedy text"
    assert all(done["tokens_per_second"] > 0 for done in found.values())
    assert found["both"]["speedup"] > 0
    assert found["both"]["calls"] + found["both"]["drafted"] == 24 > found["both"]["calls"]


def test_seed_and_settings_are_those_of_the_request(playground: Playground) -> None:
    texts = [text_of(written(playground, seed=seed)["model"]) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert text_of(written(playground, top_k=1, seed=3)["model"]) == text_of(written(playground, top_k=1)["model"])
    assert written(playground, max_new_tokens=1)["both"]["tokens"] == 1
    typical = [text_of(written(playground, typical_p=0.01, top_p=1, seed=seed)["model"]) for seed in (1, 2)]
    assert typical[0] == typical[1], "one token is left"


def test_every_sampling_key_but_beams_can_be_set(playground: Playground) -> None:
    ways = {field.name for field in dataclasses.fields(SamplingSettings)} - {"name", "beams", "length_penalty"}
    assert {one["name"] for one in playground.facts()["settings"]} == ways | {"max_new_tokens", "seed"}
    once, free = (written(playground, no_repeat_ngram=size, temperature=0, max_new_tokens=40) for size in (1, 0))
    model, tokenizer, prompt = (
        playground.generator.model,
        playground.tokenizer,
        playground.tokenizer(PROMPT)["input_ids"],
    )
    sampling = SamplingSettings("once", temperature=0, no_repeat_ngram=1)
    (ids,) = generate_ids(model, [prompt], sampling, max_new_tokens=40, end_of_text=tokenizer.eos_token_id)
    assert text_of(once["model"]) == text_of(once["both"]) == tokenizer.decode(ids) != text_of(free["model"])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"[1]", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 60_000, "not JSON"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "not JSON"),
        (request(prompt=""), "There is no prompt"),
        (request(prompt=" \n"), "There is no prompt"),
        (request(prompt=["a"]), "There is no prompt"),
        (request(prompt="\ud800"), "half a character"),
        (request(prompt="x = 1\n" * 200), "tokens; with 20 new tokens it may have 236"),
        (request(prompt="a <|mask|> b"), "fills none"),
        (request(temperature="hot"), "temperature=hot is not a number"),
        (request(temperature=-1), "must be at least 0 and at most 100"),
        (request(temperature=float("nan")), "must be at least 0 and at most 100"),
        (request(temperature=float("inf")), "must be at least 0 and at most 100"),
        (request(top_k=1.5), "not a whole number"),
        (request(top_p=0), "must be greater than 0 and at most 1"),
        (request(seed=None), "not a whole number"),
        (request(seed=True), "not a whole number"),
        (request(seed="1" * 1000), "1,000 characters"),
        (request(max_new_tokens=0), "at least 1"),
        (request(max_new_tokens=POSITIONS), "at most 255"),
        (request(tempratur=1), "did you mean temperature"),
        (request(checkpoint="gpt2"), "no setting checkpoint"),
    ],
)
def test_invalid_request_is_an_error_message(body: bytes, message: str, playground: Playground) -> None:
    with pytest.raises(InputError) as caught:
        playground.read(body)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 200


def with_objective(objective: str, folder: Path, copy: Path) -> Path:
    """A model folder with another objective in its config.json."""
    shutil.copytree(folder / "hf", copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "objective": objective}))
    return copy


def test_fim_model_fills_the_gap_of_the_prompt(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = with_objective("fim", folders["model"], tmp_path / "fim")
    filling, events = Playground(TextGenerator(Arguments(str(folder), serve=True))), list[dict[str, Any]]()
    assert filling.facts()["fills"] == "<|mask|>"
    filling.write(filling.read(request(prompt="def f():<|mask|>    return x")), events.append)
    assert events[0] == {"panel": "model", "before": "def f():", "after": "    return x"}


def test_model_that_is_not_autoregressive_is_not_served(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = with_objective("mlm", folders["model"], tmp_path / "mlm")
    with pytest.raises(InputError, match="trained with objective=mlm"):
        serve.serve(Arguments(str(folder), serve=True, port=0))


# The site


Visit = Callable[[TestClient, Site], Awaitable[None]]


def visit(playground: Playground, what: Visit) -> None:
    """Run a test against a site in this process."""

    async def run() -> None:
        site = Site(playground)
        async with TestClient(TestServer(site.app(), handler_cancellation=True)) as client:
            await asyncio.wait_for(what(client, site), HANG)
            site.stop()

    asyncio.run(run())


async def send(client: TestClient, body: bytes, **headers: str) -> tuple[int, list[dict[str, Any]]]:
    kind = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    async with client.post("/write", data=body, headers=kind) as answer:
        return answer.status, [json.loads(line) for line in (await answer.text()).splitlines()]


def test_site_continues_after_every_refused_request(playground: Playground) -> None:
    async def what(client: TestClient, site: Site) -> None:
        for body, status in ((b"{", 400), (request(seed=-1), 400), (request(prompt="x" * 70_000), 413)):
            assert (await send(client, body))[0] == status
        assert (await send(client, request(), Content_Type="text/plain"))[0] == 415
        assert (await send(client, request(), Origin="https://elsewhere.example"))[0] == 403
        assert (await send(client, request(), Host="elsewhere.example"))[0] == 403
        status, events = await send(client, request(), Origin=f"http://localhost:{client.port}")
        assert (status, events[-1]) == (200, {"finished": True})
        streamed = "".join(event.get("text", "") for event in events if event.get("panel") == "model")
        assert streamed == text_of(next(event["done"] for event in events if "done" in event)), (
            "text comes as it is written"
        )

    visit(playground, what)


def test_internal_error_ends_one_text_and_not_the_site(
    playground: Playground, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    async def what(client: TestClient, site: Site) -> None:
        hook = playground.generator.model.transformer.ln_f.register_forward_pre_hook(fail)
        _, events = await send(client, request())
        hook.remove()
        assert "terminal" in events[-1]["error"]
        assert "out of memory" not in str(events)
        assert (await send(client, request()))[1][-1] == {"finished": True}

    visit(playground, what)
    assert "RuntimeError: out of memory" in capfd.readouterr().err


def test_requests_are_queued_and_refused_above_a_limit(playground: Playground) -> None:
    async def what(client: TestClient, site: Site) -> None:
        goes_on = threading.Event()
        site._writer.submit(goes_on.wait, HANG)  # so that the writer is busy for all of them
        asking = [asyncio.create_task(send(client, request(max_new_tokens=2))) for _ in range(MAX_WAITING + 3)]
        refused = list(itertools.islice(asyncio.as_completed(asking), 2))
        assert [status for status, _ in await asyncio.gather(*refused)] == [503, 503]
        goes_on.set()
        answers = await asyncio.gather(*asking)
        assert sorted(status for status, _ in answers) == [200] * (MAX_WAITING + 1) + [503] * 2
        assert sorted(events[0].get("waiting", 0) for status, events in answers if status == 200) == [
            *range(MAX_WAITING + 1)
        ]
        assert all(events[-1] == {"finished": True} for status, events in answers if status == 200)
        assert "Try again" in next(events[0]["error"] for status, events in answers if status == 503)

    visit(playground, what)


def test_text_of_a_closed_connection_is_interrupted(playground: Playground) -> None:
    body = {"prompt": "import", "temperature": 0, "max_new_tokens": 200}

    async def what(client: TestClient, site: Site) -> None:
        calls, left = 0, threading.Event()

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1
            if calls == 20:
                assert left.wait(HANG), "the site does not detect that the connection is closed"

        hook = playground.generator.model.transformer.ln_f.register_forward_hook(count)
        async with ClientSession() as leaving:
            answer = await leaving.post(client.make_url("/write"), json=body)
            await answer.content.readline()
            while calls < 20:
                await asyncio.sleep(0.01)
        while site._active:
            await asyncio.sleep(0.01)
        left.set()
        await asyncio.wrap_future(site._writer.submit(int))  # its thread is free again
        assert calls < 25, "it ends once a token has made its text longer"
        await send(client, json.dumps(body).encode())
        hook.remove()
        assert calls > 220, "a text with an open connection is written to its end"

    visit(playground, what)


# The command


def test_page_is_served_to_this_machine_alone() -> None:
    with serve._listen(0) as listener:
        address, port = listener.getsockname()
        assert address == "127.0.0.1"
        socket.create_connection((address, port), timeout=HANG).close()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sampling": BEAM, "stop": "x"}, "Leave out stop=, sampling=beam"),
        ({"prompts": "file"}, "Leave out prompts="),
        ({"checkpoint": "/nowhere"}, "no such folder"),
        ({"draft": "/nowhere"}, "no such folder"),
        ({"max_new_tokens": 256}, "at most 255"),
        ({"port": 1}, "port=1"),
    ],
)
def test_unservable_arguments_are_refused_before_the_port_opens(
    values: dict[str, Any], message: str, folders: dict[str, Path]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1] if values.get("port") else 0
        message = message.replace("port=1", f"port={port} is in use")
        arguments = {"checkpoint": str(folders["model"]), "serve": True, "max_new_tokens": 9, **values, "port": port}
        with pytest.raises(InputError, match=message):
            serve.serve(Arguments(**arguments))


def test_missing_aiohttp_is_an_error_with_the_pip_command(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(InputError, match=r"pip install -c requirements\.txt aiohttp"):
        serve.serve(Arguments(str(folders["model"]), serve=True, port=0))


def test_page_is_not_imported_without_serve() -> None:
    program = "import sys, generate, launch.generate.serve as _\n"
    program += "print({'aiohttp', 'launch.generate.playground', 'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.fixture
def server(folders: dict[str, Path]) -> Iterator[subprocess.Popen[str]]:
    words = [f"checkpoint={folders['model']}", f"draft={folders['draft']}", "serve=true", "port=0", "max_new_tokens=40"]
    process = subprocess.Popen(
        [sys.executable, "generate.py", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # as in a terminal
    )
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    opened = Browser(tmp_path / "browser")
    yield opened
    opened.close()


@pytest.mark.slow
@pytest.mark.skipif(PROGRAM is None, reason="needs a browser: apt install chromium")
def test_browser_shows_three_texts_and_ctrl_c_ends_the_server(server: subprocess.Popen[str], browser: Browser) -> None:
    assert server.stdout is not None
    address = server.stdout.readline().split()[1]
    browser.open(address)
    browser.wait("document.querySelectorAll('.panel').length === 3")
    browser.click("#write")
    assert "There is no prompt" in browser.wait("document.querySelector('#error').innerText")
    browser.type("#temperature", "-3")
    browser.type("#prompt", PROMPT)
    browser.click("#write")
    assert "temperature=-3 is out of range" in browser.wait("document.querySelector('#error').innerText")

    browser.type("#temperature", "0")
    browser.click("#write")
    browser.wait("document.querySelector('#status').innerText.startsWith('Done')")
    assert browser.value("document.querySelector('#error').hidden")
    colours = (
        "new Set([...document.querySelectorAll('#panel-{} .token')].map((t) => getComputedStyle(t).backgroundColor))"
    )
    for name in ("model", "draft", "both"):
        shown = browser.value(f"document.querySelector('#panel-{name}').innerText")
        assert "tokens/s" in shown
        assert browser.value(f"{colours.format(name)}.size") > 1
        assert "rgba(0, 0, 0, 0)" not in browser.value(f"[...{colours.format(name)}]")
    assert "× the model alone" in shown
    assert "the same text as alone" in shown
    browser.point("#panel-model .token:nth-child(3)")
    assert "probability" in browser.wait("document.querySelector('#card').innerText")

    browser.type("#prompt", "import os")
    browser.type("#max_new_tokens", "200")
    browser.click("#write")
    browser.wait("document.querySelector('#panel-model pre').innerText.startsWith('import os')")
    browser.click("#stop")
    browser.wait("!document.querySelector('#write').disabled")
    for name in ("model", "draft", "both"):  # its progress depends on the machine
        shown = browser.value(f"document.querySelector('#panel-{name}').innerText")
        assert PROMPT.splitlines()[0] not in shown, "what an earlier prompt was answered is gone"
        assert any(words in shown for words in ("tokens/s", "stopped", "not written")), shown

    outside = f"performance.getEntriesByType('resource').filter((one) => !one.name.startsWith('{address}')).length"
    assert browser.value(outside) == 0
    assert not [event for event in browser.events if event["method"] == "Runtime.exceptionThrown"]

    server.send_signal(signal.SIGINT)
    _, stderr = server.communicate(timeout=30)
    assert (server.returncode, stderr.strip()) == (130, "The playground has ended.")


def test_examples_are_the_prompts_of_the_run_without_template(folders: dict[str, Path], tmp_path: Path) -> None:
    run_dir, prompt = tmp_path / "run", "def add(a, b):\n    return a + b"
    shutil.copytree(folders["model"], run_dir)
    model = Playground(TextGenerator(Arguments(str(run_dir), serve=True)))
    assert {"text": "def add(a, b):\n    return", "templated": False} in model.facts()["examples"]
    append_samples(run_dir, [Sample(step, f"Code:\n{prompt}\nSummary:", "Add.", "greedy") for step in (1, 2)])
    config = json.loads((run_dir / "hf" / "config.json").read_text())
    template = {"prompt": "Code:\n{source}\nSummary:", "response": " {target}"}
    (run_dir / "hf" / "config.json").write_text(json.dumps({**config, "pair_template": template}))
    tuned = Playground(TextGenerator(Arguments(str(run_dir), serve=True)))
    assert tuned.facts()["examples"] == [{"text": prompt, "templated": True}]


@pytest.mark.slow
@pytest.mark.skipif(PROGRAM is None, reason="needs a browser: apt install chromium")
def test_playground_fits_every_width_and_folds_its_settings(server: subprocess.Popen[str], browser: Browser) -> None:
    assert server.stdout is not None
    address = server.stdout.readline().split()[1]
    origin = address.rstrip("/")
    browser.call("Browser.grantPermissions", {"origin": origin, "permissions": CLIPBOARD})
    for width in (390, 768, 1440):
        browser.resize(width)
        browser.events.clear()
        browser.open(address)
        browser.wait("document.querySelectorAll('.panel').length === 3")
        assert browser.value("document.querySelector('#temperature').checkVisibility()") == (width > 600)
        if width < 600:
            assert "temperature 0.8" in browser.value("document.querySelector('#controls-summary').innerText")
            browser.click("#controls-summary")
            assert browser.value("document.querySelector('#temperature').checkVisibility()")
        assert faults(browser, width) == {}
        browser.click("#examples button")
        browser.type("#max_new_tokens", "12")
        browser.click("#write")
        browser.wait("document.querySelector('#status').innerText.startsWith('Done')")
        assert faults(browser, width) == {}
        browser.click("#panel-model .copy")
        browser.wait("document.querySelector('#panel-model .copy').innerText === 'Copied'")
        text = "[...document.querySelectorAll('#panel-model pre > span')].map((one) => one.textContent).join('')"
        assert browser.value("navigator.clipboard.readText()") == browser.value(text)
