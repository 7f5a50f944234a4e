"""On-policy distillation step of TRL's trainers, for comparison; run it in an environment with TRL.

    /path/to/trl-environment/bin/python -m benchmarks.trl_on_policy --loop distillation --tokenizer DIR --teacher DIR …

    gkd            GKDTrainer with λ = 1
    distillation   DistillationTrainer

Both sample at temperature 1 and keep the activations. Every prompt consists of letters, one token each. Prints one
JSON object: {"milliseconds", "generated", "trl"}; `generated` is the mean number of generated tokens in a step. The
student is a GPT-2 with random weights.
"""

import argparse
import statistics
import string
import tempfile
from typing import Any

import torch
import trl
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.distillation_trainer import DistillationTrainer

from benchmarks.trl_step import IGNORE_INDEX, StepClock, build_models, option_parser, print_measured


def dataset(tokenizer: PreTrainedTokenizerBase, prompt: int, new: int, sequences: int) -> Dataset:
    """Build a data set of prompts: text for DistillationTrainer, token ids with an unused completion for GKDTrainer."""
    picks = torch.randint(len(string.ascii_letters), (sequences, prompt), generator=torch.Generator().manual_seed(0))
    texts = ["".join(string.ascii_letters[pick] for pick in row) for row in picks.tolist()]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    if any(len(row) != prompt for row in ids):
        raise ValueError("A letter is not one token of this tokenizer.")
    masks = [[0] * prompt + [1] * new] * sequences
    return Dataset.from_dict(
        {"prompt": texts, "input_ids": [row + row[:1] * new for row in ids], "completion_mask": masks}
    )


def settings(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Return settings of both trainers: no evaluation, saving, logging and activation checkpointing."""
    return {
        "output_dir": folder,
        "beta": options.beta,
        "temperature": 1.0,
        "disable_dropout": True,
        "per_device_train_batch_size": options.batch,
        "max_steps": options.steps,
        "optim": "adamw_torch_fused",
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": options.precision == "bf16",
        "fp16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


class CountedGKD(GKDTrainer):
    """GKDTrainer that counts the generated tokens of every step."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        self.generated.append(int((inputs["labels"] != IGNORE_INDEX).sum()))
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class CountedDistillation(DistillationTrainer):
    """DistillationTrainer that counts the generated tokens of every step."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        self.generated.append(int(inputs["completion_mask"].sum()))
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def build_trainer(
    options: argparse.Namespace, folder: str, tokenizer: PreTrainedTokenizerBase
) -> CountedGKD | CountedDistillation:
    """Build the trainer of a loop."""
    student, teacher = build_models(options, tokenizer)
    student.config.use_cache = student.generation_config.use_cache = True
    given = settings(options, folder)
    prompts = dataset(tokenizer, options.prompt, options.new, options.batch * options.steps)
    parts: dict[str, Any] = {"train_dataset": prompts, "processing_class": tokenizer}
    cache = None if options.cache == "dynamic" else options.cache
    trainer: CountedGKD | CountedDistillation
    if options.loop == "gkd":
        config = GKDConfig(
            lmbda=1.0, seq_kd=False, max_new_tokens=options.new, max_length=options.prompt + options.new, **given
        )
        trainer = CountedGKD(model=student, teacher_model=teacher, args=config, **parts)
        trainer.generation_config.cache_implementation = cache
    else:
        args = DistillationConfig(max_completion_length=options.new, cache_implementation=cache, **given)
        trainer = CountedDistillation(model=student, teacher_model=teacher, args=args, **parts)
    trainer.generated = []
    return trainer


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the median step and the mean number of generated tokens in a step."""
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer, padding_side="left")
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(options, folder, tokenizer)
        clock = StepClock()
        trainer.train()
    return {
        "milliseconds": clock.milliseconds,
        "generated": statistics.mean(trainer.generated),
        "trl": trl.__version__,
    }


def main() -> None:
    parser = option_parser(__doc__.splitlines()[0], ("gkd", "distillation"), ("prompt", "new"))
    parser.add_argument("--cache", choices=("dynamic", "static"), default="dynamic", help="of keys and values")
    print_measured(parser.parse_args(), measure)


if __name__ == "__main__":
    main()
