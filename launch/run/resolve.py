"""Resolve: what a configuration leaves open (init, teacher, model sizes, tokenizer) becomes paths and numbers.

Done once, in the parent process, before data or models are touched. Runs are known by report.json and config.yaml and
models by config.json, so none of it needs torch.
"""

import hashlib
import math
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from gpt2lab.errors import InputError
from gpt2lab.model.student_shape import TEACHER_LAYERS, check_fits, what_is_kept
from gpt2lab.settings import DataFacts, ModelShape, TokenizerChoice
from gpt2lab.storage.hub import hub_is_reachable
from gpt2lab.storage.model_folder import folder_of, has_tokenizer, parameters_of, read_shape
from launch.checks import checks
from launch.config import run_dir
from launch.config.schema import Config, ModelKeys
from launch.config.unused_keys import given_keys

FALLBACK_TEACHER = "gpt2-medium"
PADDING = 0.05  # largest share of entries that mean no token: padding to a multiple of 64 or 1,024
CORPORA_WITH_OWN_BPE = ("stdlib", "packages", "text")


def resolve(config: Config) -> None:
    """Replace `latest`, `auto`, run directories and Hub ids in place; say in one line which teacher was taken.

    Raises:
        InputError: nothing fits, a folder holds no GPT-2, or sizes contradict each other.
    """
    for key in ("path", "val_path"):  # absolute, so that the run can be continued from any folder
        if given := vars(config)[key]:
            setattr(config, key, os.path.abspath(os.path.expanduser(given)))  # noqa: PTH100, PTH111 — may be a glob
    dataset = os.path.expanduser(str(config.data.get("dataset") or ""))  # noqa: PTH111 — may be a Hub id
    if dataset and Path(dataset).is_dir():
        config.data["dataset"] = str(Path(dataset).absolute())
    if config.init_names_weights:
        config.init = _init_folder(config)
    _take_sizes_from_init(config)
    if config.task_name == "distill":
        config.teacher = _teacher_folder(config)
        _check_reads(config)
        config.record.teacher_hash = weights_hash(Path(config.teacher))
        print(f"teacher: {config.teacher}", file=sys.stderr)
        if config.loss.name == "uld" and not has_tokenizer(Path(config.teacher)):
            raise InputError(
                f"loss=uld asks the teacher in its own tokens, but {config.teacher} holds no tokenizer.\n"
                "Put its tokenizer.json there."
            )
    if config.init == TEACHER_LAYERS:
        config.record.kept = _kept_of_teacher(config)
    config.tokenizer = _tokenizer(config)


def weights_hash(folder: Path) -> str:
    """sha256 of the weights in a model folder; of several files, that of their hashes in the order of their names."""
    digests = []
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with file.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _init_folder(config: Config) -> str:
    if config.init != "latest":
        return str(folder_of(config.init, "init"))
    for run in run_dir.finished_runs():
        if run.config.task_name in ("pretrain", "distill"):
            print(f"init: {run.folder}", file=sys.stderr)
            return str((run.folder / "hf").resolve())
    raise InputError(
        "init=latest: there is no finished pretrain or distill run under runs/ to start from.\n"
        "Train one first: python train.py\n"
        "Or name weights: init=RUN_DIR, init=FOLDER, init=gpt2, or init=scratch model=nano."
    )


def _take_sizes_from_init(config: Config) -> None:
    """model=auto takes init's sizes; a named model must agree with them."""
    if not config.init_names_weights:
        return
    shape, group = read_shape(Path(config.init)), config.record.groups["model"]
    sizes = {name: shape[name] for name in ("n_layer", "n_head", "n_embd", "n_positions")}
    if config.model.n_layer is None:
        config.model = ModelKeys(**sizes, dropout=config.model.dropout)
        config.record.groups["model"] = _model_name(Path(config.init))
        checks.check_context(config.context, sizes["n_positions"], "the init model's")
        checks.check_room(config, sizes["n_positions"])
        checks.check_kept_weights(config, sizes["n_layer"])
        return
    for item in fields(ModelKeys):
        wanted = vars(config.model)[item.name]
        if item.name in sizes and wanted != sizes[item.name]:
            raise InputError(
                f"model={group} has {item.name}={wanted}, but init={config.init} has {sizes[item.name]}.\n"
                "Leave the sizes to init with model=auto, or start from scratch with init=scratch."
            )


def _model_name(folder: Path) -> str:
    """What the model in a folder is called: as in its run's configuration, else the folder's own name."""
    try:
        return run_dir.configuration.load(folder.parent / "config.yaml").record.groups["model"]
    except (InputError, KeyError):
        return "".join(letter if letter.isalnum() else "-" for letter in folder.name)


def _teacher_folder(config: Config) -> str:
    if config.teacher != "latest":
        return str(folder_of(config.teacher, "teacher"))
    for run in run_dir.finished_runs():
        if run.config.task_name == "pretrain" and _can_teach(run, config):
            return str((run.folder / "hf").resolve())
    if hub_is_reachable():
        print(f"teacher: no finished pretrain run fits, so {FALLBACK_TEACHER} of the Hugging Face Hub", file=sys.stderr)
    try:
        return str(folder_of(FALLBACK_TEACHER, "teacher"))
    except InputError as error:
        model, data = config.record.groups["model"], config.record.groups["data"]
        raise InputError(
            f"There is no teacher for model {model}: no finished pretrain run under runs/ has the same data and a\n"
            f"larger model, and {FALLBACK_TEACHER} cannot be had from the Hugging Face Hub.\n"
            f"Train one: python train.py task=pretrain model=… data={data}; or name one: teacher=RUN_DIR."
        ) from error


def _check_reads(config: Config) -> None:
    """The teacher reads what the student reads; with loss=uld what goes beyond its positions is cut."""
    positions = read_shape(Path(config.teacher))["n_positions"]
    if config.loss.name != "uld" and config.context > positions:
        raise InputError(
            f"context={config.context} is longer than the {positions} positions of the teacher {config.teacher}.\n"
            f"Lower context to {positions}, or name a teacher with more positions."
        )


def _kept_of_teacher(config: Config) -> dict[str, Any]:
    """What the student takes over of its teacher; said in one line.

    Raises:
        InputError: the student cannot be cut out of this teacher.
    """
    teacher = ModelShape(**read_shape(Path(config.teacher)))
    student = ModelShape(**vars(config.model))
    check_fits(teacher, student)
    kept = what_is_kept(teacher, student)
    layers = ", ".join(map(str, kept["layers"]))
    width = f", {student.n_embd} of {teacher.n_embd} channels" if student.n_embd < teacher.n_embd else ""
    print(f"init: the teacher's layers {layers} (of 0 to {teacher.n_layer - 1}){width}", file=sys.stderr)
    return kept


def _can_teach(run: run_dir.FinishedRun, config: Config) -> bool:
    """Same data, a larger model, and the tokenizer that was named, if one was; with loss=uld any tokenizer."""
    theirs = run.config
    same_data = (theirs.data, theirs.path, theirs.val_path) == (config.data, config.path, config.val_path)
    named = config.tokenizer.kind != "auto" and config.loss.name != "uld"
    same_tokenizer = not named or wanted_tokenizer(theirs) == wanted_tokenizer(config)
    own_shape: dict[str, Any] = {**vars(config.model), "vocab_size": run.shape["vocab_size"]}
    return same_data and same_tokenizer and parameters_of(run.shape) > parameters_of(own_shape)


def wanted_tokenizer(config: Config) -> TokenizerChoice:
    """The named tokenizer with the size that `vocab_size` asks for."""
    choice = config.tokenizer
    own_size = "tokenizer.vocab_size" in given_keys(config.record.overrides)
    size = choice.vocab_size if own_size else config.vocab_size
    return TokenizerChoice("bpe", vocab_size=size) if choice.kind == "bpe" else choice


def _tokenizer(config: Config) -> TokenizerChoice:
    """The named one; else the teacher's, else init's, else the data's own.

    With loss=uld the teacher's tokenizer is its own affair, unless the student is cut out of it.
    """
    if config.tokenizer.kind != "auto":
        return wanted_tokenizer(config)
    follows = config.task_name == "distill" and (config.loss.name != "uld" or config.init == TEACHER_LAYERS)
    teacher = config.teacher if follows else ""
    for source, key in ((teacher, "teacher"), (config.init if config.init_names_weights else "", "init")):
        if not source:
            continue
        if has_tokenizer(Path(source)):
            return TokenizerChoice("pretrained", source=source)
        if key == "init" or config.preflight == "refuse":
            raise InputError(
                f"The {key} {source} holds no tokenizer, so its token ids may mean other text.\n"
                "Name its tokenizer: tokenizer=hub tokenizer.source=FOLDER"
                + (", or go on all the same with preflight=warn." if key == "teacher" else ".")
            )
    own = config.data.get("default_tokenizer")
    if own is None:
        own = "bpe" if config.data.get("source") in CORPORA_WITH_OWN_BPE or config.takes_pairs else "gpt2"
    return (
        TokenizerChoice("bpe", vocab_size=config.vocab_size)
        if own == "bpe"
        else TokenizerChoice("pretrained", source=own)
    )


def vocabulary(config: Config, facts: DataFacts) -> int:
    """Vocabulary size of the model, once the tokenizer's number of entries is known.

    init decides it, else the tokenizer; where the teacher's folder does not say which tokens its entries are, the
    teacher. Entries that mean no token pad a vocabulary to a round number: the loss cuts them. With loss=uld a teacher
    has its own.

    Raises:
        InputError: they do not fit; shows the first tokens that differ.
    """
    wanted = facts.vocab_size
    if config.objective.name == "sampled_softmax" and config.objective.negatives >= wanted:
        raise InputError(
            f"objective.negatives={config.objective.negatives}: the vocabulary has only {wanted} entries.\n"
            f"Give fewer, for example objective.negatives={max(wanted // 4, 1)}, or objective=clm."
        )
    if config.init_names_weights:
        wanted = _fitting("init", config.init, facts, math.inf)
    if config.task_name == "distill" and config.loss.name == "uld":
        _check_cut_out(config, facts)
    elif config.task_name == "distill":
        known = has_tokenizer(Path(config.teacher)) or config.record.groups["tokenizer"] != "auto"
        lenient = not known and config.preflight != "refuse"
        size = _fitting("teacher", config.teacher, facts, math.inf if lenient else PADDING)
        wanted = wanted if known or config.init_names_weights else size
    return wanted


def _fitting(key: str, folder: str, facts: DataFacts, padding: float) -> int:
    """Vocabulary size of the model that this key names."""
    size, entries = read_shape(Path(folder))["vocab_size"], facts.vocab_size
    if entries <= size <= entries * (1 + padding):
        return size
    from gpt2lab.data.tokenizer import difference_in_words, load_tokenizer

    different = difference_in_words(Path(folder), load_tokenizer(facts.tokenizer_folder))
    other_way = ", or distil between tokenizers: loss=uld" if key == "teacher" else ""
    raise InputError(
        f"{key}={folder} has a vocabulary of {size} entries, the tokenizer of this run {entries}; "
        f"they must be the same.{different}\n"
        "Leave tokenizer=auto, which takes the teacher's or init's, or name weights trained with this tokenizer"
        f"{other_way}."
    )


def _check_cut_out(config: Config, facts: DataFacts) -> None:
    """A student that is cut out of its teacher has its embeddings, which mean the teacher's tokens."""
    if config.init != TEACHER_LAYERS:
        return
    from gpt2lab.data.tokenizer import difference_in_words, load_tokenizer

    different = difference_in_words(Path(config.teacher), load_tokenizer(facts.tokenizer_folder))
    if different:
        raise InputError(
            "init=teacher_layers gives the student its teacher's embeddings, and they have not the same tokenizer."
            f"{different}\nUse init=scratch, or leave tokenizer=auto, which takes the teacher's."
        )
