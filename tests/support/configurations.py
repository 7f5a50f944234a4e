"""The steps of train.py from a command line to a prepared run, without training."""

import functools
import shlex
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import open_dict

from gpt2lab.settings import TokenizerChoice
from launch.config import schema
from launch.config.cli_overrides import quote_free_text
from launch.config.groups import CONF
from launch.config.run_spec import Inputs, Prepared, PreparedSpec, Resolved, RunSpec
from launch.config.schema import RunConfig
from launch.run import auto_settings, resolve

schema.register()
BPE = TokenizerChoice("bpe", vocab_size=300)


@functools.cache
def composed(*overrides: str) -> RunConfig:
    """Return the configuration of a command line."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        words = [word for word in quote_free_text(list(overrides)) if word != "-m"]
        tree = compose("train", words, return_hydra_config=True)
    with open_dict(tree):
        hydra = tree.pop("hydra")
    return schema.from_hydra(tree, hydra, command=shlex.join(["python", "train.py", *overrides]))


def inputs_of(config: RunConfig, **changes: Any) -> Inputs:
    """Return its model, teacher and tokenizer by name, without reading the disk."""
    tokenizer = BPE if config.tokenizer.kind == "auto" else resolve.named_tokenizer(config)
    named = {"model": config.model, "model_name": config.groups["model"], "init": config.init, "tokenizer": tokenizer}
    return Inputs(**{**named, "teacher": config.teacher if config.task_name == "distill" else "", **changes})


def resolved(config: RunConfig, free: int | None = None, **changes: Any) -> RunSpec:
    """Return the run on this machine; `changes` replace fields of its inputs."""
    inputs = inputs_of(config, **changes)
    return RunSpec(config, Resolved(**vars(inputs), machine=auto_settings.choose_machine(config, inputs, free)))


def prepared(spec: RunSpec, vocab_size: int = 300, compiled: bool = False) -> PreparedSpec:
    """Return the run with its data prepared."""
    return PreparedSpec(spec.config, spec.resolved, Prepared("hash", vocab_size, compiled, compile_head=False))
