"""A real training run of seconds, for the tests of callbacks and resume: a tiny GPT-2 with dropout on source code.

As a program: python tests/support/tiny_run.py RUN_DIR CACHE_DIR STEPS resumes the run in RUN_DIR or starts it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lightning
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import DDPStrategy

from callbacks.checkpoint import Checkpoint
from callbacks.final_validation import FinalValidation
from callbacks.interrupt import Interrupt
from callbacks.loggers.metrics_csv import MetricsCsv
from callbacks.report import Report
from callbacks.throughput import Throughput
from datamodules.language_modeling import LanguageModelingData
from gpt2lab.settings import ModelShape, OptimizerSettings, ScheduleSettings, TokenizerChoice, TrainingSettings
from gpt2lab.storage.checkpoint_ledger import newest_good_checkpoint
from lightning_modules.pretrain import Pretrain
from tests.support.sources import write_sources

ACCUMULATE = 2


def data(cache_dir: Path) -> LanguageModelingData:
    sources = cache_dir / "sources"
    write_sources(sources)
    return LanguageModelingData(
        name="text",
        source="text",
        tokenizer=TokenizerChoice("bpe", vocab_size=300),
        context=32,
        batch_sequences=4,
        accumulate=ACCUMULATE,
        seed=1,
        cache_dir=str(cache_dir),
        path=str(sources),
        val_fraction=0.3,
    )


def module(prepared: LanguageModelingData, steps: int, ema: float = 0.5) -> Pretrain:
    facts = prepared.prepare()
    return Pretrain(
        TrainingSettings(
            shape=ModelShape(2, 2, 32, n_positions=64, vocab_size=facts.vocab_size, dropout=0.1),
            tokenizer_folder=facts.tokenizer_folder,
            init="scratch",
            optimizer=OptimizerSettings("muon", lr=1e-2, weight_decay=0.1),
            schedule=ScheduleSettings("wsd", warmup_steps=2, final_fraction=0.1),
            steps=steps,
            seed=1,
            val_tokens=facts.val_tokens,
            val_bytes=facts.val_bytes,
            ema=ema,
            log_every=2,
        )
    )


def train(
    run_dir: Path,
    cache_dir: Path,
    steps: int = 12,
    extra: list[lightning.Callback] | None = None,
    loggers: list[Logger] | None = None,
    verify_export: bool = False,
    every: int = 4,
    ranks: int = 1,
) -> tuple[lightning.Trainer, Pretrain]:
    """Start or resume a run that validates every 8 steps and logs every 2."""
    run_dir.mkdir(parents=True, exist_ok=True)
    prepared = data(cache_dir)
    report = Report()
    report.facts = {"task": "pretrain", "model": "tiny"}
    model = module(prepared, steps)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=DDPStrategy(process_group_backend="gloo") if ranks > 1 else "auto",
        max_steps=steps,
        accumulate_grad_batches=ACCUMULATE,
        val_check_interval=8 * ACCUMULATE,
        check_val_every_n_epoch=None,
        log_every_n_steps=2,
        num_sanity_val_steps=0,
        logger=[MetricsCsv(str(run_dir)), *(loggers or [])],
        callbacks=[
            Throughput(str(cache_dir)),
            Interrupt(),
            FinalValidation(),
            *(extra or []),
            Checkpoint(every, verify_export=verify_export),
            report,
        ],
        default_root_dir=run_dir,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    checkpoint = newest_good_checkpoint(run_dir)
    trainer.fit(model, datamodule=prepared, ckpt_path=checkpoint, weights_only=True)
    return trainer, model


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
