"""Ignored keys: refuses a key that was given although nothing in the run would read it."""

import shlex
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from gpt2lab.errors import InputError
from launch.config.schema import Config

SKEW = ("skew_kl", "skew_reverse_kl")
DISTILL_ONLY = ("loss", "teacher", "teacher_cache", "sequences", "preflight", "baseline", "shard_teacher")


@dataclass(frozen=True)
class Reader:
    """Who reads a key; `reads` asks it of a configuration in which the key was given."""

    group: str  # whose value decides
    key: str
    reads: Callable[[Config], bool]
    says: str


def _source(config: Config) -> str:
    """Where running text comes from: stdlib, packages, text, hub, bin; nothing for pairs."""
    return "" if config.takes_pairs else str(config.data.get("source"))


def _reads_files(config: Config) -> bool:
    tables = config.takes_pairs and (config.data.get("reader") == "tables" or bool(config.path))
    return _source(config) == "text" or tables or bool(config.val_path)


def _splits_by_hash(config: Config) -> bool:
    own_validation = bool(config.val_path) or bool(config.data.get("val_split"))
    return _source(config) != "bin" and (not own_validation or (config.takes_pairs and bool(config.path)))


def _trains_bpe(config: Config) -> bool:
    if config.tokenizer.kind != "auto":
        return config.tokenizer.kind == "bpe"
    return config.data.get("default_tokenizer") != "gpt2" and _source(config) not in ("hub", "bin")


def _adapts(config: Config) -> bool:
    lora = config.task.get("lora")
    return not isinstance(lora, dict) or bool(lora.get("rank"))


def _trains_all(config: Config) -> bool:
    lora = config.task.get("lora")
    return not isinstance(lora, dict) or not lora.get("rank")


def _reader(group: str, key: str, *values: str) -> Reader:
    """Of a key of a group that only some of its values have."""

    def reads(config: Config) -> bool:
        return vars(vars(config)[group])["name"] in values

    names = " and ".join(f"{group}={value}" for value in values)
    return Reader(group, f"{group}.{key}", reads, f"{names} {'reads' if len(values) == 1 else 'read'} it")


READERS = (
    Reader(
        "data", "batch_sequences", lambda c: c.takes_pairs, "pairs of texts read it, running text reads batch_tokens"
    ),
    Reader("data", "source", lambda c: c.takes_pairs, "pairs of texts read it"),
    Reader("data", "target", lambda c: c.takes_pairs, "pairs of texts read it"),
    Reader("data", "batch_tokens", lambda c: not c.takes_pairs, "running text reads it, pairs read batch_sequences"),
    Reader(
        "data", "path", lambda c: c.takes_pairs or _source(c) in ("text", "bin"), "data=text, bin and pairs read it"
    ),
    Reader("data", "val_path", lambda c: c.takes_pairs or _source(c) == "text", "data=text and pairs read it"),
    Reader("data", "val_fraction", _splits_by_hash, "these data have a validation part of their own"),
    Reader("data", "on_bad_line", _reads_files, "files of text or records read it"),
    Reader("tokenizer", "vocab_size", _trains_bpe, "only a tokenizer trained here reads it (tokenizer=bpe)"),
    Reader("tokenizer", "tokenizer.vocab_size", lambda c: c.tokenizer.kind == "bpe", "tokenizer=bpe reads it"),
    Reader("tokenizer", "tokenizer.source", lambda c: c.tokenizer.kind == "pretrained", "tokenizer=hub reads it"),
    Reader("optimizer", "optimizer.momentum", lambda c: c.optimizer.name == "muon", "optimizer=muon reads it"),
    Reader("optimizer", "optimizer.adamw_lr", lambda c: c.optimizer.name == "muon", "optimizer=muon reads it"),
    Reader(
        "schedule",
        "schedule.final_fraction",
        lambda c: c.schedule.name != "constant",
        "all schedules but constant read it",
    ),
    Reader("schedule", "schedule.decay_fraction", lambda c: c.schedule.name == "wsd", "schedule=wsd reads it"),
    Reader(
        "callbacks",
        "sample_every",
        lambda c: "samples" in c.callbacks,
        "the callback samples reads it (callbacks=default)",
    ),
    Reader(
        "callbacks", "on_spike", lambda c: "health" in c.callbacks, "the callback health reads it (callbacks=default)"
    ),
    Reader(
        "strategy", "fsdp_offload", lambda c: c.strategy in ("auto", "fsdp") or not c.fsdp_offload, "strategy=fsdp does"
    ),
    Reader("loss", "loss.beta", lambda c: c.loss.name == "jsd", "loss=jsd reads it"),
    Reader("loss", "loss.alpha", lambda c: c.loss.name in SKEW, "loss=skew_kl and loss=skew_reverse_kl read it"),
    *(
        Reader("loss", f"loss.mixing_{part}", lambda c: c.loss.name == "taid", "loss=taid reads it")
        for part in ("start", "end", "step", "momentum")
    ),
    _reader("objective", "mask_share", "mlm"),
    *(_reader("objective", key, "fim") for key in ("fim_rate", "spm_share")),
    *(_reader("objective", key, "sampled_softmax") for key in ("negatives", "distribution")),
    *(_reader("teacher_cache", key, "topk") for key in ("k", "tail", "dtype")),
    *(_reader("teacher_cache", key, "sampled") for key in ("n", "draw_seed")),
    *(_reader("sequences", key, "gkd", "distillm", "seqkd") for key in ("max_new_tokens", "gen_temperature")),
    _reader("sequences", "lmbda", "gkd"),
    *(_reader("sequences", key, "distillm") for key in ("threshold_step", "tolerance", "capacity")),
    _reader("sequences", "draw_seed", "seqkd"),
    *(
        _reader("launcher", key, "slurm")
        for key in ("executor", "partition", "account", "qos", "time", "notice", "requeues", "sbatch", "setup")
    ),
    *(_reader("launcher", key, "slurm", "ray") for key in ("memory", "cpus")),
    _reader("launcher", "address", "ray"),
    *(
        _reader("hparams_search", key, "optuna")
        for key in ("n_trials", "sampler", "seed", "n_startup_trials", "pruner", "warmup_steps")
    ),
    *(
        Reader("experiment", f"study.{key}", lambda c: c.is_study, "only experiment=distill_study reads it")
        for key in ("seeds", "lr_factors", "tune", "inits")
    ),
    Reader("task", "task.lora.alpha", _adapts, "LoRA reads it (task.lora.rank=8)"),
    Reader("task", "task.lora.dropout", _adapts, "LoRA reads it (task.lora.rank=8)"),
    Reader("task", "task.frozen_layers", _trains_all, "training without LoRA reads it (task.lora.rank=0)"),
)


def check_ignored_keys(config: Config) -> None:
    """Compare what was given on the command line with what the task, the data and the other groups read.

    Raises:
        InputError: names the first unread key and who reads it.
    """
    for message in unread_keys(config).values():
        raise InputError(f"{message}.\nLeave it out.")


def unread_keys(config: Config) -> dict[str, str]:
    """The given keys that nothing in the run reads, each with who would read it."""
    given, groups = given_keys(config.record.overrides), config.record.groups
    unread = {
        key: f"task={config.task_name} does not read {key}: only task=distill does"
        for key in given
        if config.task_name != "distill" and key.split(".")[0] in DISTILL_ONLY
    }
    for reader in READERS:
        if reader.key in given and not reader.reads(config):
            unread[reader.key] = f"{reader.group}={groups[reader.group]} does not read {reader.key}: {reader.says}"
    return unread


def deciding_groups(key: str) -> set[str]:
    """The groups whose values decide whether a run reads a key; none where every run does."""
    return {reader.group for reader in READERS if reader.key == key} | (
        {"task"} if key.split(".")[0] in DISTILL_ONLY else set()
    )


def given_keys(overrides: Iterable[str]) -> list[str]:
    """The keys of Hydra overrides: `+a.b=1` → `a.b`."""
    return [override.split("=")[0].lstrip("+~").split("@")[0].replace("/", ".") for override in overrides]


def without(overrides: Iterable[str], keys: Collection[str]) -> list[str]:
    """The overrides of all other keys."""
    return [override for override in overrides if given_keys([override])[0] not in keys]


def in_words(overrides: Iterable[str]) -> str:
    """Overrides as they would be typed."""
    return shlex.join(overrides)
