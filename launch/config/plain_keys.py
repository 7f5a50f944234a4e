"""Plain keys: the top-level keys of conf/train.yaml, by section; the first line of a class is the heading."""

from dataclasses import dataclass

from gpt2lab.keys import AUTO_OR_BOOL, key

DISTILL = "task=distill"
EVERY_STEPS = "[1, inf)"
FULL = "full"  # of validate_tokens


@dataclass(frozen=True)
class RunKeys:
    """Run directory and initial weights."""

    seed: int = key("random seed of weights, data order and dropout", within="[0, 4294967295]")
    run_dir: str | None = key("run directory; null: runs/<task>/<model>-<time>", free_text=True)
    name: str | None = key("name of the run directory instead of <model>-<time>", free_text=True)
    init: str = key(
        "initial weights: scratch, latest, teacher_layers (distill), a run directory, HF folder or Hub id",
        free_text=True,
    )
    plan: bool = key("print the plan of the run (memory, time, disk space) and exit")
    plan_memory: float | None = key(
        "GB per GPU, to plan for another machine (plan=true accelerator=gpu devices=8)", within="(0, 1e6]"
    )
    resume: str | None = key(
        "run directory to resume; auto: resume the run of run_dir or name if it exists, else start it", free_text=True
    )
    plugins: list[str] = key("packages of your own that add functions by name; they are imported (docs/extending.md)")
    # Never stored: launch/config/targets.py
    allow_targets: list[str] = key("packages of your own whose classes a stored configuration may instantiate")


@dataclass(frozen=True)
class DistillationKeys:
    """Distillation."""

    teacher: str = key(
        "teacher model: latest, a run directory, a Hugging Face folder or a Hub id", read_by=DISTILL, free_text=True
    )
    baseline: str | None = key(
        "run directory of the same student trained without a teacher, for distill/gap_closed",
        read_by=DISTILL,
        free_text=True,
    )
    preflight: str = key(
        "action before the first step if the teacher is unsuitable", choices=("refuse", "warn", "off"), read_by=DISTILL
    )


@dataclass(frozen=True)
class TrainingKeys:
    """Length and size of the training."""

    steps: int = key(
        "number of optimizer steps; auto: by the size of the model", within="[1, 1e9]", on_resume=True, by_size=True
    )
    epochs: float | None = key(
        "passes over the training data, instead of steps; null: steps counts", within="(0, 1e6]", on_resume=True
    )
    batch_tokens: int = key(
        "tokens per optimizer step, over all devices; auto: by size",
        within="[1, 1e9]",
        read_by="running text",
        by_size=True,
    )
    batch_sequences: int = key("pairs per optimizer step, over all devices", within="[1, 1e6]", read_by="pairs")
    micro_batch: int | str = key(
        "sequences per device and forward pass; auto: by free memory", within="[1, 1e6]", word="auto", of_machine=True
    )
    context: int = key("sequence length in tokens; auto: by size", within="[2, 1e6]", by_size=True)
    packing: bool = key("pack documents or pairs into shared rows, without attention between them")
    label_smoothing: float = key("label smoothing of the training loss; validation has none", within="[0, 1)")
    z_loss: float = key("weight of logsumexp² of the logits in the training loss; PaLM's is 1e-4", within="[0, inf)")
    gradient_clip: float = key("maximum L2 norm of the gradient; 0: no clipping", within="[0, inf)")
    layer_drop: float = key("probability that a training pass skips a block (LayerDrop)", within="[0, 1)")
    ema: float = key("decay of the weight average (EMA) that is validated and exported; 0: no average", within="[0, 1)")
    activation_checkpointing: bool = key("recompute activations in the backward pass: less memory, a third more time")
    compile: bool | str = key("torch.compile; auto: if it saves time within the run", choices=AUTO_OR_BOOL)
    validate_every: int = key("optimizer steps between validations", within=EVERY_STEPS, on_resume=True)
    validate_tokens: int | str = key(
        "most tokens of a validation, a fixed sample of the validation split; full: the whole split",
        within="[1, inf)",
        word=FULL,
        on_resume=False,  # a curve, a best model and a sweep compare losses on one part of the split
    )
    checkpoint_every: int = key("optimizer steps between checkpoints", within=EVERY_STEPS, on_resume=True)
    checkpoint_format: str = key(
        "single: one file; sharded: one file per rank (strategy=fsdp); auto: by size",
        choices=("auto", "single", "sharded"),
        of_machine=True,
    )
    sample_every: int = key(
        "optimizer steps between text samples", within=EVERY_STEPS, on_resume=True, read_by="callbacks=samples"
    )
    log_every: int = key("optimizer steps between logged training losses", within=EVERY_STEPS, on_resume=True)
    export: str = key(
        "weights in hf/, by which sweeps rank the run; best: of the best validation (default of finetune)",
        choices=("last", "best"),
        read_by="callbacks=checkpoint",
    )
    early_stop_patience: int = key(
        "validations without a better watched metric after which the run stops; 0: it never does",
        within="[0, 1e9]",
        on_resume=True,
    )
    on_spike: str = key(
        "action on a spike of the training loss: log a warning, or stop: save and end the run",
        choices=("warn", "stop"),
        on_resume=True,
        read_by="callbacks=health",
    )
    profile: str | None = key(
        "START:COUNT: profile the COUNT steps after step START, into profile/; null: none",
        on_resume=True,
        read_by="callbacks=profile",
        free_text=True,
    )


@dataclass(frozen=True)
class MachineKeys:
    """Machine."""

    accelerator: str = key(
        "device type; auto: a GPU if there is one, else the CPU", choices=("auto", "cpu", "gpu", "mps"), of_machine=True
    )
    devices: int | str = key(
        "devices per machine; auto: one CPU process, or every GPU", within="[1, 1e4]", word="auto", of_machine=True
    )
    num_nodes: int = key("number of machines (docs/cluster.md)", within="[1, 1e4]", of_machine=True)
    n_jobs: int = key("jobs of a sweep that run at once, each on its share of cores and GPUs", within="[1, 1024]")
    max_restarts: int = key(
        "maximum number of restarts of a crashed run, each from its last checkpoint",
        within="[0, 1000]",
        on_resume=True,
    )
    threads: int | str = key("CPU threads per process", within="[1, 4096]", word="auto", of_machine=True)
    workers: int = key("data loading processes per rank", within="[0, 64]", on_resume=True)
    rank_timeout: int = key(
        "seconds without progress of a rank after which the run ends and names it", within="[5, 1e6]", on_resume=True
    )
    cache_dir: str | None = key(
        "folder of prepared data; by default $GPT2LAB_CACHE, else ~/.cache/gpt2lab", on_resume=True, free_text=True
    )


@dataclass(frozen=True)
class DataKeys:
    """Data."""

    path: str = key("data to read: a file, a folder or a glob", read_by="data with path", free_text=True)
    val_path: str = key(
        "separate validation data: a file, a folder or a glob", read_by="data with val_path", free_text=True
    )
    val_fraction: float = key(
        "share of the documents used for validation", within="(0, 1)", read_by="data split by hash"
    )
    on_bad_line: str = key(
        "action on an unreadable record: end with an error, or skip it",
        choices=("stop", "skip"),
        read_by="data from files",
    )
    source: str = key(
        "column of the prompt; a.b: b within a; a+b: both; 1: the first column of a file without a header",
        read_by="pairs",
        free_text=True,
    )
    target: str = key("column of the response, in the notation of source", read_by="pairs", free_text=True)
    vocab_size: int = key(
        "vocabulary size of a BPE tokenizer trained on the data", within="[257, 1e6]", read_by="trained tokenizer"
    )


SECTIONS = (RunKeys, DistillationKeys, TrainingKeys, MachineKeys, DataKeys)
