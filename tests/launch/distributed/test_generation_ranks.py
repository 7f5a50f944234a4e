"""Text generated during training: the same on one device and on two ranks, each of which generates its share."""

import json
from pathlib import Path

import pytest

from gpt2lab.reports.samples_jsonl import read_samples
from tests.conftest import Train

RECORD = """
import json, os
from pathlib import Path
import lightning
from lightning_modules import backbone_module

class Record(lightning.Callback):
    def __init__(self, folder):
        original, self.calls = backbone_module.complete, []

        def complete(model, tokenizer, objective, prompts, *rest, **more):
            self.calls.append([len(prompts), str(model.dtype), str(model.device)])
            return original(model, tokenizer, objective, prompts, *rest, **more)

        backbone_module.complete, self.folder = complete, Path(folder)

    def on_train_end(self, trainer, pl_module):
        (self.folder / f"rank-{trainer.global_rank}.json").write_text(json.dumps(self.calls))
"""
PROMPTS = "callbacks.samples.prompts=['def ','import os','class A','return','x = 1']"
FILLED = "callbacks.samples.prompts=['def <|mask|>(a)','import <|mask|>','<|mask|> A','return <|mask|>','x = <|mask|>']"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "keys"),
    [
        ("ddp", (PROMPTS,)),
        ("fsdp", (PROMPTS,)),
        ("fsdp", (PROMPTS, "sampling=beam", "sampling.beams=2", "ema=0.5")),
        ("fsdp", (FILLED, "objective=mlm")),
        ("fsdp", (PROMPTS, "precision=bf16")),
    ],
    ids=["ddp", "fsdp", "fsdp, beams, ema", "fsdp, mlm", "fsdp, bf16"],
)
def test_two_ranks_share_the_text_that_one_generates(
    strategy: str,
    keys: tuple[str, ...],
    train_process: Train,
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "record.py").write_text(RECORD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    is_bf16 = "precision=bf16" in keys
    run = [key for key in tiny if not key.startswith("callbacks") and not (is_bf16 and key.startswith("precision"))]
    run += ["callbacks.checkpoint.verify_export=false", "callbacks.samples.max_new_tokens=12", "steps=4", *keys]
    run += ["sample_every=2", "optimizer=adamw", "+callbacks.record._target_=record.Record"]
    run += [f"+callbacks.record.folder={tmp_path}", "micro_batch=2", "compile=false"]
    texts = {}
    for ranks in (1, 2):
        more = ["devices=2", f"strategy={strategy}"] if ranks == 2 else ["devices=1"]
        answer = train_process(*run, *more, f"run_dir=run{ranks}")
        assert answer.code == 0, answer.stderr
        texts[ranks] = [(s.step, s.method, s.prompt, s.completion) for s in read_samples(tmp_path / f"run{ranks}")]
    calls = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    dtype = "torch.bfloat16" if is_bf16 else "torch.float32"
    for share, of_rank in zip((3, 2), calls, strict=True):
        assert of_rank == [[share, dtype, "cpu"]] * (len(texts[2]) // 5)
    if not is_bf16:
        assert texts[1] == texts[2]
