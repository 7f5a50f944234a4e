"""evaluate.py: the reported loss is the plain cross-entropy of the checkpoint on that text."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from gpt2lab.data.batch import IGNORE_INDEX, Batch
from gpt2lab.data.token_bytes import bytes_of_tokens
from gpt2lab.data.tokenizer import load_tokenizer, train_bpe
from gpt2lab.evaluation.evaluation import score
from gpt2lab.model.backbone import Backbone, load_backbone, to_hf
from gpt2lab.reports.hf_folder import write_hf_folder
from gpt2lab.settings import ModelShape
from tests.conftest import ROOT, Command

TEXT = Path(json.__file__).read_text()
CONTEXT = 32


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model in `hf`, like a run directory."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = train_bpe(iter([TEXT]), 300)
    torch.manual_seed(0)
    shape = ModelShape(n_layer=1, n_head=2, n_embd=16, n_positions=CONTEXT, vocab_size=len(tokenizer))
    write_hf_folder(to_hf(Backbone(shape)), tokenizer, folder / "hf", {"title": "tiny"})
    return folder


def evaluate(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "evaluate.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )


def dense_losses(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Map ids (n,) in windows of CONTEXT, stride CONTEXT, to nats of every token but the first, from whole logits."""
    backbone = load_backbone(str(folder)).eval()
    losses = []
    with torch.no_grad():
        for start in range(0, len(ids) - 1, CONTEXT):
            inputs, labels = ids[start : start + CONTEXT], ids[start + 1 : start + CONTEXT + 1]
            logits = backbone.logits(inputs[None, : len(labels)])[0]  # (T, V)
            losses.append(functional.cross_entropy(logits, labels, reduction="none"))
    return torch.cat(losses)


def test_token_bytes_add_up_to_the_text(run: Path) -> None:
    tokenizer = load_tokenizer(str(run))
    sizes = bytes_of_tokens(tokenizer)
    for text in (TEXT[:500], "naïve 中文 → ½\n\t"):
        assert sizes[tokenizer(text)["input_ids"]].sum() == len(text.encode())
    assert sizes[tokenizer.eos_token_id] == 0


def test_only_targets_count(run: Path) -> None:
    ids = torch.randint(1, 300, (3, CONTEXT))
    labels = torch.randint(1, 300, (3, CONTEXT))
    labels[:, 5:] = IGNORE_INDEX
    backbone = load_backbone(str(run))
    batch = Batch(ids, labels, 15, torch.arange(3))
    result = score(backbone, [batch, batch], torch.ones(300, dtype=torch.int64), device=torch.device("cpu"))
    with torch.no_grad():
        expected = functional.cross_entropy(backbone.logits(ids)[:, :5].flatten(0, 1), labels[:, :5].flatten())
    assert result.tokens == 30
    assert result.loss == pytest.approx(expected.item(), abs=1e-5)
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2))


def test_the_loss_of_a_text_is_its_plain_cross_entropy(run: Path, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(TEXT)
    (tmp_path / "val.txt").write_text(TEXT[1000:4000])
    words = [f"checkpoint={run}", "data=text", f"path={tmp_path / 'train.txt'}", f"val_path={tmp_path / 'val.txt'}"]
    done = evaluate(*words, f"cache_dir={tmp_path / 'cache'}", f"json={tmp_path / 'scores.json'}")
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    tokenizer = load_tokenizer(str(run))
    ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(TEXT[1000:4000])["input_ids"]])
    losses = dense_losses(run, ids)
    assert scores["tokens"] == len(losses)
    assert scores["loss"] == pytest.approx(losses.mean().item(), abs=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    assert scores["bits_per_byte"] == pytest.approx(losses.sum().item() / math.log(2) / 3000, rel=1e-5)
    assert f"{scores['tokens']:,}" in done.stdout
    assert f"Data: data=text path={tmp_path / 'train.txt'} context=" in done.stdout


def test_text_column_names_the_scored_column(run: Path, tmp_path: Path, evaluate_here: Command) -> None:
    for name, text in (("train", TEXT), ("val", TEXT[1000:4000])):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": "other", "body": text}))
    words = [f"checkpoint={run}", "data=text", f"path={tmp_path / 'train.jsonl'}", "text_column=body"]
    words += [f"val_path={tmp_path / 'val.jsonl'}", f"cache_dir={tmp_path / 'cache'}", f"json={tmp_path / 's.json'}"]
    done = evaluate_here(*words)
    assert done.code == 0, done.stderr
    assert json.loads((tmp_path / "s.json").read_text())["tokens"] > 300


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=stdlb"], "did you mean stdlib"),
        (["data=text", "path=/nowhere/at/all"], "/nowhere/at/all"),
        (["context=4096"], "a context of 2 to 32 tokens"),
        (["context=1"], "a context of 2 to 32 tokens"),
        (["data=../task/pretrain"], "Allowed: "),
        (["data=stdlib", "path=README.md"], "data=stdlib does not read path"),
        (["data=stdlib", "text_column=body"], "text_column=body: data=stdlib has no such key"),
        (["source=question"], "does not read source"),
        (["json=/proc/scores.json"], "json=/proc/scores.json"),
        (["contxt=16"], "did you mean context"),
        (["split=train"], "Allowed: val, all"),
        (["stride=33"], "stride=33 leaves out tokens"),
        (["metrics=rouge"], "metrics=rouge"),
        (["csv=/proc/scores.csv"], "csv=/proc/scores.csv"),
        (["lm_eval_limit=3"], "need lm_eval="),
        (["lm_eval=arc_easy", "lm_eval_path=/nowhere/at/all"], "lm_eval_path=/nowhere/at/all: there is no such folder"),
        (["lm_eval_path=."], "need lm_eval="),
        (["plot=scores.png"], "ends in .html"),
    ],
)
def test_user_error_has_exit_code_2_and_few_lines(
    words: list[str], message: str, run: Path, evaluate_here: Command
) -> None:
    done = evaluate_here(f"checkpoint={run}", *words)
    assert done.code == 2, done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 5


@pytest.mark.slow
def test_run_directory_scores_its_reported_loss_on_its_data(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 4)
    run_dir = tmp_path / "run"
    words = ["steps=3", "model.n_layer=1", "context=64", "batch_tokens=256", "data=text", "precision=fp32"]
    words += [f"path={tmp_path / 'text.txt'}", f"val_path={json.decoder.__file__}", "vocab_size=300", "logger=none"]
    words += [f"run_dir={run_dir}", f"cache_dir={tmp_path / 'cache'}"]
    subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, check=True, timeout=250)
    done = evaluate(f"checkpoint={run_dir}", f"json={tmp_path / 'scores.json'}")
    assert done.returncode == 0, done.stderr
    scores, report = (json.loads(path.read_text()) for path in (tmp_path / "scores.json", run_dir / "report.json"))
    assert scores["loss"] == pytest.approx(report["val_loss"], abs=1e-4)
    assert scores["bits_per_byte"] == pytest.approx(report["bits_per_byte"], rel=1e-3)
