"""Resolve: replaces what a configuration leaves open (init, teacher, model sizes, tokenizer) by paths and numbers.

It happens once, in the parent process, before data or models are loaded. Runs are found by report.json and config.yaml
and models by config.json, so none of it needs torch.
"""

import hashlib
import math
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from gpt2lab.errors import InputError
from gpt2lab.model.student_shape import TEACHER_LAYERS, check_fits, describe_pruning
from gpt2lab.settings import DataFacts, ModelShape, TokenizerChoice
from gpt2lab.storage.hub import hub_is_reachable
from gpt2lab.storage.model_folder import has_tokenizer, parameter_count, read_shape, resolve_model_folder
from launch.checks import checks
from launch.config import run_dir, run_spec
from launch.config.run_spec import Inputs, RunSpec
from launch.config.schema import ModelKeys, RunConfig

FALLBACK_TEACHER = "gpt2-medium"
PADDING = 0.05  # largest share of tokens without text: padding of a vocabulary to a multiple of 64 or 1,024


def resolve_inputs(config: RunConfig) -> Inputs:
    """Find the model folders and sizes that `latest`, `auto`, run directories and Hub ids stand for.

    Prints one line with the teacher.

    Raises:
        InputError: nothing fits, a folder holds no GPT-2, or sizes contradict each other.
    """
    init = _init_folder(config) if config.init_names_weights else config.init
    model, model_name = _sizes(config, init)
    teacher = _teacher_folder(config, model) if config.task_name == "distill" else ""
    if teacher:
        _check_teacher(config, teacher)
    layers = _layers_of_teacher(teacher, model) if init == TEACHER_LAYERS else {}
    return Inputs(
        model=model,
        model_name=model_name,
        init=init,
        tokenizer=_tokenizer(config, init, teacher),
        teacher=teacher,
        teacher_hash=weights_hash(Path(teacher)) if teacher else "",
        teacher_layers=layers,
    )


def weights_hash(folder: Path) -> str:
    """Return the sha256 of the weights in a model folder; of several files, that of their hashes by file name."""
    digests = []
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with file.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _init_folder(config: RunConfig) -> str:
    if config.init != "latest":
        return str(resolve_model_folder(config.init, "init"))
    for run in run_dir.finished_runs():
        if run.spec.config.task_name in ("pretrain", "distill"):
            return str((run.folder / "hf").resolve())
    raise InputError(
        "init=latest: there is no finished pretrain or distill run under runs/ to start from.\n"
        "Train one first: python train.py\n"
        "Or name weights: init=RUN_DIR, init=FOLDER, init=gpt2, or init=scratch model=nano."
    )


def _sizes(config: RunConfig, init: str) -> tuple[ModelKeys, str]:
    """Return (sizes of the model, its name): model=auto takes init's sizes; a named model must agree with them."""
    name = config.groups["model"]
    if not config.init_names_weights:
        return config.model, name
    shape = read_shape(Path(init))
    sizes = {size: shape[size] for size in ("n_layer", "n_head", "n_embd", "n_positions")}
    if config.model.n_layer is None:
        if not _context_follows(config):
            checks.check_context(config.context, sizes["n_positions"], "the init model's")
        checks.check_prompt_space(config, sizes["n_positions"])
        checks.check_frozen_weights(config, sizes["n_layer"])
        return ModelKeys(**sizes, dropout=config.model.dropout), _model_name(Path(init))
    for item in fields(ModelKeys):
        given = vars(config.model)[item.name]
        if item.name in sizes and given != sizes[item.name]:
            raise InputError(
                f"model={name} has {item.name}={given}, but init={init} has {sizes[item.name]}.\n"
                "Leave the sizes to init with model=auto, or start from scratch with init=scratch."
            )
    return config.model, name


def _context_follows(config: RunConfig) -> bool:
    """Whether the context is not chosen yet, but will be by the sizes of init."""
    return config.is_unsized and "context" in config.invocation.auto_keys


def _model_name(folder: Path) -> str:
    """Name of the model in a folder: that in its run's configuration, else the folder's own."""
    try:
        return run_spec.load(folder.parent / "config.yaml").resolved.model_name
    except InputError:
        return "".join(letter if letter.isalnum() else "-" for letter in folder.name)


def _teacher_folder(config: RunConfig, model: ModelKeys) -> str:
    if config.teacher != "latest":
        return str(resolve_model_folder(config.teacher, "teacher"))
    for run in run_dir.finished_runs():
        if run.spec.config.task_name == "pretrain" and _can_teach(run, config, model):
            return str((run.folder / "hf").resolve())
    if hub_is_reachable():
        print(f"teacher: no finished pretrain run fits, so {FALLBACK_TEACHER} of the Hugging Face Hub", file=sys.stderr)
    try:
        return str(resolve_model_folder(FALLBACK_TEACHER, "teacher"))
    except InputError as error:
        name, data = config.groups["model"], config.groups["data"]
        raise InputError(
            f"There is no teacher for model {name}: no finished pretrain run under runs/ has the same data and a\n"
            f"larger model, and {FALLBACK_TEACHER} cannot be downloaded from the Hugging Face Hub.\n"
            f"Train one: python train.py task=pretrain model=… data={data}; or name one: teacher=RUN_DIR."
        ) from error


def _check_teacher(config: RunConfig, teacher: str) -> None:
    """The teacher reads the student's windows; with loss=uld it has a tokenizer, and longer windows are cut."""
    if not _context_follows(config):
        check_teacher_context(config, teacher)
    if config.loss.name == "uld" and not has_tokenizer(Path(teacher)):
        raise InputError(
            f"loss=uld runs the teacher on its own tokens, but {teacher} holds no tokenizer.\n"
            "Put its tokenizer.json there."
        )


def check_teacher_context(config: RunConfig, teacher: str) -> None:
    """Check that the teacher has positions for the student's windows; with loss=uld longer ones are cut.

    Args:
        teacher: its folder; "" without one.
    """
    if not teacher or config.loss.name == "uld":
        return
    positions = read_shape(Path(teacher))["n_positions"]
    if config.context > positions:
        raise InputError(
            f"context={config.context} is longer than the {positions} positions of the teacher {teacher}.\n"
            f"Lower context to {positions}, or name a teacher with more positions."
        )


def _layers_of_teacher(teacher_folder: str, model: ModelKeys) -> dict[str, Any]:
    """Layers and channels that the student takes over of its teacher; prints them in one line.

    Raises:
        InputError: the student does not fit into this teacher.
    """
    teacher = ModelShape(**read_shape(Path(teacher_folder)))
    student = ModelShape(**vars(model))
    check_fits(teacher, student)
    kept = describe_pruning(teacher, student)
    layers = ", ".join(map(str, kept["layers"]))
    width = f", {student.n_embd} of {teacher.n_embd} channels" if student.n_embd < teacher.n_embd else ""
    print(f"init: the teacher's layers {layers} (of 0 to {teacher.n_layer - 1}){width}", file=sys.stderr)
    return kept


def _can_teach(run: run_dir.FinishedRun, config: RunConfig, model: ModelKeys) -> bool:
    """Same data, a larger model, and the tokenizer that was named, if one was; with loss=uld any tokenizer."""
    theirs = run.spec.config
    same_data = (theirs.data, theirs.path, theirs.val_path) == (config.data, config.path, config.val_path)
    named = config.tokenizer.kind != "auto" and config.loss.name != "uld"
    same_tokenizer = not named or run.spec.resolved.tokenizer == named_tokenizer(config)
    own_shape: dict[str, Any] = {**vars(model), "vocab_size": run.shape["vocab_size"]}
    return same_data and same_tokenizer and parameter_count(run.shape) > parameter_count(own_shape)


def named_tokenizer(config: RunConfig) -> TokenizerChoice:
    """Return the tokenizer that the group tokenizer names, which is not auto."""
    if config.tokenizer.kind == "bpe":
        return TokenizerChoice("bpe", vocab_size=config.vocab_size)
    return TokenizerChoice("pretrained", source=config.tokenizer.source)


def _tokenizer(config: RunConfig, init: str, teacher: str) -> TokenizerChoice:
    """The named one; else the teacher's, else init's, else the data's own.

    With loss=uld the teacher's tokenizer is not the student's, unless the student is initialized from the teacher.
    """
    if config.tokenizer.kind != "auto":
        return named_tokenizer(config)
    follows = config.loss.name != "uld" or init == TEACHER_LAYERS
    sources = {"teacher": teacher if follows else "", "init": init if config.init_names_weights else ""}
    for key, source in sources.items():
        if not source:
            continue
        if has_tokenizer(Path(source)):
            return TokenizerChoice("pretrained", source=source)
        if key == "init" or config.preflight == "refuse":
            raise InputError(
                f"The {key} {source} holds no tokenizer, so its token ids may mean other text.\n"
                "Name its tokenizer: tokenizer=hub tokenizer.source=FOLDER"
                + (", or start all the same with preflight=warn." if key == "teacher" else ".")
            )
    if config.data_tokenizer == "bpe":
        return TokenizerChoice("bpe", vocab_size=config.vocab_size)
    return TokenizerChoice("pretrained", source=config.data_tokenizer)


def vocabulary(spec: RunSpec, facts: DataFacts) -> int:
    """Return the vocabulary size of the model, once the number of tokens of the tokenizer is known.

    init decides it, else the tokenizer; where the teacher's folder holds no tokenizer, the teacher. Padding rounds a
    vocabulary up, and the loss leaves it out. With loss=uld a teacher has its own vocabulary.

    Raises:
        InputError: they do not fit; shows the first tokens that differ.
    """
    config, inputs, size = spec.config, spec.resolved, facts.vocab_size
    if config.objective.kind.samples_softmax and config.objective.negatives >= size:
        raise InputError(
            f"objective.negatives={config.objective.negatives}: the vocabulary size is only {size}.\n"
            f"Give fewer, for example objective.negatives={max(size // 4, 1)}, or objective=clm."
        )
    if inputs.init_names_weights:
        size = _fitting("init", inputs.init, facts, math.inf)
    if config.task_name == "distill" and config.loss.name == "uld":
        _check_teacher_layers(inputs, facts)
    elif config.task_name == "distill":
        known = has_tokenizer(Path(inputs.teacher)) or config.groups["tokenizer"] != "auto"
        lenient = not known and config.preflight != "refuse"
        teachers = _fitting("teacher", inputs.teacher, facts, math.inf if lenient else PADDING)
        size = size if known or inputs.init_names_weights else teachers
    return size


def _fitting(key: str, folder: str, facts: DataFacts, padding: float) -> int:
    """Vocabulary size of the model that this key names."""
    size, tokens = read_shape(Path(folder))["vocab_size"], facts.vocab_size
    if tokens <= size <= tokens * (1 + padding):
        return size
    from gpt2lab.data.tokenizer import describe_difference, load_tokenizer

    different = describe_difference(Path(folder), load_tokenizer(facts.tokenizer_folder))
    other_way = ", or distil between tokenizers: loss=uld" if key == "teacher" else ""
    raise InputError(
        f"{key}={folder} has a vocabulary size of {size}, the tokenizer of this run {tokens}; "
        f"they must be the same.{different}\n"
        "Leave tokenizer=auto, which takes the teacher's or init's, or name weights trained with this tokenizer"
        f"{other_way}."
    )


def _check_teacher_layers(inputs: Inputs, facts: DataFacts) -> None:
    """A student that is initialized from its teacher has its embeddings, so its tokens are the teacher's."""
    if inputs.init != TEACHER_LAYERS:
        return
    from gpt2lab.data.tokenizer import describe_difference, load_tokenizer

    different = describe_difference(Path(inputs.teacher), load_tokenizer(facts.tokenizer_folder))
    if different:
        raise InputError(
            "init=teacher_layers gives the student its teacher's embeddings, and they have not the same tokenizer."
            f"{different}\nUse init=scratch, or leave tokenizer=auto, which takes the teacher's."
        )
