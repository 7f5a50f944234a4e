"""Run cost: the compute and the time of each phase of a run, from its configuration alone."""

from dataclasses import dataclass
from pathlib import Path

from gpt2lab.errors import InputError
from gpt2lab.generation.completion import BATCH
from gpt2lab.metric_names import VAL_LOSS
from gpt2lab.settings import AUTO, ModelShape
from gpt2lab.storage.model_folder import matmul_parameter_count
from gpt2lab.system.device import flops_per_token
from gpt2lab.system.run_time import count_events
from launch.config.run_spec import RunSpec
from launch.config.schema import RunConfig
from launch.memory.memory_terms import RunSizes
from launch.memory.run_sizes import SAMPLE_PROMPTS
from launch.run.build import data_module
from launch.run.disk_space import RunFiles

BYTES_OF_A_TOKEN = 3  # of text, at least: 3.0 to 4.5 of English and of source code, with 4,096 to 50,257 entries
BYTES_OF_A_BIN_TOKEN = 2
FORWARD, FROZEN = 1 / 3, 2 / 3  # shares of a training step's FLOP: a forward pass; a step without gradients of weights
SAMPLING_METHODS = 3  # of sampling=auto
# Assumed: of a disk, of text that is tokenized, and to load the export in a new process
DISK_BYTES, PREPARED_BYTES, VERIFY_SECONDS = 5e8, 1.2e6, 10.0
LESS_VALIDATION = "Fewer tokens: validate_tokens=N, with callbacks.final_score.tokens=auto (its default)"


@dataclass(frozen=True)
class PhaseCost:
    """Work of one phase on all devices.

    Attributes:
        text: what it consists of.
        flops: FLOP.
        decoded: tokens that are generated one after another.
        written: bytes written and read.
        seconds: seconds that depend on nothing of this.
    """

    text: str
    flops: float = 0.0
    decoded: float = 0.0
    written: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class RunCost:
    """Cost of a run by phase: prepare, train, validate, sample, save, export.

    Attributes:
        training_flops: FLOP of the training per position.
    """

    phases: dict[str, PhaseCost]
    training_flops: float

    @property
    def training_share(self) -> float:
        """Share of the run's compute that trains."""
        return self.phases["train"].flops / sum(phase.flops for phase in self.phases.values())

    def seconds(self, tokens_per_second: float, decoding: float) -> dict[str, float]:
        """Return the seconds of each phase.

        Args:
            tokens_per_second: speed of the training, of all devices.
            decoding: seconds to generate one token.
        """
        per_flop = 1 / (tokens_per_second * self.training_flops)
        return {
            name: phase.flops * per_flop + phase.decoded * decoding + phase.written / DISK_BYTES + phase.seconds
            for name, phase in self.phases.items()
        }


def run_cost(spec: RunSpec, sizes: RunSizes, files: RunFiles, split: int | None, text: int = 0) -> RunCost:
    """Return the cost of a run.

    Args:
        files: sizes of its files.
        split: tokens of the validation split; None: unknown, it is taken to be larger than what is validated.
        text: bytes of the text to prepare; 0: unknown.

    Raises:
        InputError: validate_tokens=full, and the size of the split is unknown.
    """
    student, teacher = _flops(sizes.shape, sizes.length), _flops(sizes.teacher, sizes.length)
    validated, scored = _validated(spec.config, split)
    phases = {
        "prepare": _prepare(spec.config, sizes, validated, text),
        "train": _train(spec, sizes, student, teacher),
        "validate": _validate(spec, student, teacher, validated, scored),
        "sample": _sample(spec.config, student),
        **_save(spec, files),
    }
    return RunCost(phases, student + teacher * FORWARD)


def _prepare(config: RunConfig, sizes: RunSizes, validated: int, text: int) -> PhaseCost:
    cached = _flops(sizes.cached_teacher, sizes.length)
    work = "tokens and the teacher's distributions" if cached else "tokens"
    flops = cached * FORWARD * (config.trained_positions + validated)
    return PhaseCost(f"{work}, unless they are in cache_dir", flops=flops, seconds=text / PREPARED_BYTES)


def _train(spec: RunSpec, sizes: RunSizes, student: float, teacher: float) -> PhaseCost:
    config = spec.config
    generated = _on_policy_tokens(config)
    flops = config.trained_positions * (student * (FROZEN if sizes.lora_rank else 1) + teacher * FORWARD)
    flops += config.steps * config.global_batch_rows * generated * student * FORWARD
    return PhaseCost(f"{config.steps:,} steps", flops, decoded=config.steps * spec.machine.accumulate * generated)


def _validate(spec: RunSpec, student: float, teacher: float, validated: int, scored: int) -> PhaseCost:
    """Validations, with text that is generated to be scored, and the final score."""
    config, times = spec.config, _events(spec.config, spec.config.validate_every)
    generates = config.watched_metric != VAL_LOSS
    texts, new = (int(config.task["text"][key]) if generates else 0 for key in ("examples", "max_new_tokens"))
    flops = times * (validated * (student + teacher) + texts * (config.context + new) * student) + scored * student
    decoded = times * -(-texts // (BATCH * spec.machine.world_size)) * new
    final = f"; the export on up to {scored:,} at the end" if scored else ""
    return PhaseCost(f"{times:,} times up to {validated:,} tokens{final}", flops * FORWARD, decoded)


def _sample(config: RunConfig, student: float) -> PhaseCost:
    samples, methods = config.callbacks.get("samples"), SAMPLING_METHODS if config.sampling == AUTO else 1
    if not samples:
        return PhaseCost("none")
    times, texts = _events(config, int(samples["every"])), methods * (len(samples["prompts"]) or SAMPLE_PROMPTS)
    new = int(samples["max_new_tokens"])
    flops = times * texts * (config.context + new) * student * FORWARD
    return PhaseCost(f"{times:,} times {texts} texts", flops, decoded=times * methods * new)


def _save(spec: RunSpec, files: RunFiles) -> dict[str, PhaseCost]:
    """Checkpoints, and exports, which are read back; training waits for the last one, and for shards."""
    checkpoint = spec.config.callbacks.get("checkpoint")
    times = _events(spec.config, int(checkpoint["every"])) if checkpoint else 0
    verified = VERIFY_SECONDS if checkpoint and checkpoint.get("verify_export") else 0.0
    waits, beside = (times, "") if spec.machine.strategy == "fsdp" else (min(times, 1), ", beside training")
    text = f"{times:,} times{beside}, at {DISK_BYTES / 1e9} GB/s"
    return {
        "save": PhaseCost(text, written=waits * files.checkpoint),
        "export": PhaseCost(text, written=2 * waits * files.export, seconds=verified),
    }


def split_tokens(spec: RunSpec) -> tuple[int | None, int]:
    """Return (tokens of the validation split at most, bytes of the text) before preparation; (None, 0) if unknown.

    Raises:
        InputError: there is no text here.
    """
    config = spec.config
    if config.data.get("source") == "bin" and config.path:
        file = Path(config.path).expanduser() / "val.bin"
        return (file.stat().st_size // BYTES_OF_A_BIN_TOKEN if file.is_file() else None), 0
    text = 0 if config.takes_pairs else data_module(spec).text_bytes()
    splits = bool(text) and not config.val_path
    return (int(text * config.val_fraction) // BYTES_OF_A_TOKEN if splits else None), text


def _flops(shape: ModelShape | None, length: int) -> float:
    """FLOP of a training step per position; 0 without a model."""
    if shape is None:
        return 0.0
    return flops_per_token(matmul_parameter_count(vars(shape)), shape.n_layer, shape.n_embd, length)


def _events(config: RunConfig, every: int) -> int:
    return count_events(0, config.steps, every)


def _validated(config: RunConfig, split: int | None) -> tuple[int, int]:
    """Return (tokens of a validation, tokens of the final score if those are more).

    Raises:
        InputError: both are unknown.
    """
    limit = config.most_validated
    if split is None and limit is None:
        raise InputError("validate_tokens=full: the size of the validation split is known once the data are prepared")
    validated = min(size for size in (limit, split) if size is not None)
    scored = min(size for size in (config.most_scored, split) if size is not None)
    return validated, scored if scored > validated else 0


def _on_policy_tokens(config: RunConfig) -> float:
    """Generated tokens of a training sequence, on average over the steps at most."""
    if not config.sequences.on_policy:
        return 0.0
    return config.sequences.max_new_tokens * (config.sequences.lmbda if config.sequences.name == "gkd" else 1.0)
