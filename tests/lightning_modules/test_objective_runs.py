"""Objectives through train.py: each learns, exports plain GPT-2, and generates or fills in as in training."""

import functools
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import evaluate
import generate
import train
from datamodules.micro_batches import TrainingStream
from gpt2lab.data.batch import IGNORE_INDEX, Batch
from gpt2lab.data.objectives import Objective
from gpt2lab.data.special_tokens import find_special_tokens
from gpt2lab.data.token_file import TokenFile, token_dtype
from gpt2lab.data.tokenizer import load_tokenizer, train_bpe
from gpt2lab.data.windows import Windows
from gpt2lab.errors import InputError
from gpt2lab.generation.completion import complete, fill_masks, prompt_ids
from gpt2lab.losses.sampled_softmax import NegativeSampler, log_uniform, unigram
from gpt2lab.model.attention_masks import document_bounds, make_spans, spans_to_mask
from gpt2lab.model.backbone import Backbone, load_backbone, to_hf
from gpt2lab.settings import GREEDY, ModelShape, ObjectiveSettings
from gpt2lab.storage.metrics_csv import read_metrics
from gpt2lab.storage.model_folder import read_objective
from gpt2lab.storage.report_json import read_report
from launch import exit_codes
from tests.conftest import ROOT, SHRUNK, Train, environment

LEARNING = ("steps=24", "validate_every=12", "optimizer=adamw", "optimizer.lr=1e-2", "schedule.warmup_steps=2")
LEARNING += ("log_every=6", "seed=1")
KEYS = {
    "clm": (),
    "prefix_lm": (),
    "mlm": ("objective.mask_share=0.3",),
    "fim": (),
    "sampled_softmax": ("objective.negatives=100",),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KEYS)
def test_each_objective_learns_more_than_token_frequencies(
    name: str, train_here: Train, tiny: list[str], tmp_path: Path
) -> None:
    """0.1 nats below the entropy of the validation text's own frequencies, the least that these alone can reach.

    The special tokens of fim, which are targets too, only add to it.
    """
    keys = [key for key in tiny if not key.startswith(("batch_tokens", "model.n_embd"))]
    steps = {"mlm": 300, "sampled_softmax": 150}.get(name, 60)
    keys += ["batch_tokens=512", "model.n_embd=64", "schedule.warmup_steps=20", "seed=1"]
    keys += [f"steps={steps}", "compile=false", f"validate_every={steps}", f"cache_dir={tmp_path / 'cache'}"]
    ended = train_here(*keys, f"objective={name}", *KEYS[name], "run_dir=run")
    assert ended.code == 0, ended.stderr
    losses = [float(row["val/loss"]) for row in read_metrics(tmp_path / "run") if row.get("val/loss")]
    (file,) = (tmp_path / "cache").glob("tokens/text-*/val.bin")
    counts = np.bincount(np.fromfile(file, token_dtype(300)))
    shares = counts[counts > 0] / counts.sum()
    entropy = -float((shares * np.log(shares)).sum())
    assert losses[-1] < entropy - 0.1


Trained = Callable[[str], Path]


@pytest.fixture(scope="module")
def trained(cache: Path, sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Return the finished run with an objective, which is trained once; tests read it and write elsewhere."""
    folder = tmp_path_factory.mktemp("trained")

    @functools.cache
    def run(name: str) -> Path:
        keys = [*SHRUNK, f"path={sources}", "steps=2", f"objective={name}", *KEYS[name], f"run_dir={name}"]
        with pytest.MonkeyPatch.context() as patch:
            for key, value in environment(cache).items():
                patch.setenv(key, value)
            patch.chdir(folder)
            patch.setattr(sys, "argv", [str(ROOT / "train.py"), *keys])
            assert exit_codes.exit_code(train.command_line) == 0
        return folder / name

    return run


@pytest.mark.parametrize("name", KEYS)
def test_each_objective_exports_plain_gpt2(name: str, trained: Trained) -> None:
    run = trained(name)
    report = json.loads((run / "report.json").read_text())
    assert bool(report["bits_per_byte"]) == (name in ("clm", "sampled_softmax"))
    folder = run / "hf"
    assert read_objective(folder) == name
    # The export's logits equal the backbone's, given the mask of the objective in the format of transformers.
    ids = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    bounds = document_bounds(torch.zeros_like(ids, dtype=torch.bool))
    spans = {"mlm": make_spans(*bounds, 20), "prefix_lm": make_spans(*bounds, 9)}.get(name)
    mask = None if spans is None else spans_to_mask(spans)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder)(ids, attention_mask=mask, use_cache=False).logits
        ours = load_backbone(str(run)).eval().logits(ids, spans)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@torch.no_grad()
def mean_loss(model: Backbone, batch: Batch, drawn: tuple[torch.Tensor, torch.Tensor] | None = None) -> float:
    """Compute the loss from all logits; `drawn` are a step's sampled tokens and their log expected counts."""
    rows, labels = model.logits(batch.input_ids, batch.spans).flatten(0, 1), batch.labels.flatten()
    if drawn is None:
        return float(F.cross_entropy(rows, labels, ignore_index=IGNORE_INDEX))
    entries, log_expected = drawn
    rows = torch.cat([rows.gather(1, labels.clamp_min(0)[:, None]), rows[:, entries] - log_expected[entries]], 1)
    rows[:, 1:][labels[:, None] == entries] = -torch.inf
    return float(F.cross_entropy(rows, torch.where(labels == IGNORE_INDEX, labels, 0), ignore_index=IGNORE_INDEX))


@pytest.fixture(scope="module")
def start(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model to start from, with weights so large that every attended token changes the logits."""
    folder = tmp_path_factory.mktemp("start")
    tokenizer = train_bpe((file.read_text() for file in sorted(sources.iterdir())), 300)
    torch.manual_seed(0)
    backbone = Backbone(ModelShape(2, 2, 32, 64, 300))
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.mul_(8)
    to_hf(backbone).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def started(start: Path, tiny: list[str], sources: Path, tmp_path: Path) -> list[str]:
    """Overrides of one step from there, so small that a validation has the same weights, on short documents."""
    text = "".join(file.read_text() for file in sorted(sources.iterdir()))
    documents = [json.dumps({"text": text[place : place + 50]}) for place in range(0, 30_000, 50)]
    (tmp_path / "short.jsonl").write_text("\n".join(documents))
    keys = [key for key in tiny if not key.startswith(("model", "vocab_size", "path"))]
    keys += [f"path={tmp_path / 'short.jsonl'}", f"init={start}", "model=auto", "steps=1", "validate_every=1", "seed=1"]
    return [*keys, "optimizer=adamw", "optimizer.lr=1e-8", f"cache_dir={tmp_path / 'cache'}"]


@pytest.mark.parametrize(
    ("name", "distribution"), [*((name, "log_uniform") for name in KEYS), ("sampled_softmax", "unigram")]
)
def test_run_trains_and_validates_on_its_objective(
    name: str, distribution: str, train_here: Train, start: Path, started: list[str], tmp_path: Path
) -> None:
    """The losses of a step and of a validation with separate documents are recomputed from the files."""
    drawing = (f"objective.distribution={distribution}",) if name == "sampled_softmax" else ()
    ended = train_here(*started, f"objective={name}", *KEYS[name], *drawing, "packing=true", "run_dir=run")
    assert ended.code == 0, ended.stderr
    marks, settings = find_special_tokens(load_tokenizer(str(start))), ObjectiveSettings(name, mask_share=0.3)
    (folder,) = (file.parent for file in (tmp_path / "cache").glob("tokens/text-*/val.bin"))

    def windows(side: str, seed: int) -> Windows:
        file = TokenFile(folder / f"{side}.bin", token_dtype(300), 32, keep_short=side == "val")
        return Windows(file, Objective(settings, marks, end_of_text=marks.end_of_text, seed=seed))

    model, train, val = load_backbone(str(start)).eval(), windows("train", 1), windows("val", 0)
    validated, first = (
        val.batch(np.arange(len(val)), 0),
        TrainingStream(train, 8, 1, 1, rank=0, world=1, first_step=0)[0],
    )
    drawn = None
    if name == "sampled_softmax":
        counts = torch.from_numpy(np.bincount(train.file.tokens, minlength=300))
        sampler = NegativeSampler(log_uniform(300) if distribution == "log_uniform" else unigram(counts), 100, seed=1)
        drawn = sampler.sample(0), sampler.log_expected
    for key, batch, entries in (("train/loss", first, drawn), ("val/loss", validated, None)):
        (logged,) = (float(row[key]) for row in read_metrics(tmp_path / "run") if row.get(key))
        assert logged == pytest.approx(mean_loss(model, batch, entries), abs=1e-4)
        assert batch.spans is not None
        leaking = replace(batch, spans=torch.cat([0 * batch.spans[..., :1], batch.spans[..., 1:]], 2))
        assert abs(logged - mean_loss(model, leaking, entries)) > 1e-3


def test_evaluate_reads_documents_as_each_checkpoint_was_trained(
    train_here: Train, started: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for packing in ("false", "true"):
        assert train_here(*started, f"packing={packing}", f"run_dir={packing}").code == 0
    monkeypatch.setattr("sys.argv", ["evaluate.py", "checkpoint=false,true", "precision=fp32", "json=scores.json"])
    evaluate.main()
    whole, apart = (scores["loss"] for scores in json.loads((tmp_path / "scores.json").read_text()))
    assert [whole, apart] == pytest.approx(
        [read_report(tmp_path / run)["val_loss"] for run in ("false", "true")], abs=1e-4
    )
    assert abs(whole - apart) > 1e-3


@pytest.mark.parametrize("name", ["clm", "prefix_lm", pytest.param("sampled_softmax", marks=pytest.mark.slow)])
def test_packed_pairs_have_the_loss_of_separate_ones(
    name: str, train_here: Train, started: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses are those of a step and of a validation with the same weights; the step has fewer rows."""
    lines = [f"{'x' * (1 + number % 5)} = {number}\t{number * number}" for number in range(60)]
    (tmp_path / "pairs.tsv").write_text("source\ttarget\n" + "\n".join(lines) + "\n")
    keys = [key for key in started if not key.startswith(("data", "path", "batch_tokens"))]
    keys += ["task=finetune", "data=pairs", f"path={tmp_path / 'pairs.tsv'}", "task.text.max_new_tokens=4"]
    keys += ["batch_sequences=8", "micro_batch=8"]
    rows, losses, forward = [], [], Backbone.forward

    def counted(backbone: Backbone, ids: torch.Tensor, *given: object) -> object:
        if backbone.training:
            rows.append(len(ids))
        return forward(backbone, ids, *given)

    monkeypatch.setattr(Backbone, "forward", counted)
    drawing = ("objective.negatives=100", "objective.distribution=unigram") if name == "sampled_softmax" else ()
    runs = {"apart": (), "packed": ("packing=true",)}
    for run, packing in runs.items():
        ended = train_here(*keys, *drawing, f"objective={name}", *packing, f"run_dir={run}")
        assert ended.code == 0, ended.stderr
        found = read_metrics(tmp_path / run)
        losses.append([float(row[key]) for row in found for key in ("train/loss", "val/loss") if row.get(key)])
    assert rows[0] == 8 > rows[1]
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize("name", ["mlm", "prefix_lm"])
def test_teacher_has_the_attention_mask_of_its_student(
    name: str, train_here: Train, start: Path, started: list[str], tmp_path: Path
) -> None:
    """A copy of the teacher has zero divergence, for causal and bidirectional attention."""
    keys = ("task=distill", f"teacher={start}", "preflight=off", "loss.hard_weight=0", "packing=true")
    ended = train_here(*started, *keys, f"objective={name}", "run_dir=run")
    assert ended.code == 0, ended.stderr
    found = read_metrics(tmp_path / "run")
    for key in ("train/objective", "distill/kl"):
        (value,) = (float(row[key]) for row in found if row.get(key))
        assert abs(value) < 1e-4


@pytest.mark.parametrize("name", KEYS)
def test_the_example_of_the_model_card_runs(name: str, trained: Trained, capfd: pytest.CaptureFixture[str]) -> None:
    folder = trained(name) / "hf"
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("path/to/this/folder", str(folder))
    capfd.readouterr()
    exec(compile(code, "card", "exec"), {})
    assert capfd.readouterr().out.strip()


@pytest.mark.slow
def test_an_objective_can_follow_another(train_here: Train, tiny: list[str], tmp_path: Path) -> None:
    """A learning rate of almost zero keeps the weights of the first."""
    sizeless = [key for key in tiny if not key.startswith(("model", "vocab_size"))]
    assert train_here(*tiny, *LEARNING, "objective=mlm", "run_dir=first").code == 0
    for before, name in (("first", "clm"), ("clm", "fim"), ("fim", "prefix_lm")):
        keys = ("model=auto", f"init={before}", f"objective={name}", "steps=2", f"run_dir={name}")
        keys += ("optimizer=adamw", "optimizer.lr=1e-6")
        ended = train_here(*sizeless, *keys)
        assert ended.code == 0, ended.stderr
        assert read_objective(tmp_path / name / "hf") == name
    first = load_file(tmp_path / "first" / "hf" / "model.safetensors")
    last = load_file(tmp_path / "prefix_lm" / "hf" / "model.safetensors")
    assert first.keys() == last.keys()
    assert all(torch.allclose(tensor, last[name], rtol=0, atol=1e-4) for name, tensor in first.items())
    assert not all(torch.equal(tensor, last[name]) for name, tensor in first.items())


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["mlm", *(pytest.param(name, marks=SLOW) for name in ("prefix_lm", "fim", "sampled_softmax"))]
)
def test_resumed_objective_samples_like_an_unbroken_run(
    name: str, train_here: Train, tiny: list[str], tmp_path: Path
) -> None:
    """The resume crosses the end of an epoch."""
    keys = (
        "steps=60",
        "compile=false",
        "micro_batch=4",
        "checkpoint_every=30",
        "validate_every=30",
        "seed=1",
        "log_every=1",
        f"objective={name}",
    )
    assert train_here(*tiny, *keys, *KEYS[name], "run_dir=unbroken").code == 0
    shutil.copytree(tmp_path / "unbroken", tmp_path / "stopped")
    (tmp_path / "stopped" / "checkpoints" / "step-000060.ckpt").unlink()
    shutil.rmtree(tmp_path / "stopped" / "hf")
    assert train_here("resume=stopped").code == 0
    weights = [load_file(tmp_path / run / "hf" / "model.safetensors") for run in ("unbroken", "stopped")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("objective=mlm data=pairs path={pairs}", "objective=mlm is for running text"),
        ("objective=clm objective.mask_share=0.2", "objective=clm does not read objective.mask_share"),
        ("objective=mlm objective.mask_share=0", "objective.mask_share=0.0 is out of range"),
        ("objective=sampled_softmax objective.negatives=300", "objective.negatives=300: the vocabulary size is only"),
        ("objective=sampled_softmax label_smoothing=0.1", "label_smoothing needs the full softmax"),
        ("task=distill teacher=x objective=sampled_softmax", "distillation compares whole distributions"),
        ("task=distill teacher=x objective=fim teacher_cache=topk", "Give teacher_cache=none, or objective=clm"),
        ("task=distill teacher=x objective=prefix_lm sequences=gkd", "sequences=gkd generates with objective=clm only"),
        ("task=distill teacher=x packing=true loss=uld", "does not support packing=true"),
        ("objective=mlmm", "Allowed: clm, fim, mlm, prefix_lm, sampled_softmax"),
    ],
)
def test_incompatible_objective_settings_are_refused(
    keys: str, message: str, train_here: Train, tiny: list[str], tmp_path: Path
) -> None:
    (tmp_path / "pairs.tsv").write_text("source\ttarget\n" + "a\tb\n" * 9)
    words = keys.format(pairs=tmp_path / "pairs.tsv").split()
    given = {word.split("=")[0] for word in words}
    without = {"path", "data", "batch_tokens", "val_fraction"} if "data" in given else set()
    ended = train_here(*(key for key in tiny if key.split("=")[0] not in given | without), *words)
    assert ended.code == 2, ended.stdout
    assert message in ended.stderr
    assert len(ended.stderr.strip().splitlines()) <= 5


# Prompts


@pytest.fixture
def model() -> Backbone:
    """Weights that are random but large."""
    torch.manual_seed(1)
    backbone = Backbone(ModelShape(2, 2, 32, 64, 300)).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.mul_(4)
    return backbone


@torch.no_grad()
def test_bidirectional_prompt_is_continued_as_in_training(model: Backbone, start: Path) -> None:
    """Prompts of different lengths in a batch, each by its full mask; a causal model generates other text."""
    tokenizer = load_tokenizer(str(start))
    prompts = [prompt_ids(text, tokenizer, "prefix_lm") for text in ("def f(a):", "x", "class Stack:\n    pass")]
    together = complete(model.lm, tokenizer, "prefix_lm", prompts, GREEDY, max_new_tokens=8)
    for prompt, written in zip(prompts, together, strict=True):
        ids = list(prompt)
        for token in written:
            row = torch.tensor([ids])
            bounds = document_bounds(torch.zeros_like(row, dtype=torch.bool))
            assert int(model.logits(row, make_spans(*bounds, len(prompt) - 1))[0, -1].argmax()) == token
            ids.append(token)
    assert together != complete(model.lm, tokenizer, "clm", prompts, GREEDY, max_new_tokens=8)


@torch.no_grad()
def test_gaps_are_filled_most_confident_first(model: Backbone, start: Path) -> None:
    tokenizer = load_tokenizer(str(start))
    marks, prompt = find_special_tokens(tokenizer), prompt_ids("def <|mask|>(a, <|mask|>):", tokenizer, "mlm")
    places = [place for place, token in enumerate(prompt) if token == marks.mask]
    assert len(places) == 2
    text = fill_masks(model.lm, prompt, marks)
    assert [token for place, token in enumerate(text) if place not in places] == [t for t in prompt if t != marks.mask]
    row = torch.tensor([prompt])
    spans = make_spans(*document_bounds(torch.zeros_like(row, dtype=torch.bool)), row.shape[1])
    logits = model.logits(row, spans)[0, places]
    logits[:, marks.mask] = -torch.inf
    surest = int(np.argmax([float(line.softmax(0).max()) for line in logits]))
    assert text[places[surest]] == int(logits[surest].argmax())


def test_gaps_need_a_model_that_fills_them(start: Path) -> None:
    tokenizer = load_tokenizer(str(start))
    for objective, prompt, message in (
        ("clm", "a <|mask|>", "fills none"),
        ("fim", "a <|mask|> b <|mask|>", "fills one at a time"),
        ("mlm", "no gap", "the prompt has none"),
    ):
        with pytest.raises(InputError, match=message):
            prompt_ids(prompt, tokenizer, objective)


@pytest.mark.parametrize("name", ["mlm", "fim", "prefix_lm"])
def test_generate_shows_the_whole_text(
    name: str,
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    prompt = "def f(a):" if name == "prefix_lm" else "def f(<|mask|>):\n    pass"
    most = [] if name == "mlm" else ["max_new_tokens=4"]  # gaps need no extra positions
    words = [f"checkpoint={trained(name)}", f"prompt={prompt}", *most, f"json={tmp_path / 'out.json'}"]
    monkeypatch.setattr("sys.argv", ["generate.py", *words])  # no terminal: nothing is streamed
    capfd.readouterr()
    generate.main()
    shown, (written,) = capfd.readouterr().out.rstrip("\n"), json.loads((tmp_path / "out.json").read_text())
    assert shown.startswith("def f(")
    assert written["prompt"] == prompt
    assert written["tokens"] <= (1 if name == "mlm" else 4)
    assert shown.endswith("):\n    pass" if name != "prefix_lm" else written["completion"].rstrip("\n"))
