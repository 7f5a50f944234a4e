"""Stages of the demo: the command, title and usual time of each, in order; and what the reader's text needs."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from gpt2lab.errors import InputError
from gpt2lab.storage.atomic_files import write_json
from gpt2lab.storage.report_json import is_finished, read_report
from launch.distributed.child_processes import IS_CHECKOUT

TEACHER, SCRATCH, DISTILLED, FROM_LAYERS = "teacher", "scratch", "distilled", "from_layers"
FINETUNED, SCORES = "finetuned", "scores"
RUNNING_TEXT = (TEACHER, SCRATCH, DISTILLED, FROM_LAYERS)  # their losses are on the same targets
TRAINED = (*RUNNING_TEXT, FINETUNED)
STUDENTS = (DISTILLED, FROM_LAYERS)
UNVERIFIED = "callbacks.checkpoint.verify_export=false"  # saves seconds; the other two models are verified
LOGGED_EVERY = 5  # steps
PLAN, SCORES_FILE = "demo.json", "scores.json"


@dataclass(frozen=True)
class Sizes:
    """Models and lengths of a demo.

    Attributes:
        name: its folder in runs/, and its make target.
        teacher, student: keys of the two models.
        steps: optimizer steps of teacher, students and fine-tuning.
        shared: further keys of every training; those of running text.
        texts: validation pairs whose summaries are scored.
        characters: least text that it can train on.
        seconds: usual time of each stage by name, and of one of its first steps.
    """

    name: str
    teacher: tuple[str, ...]
    student: tuple[str, ...]
    steps: tuple[int, int, int]
    shared: tuple[str, ...]
    running_text: tuple[str, ...]
    finetuning: tuple[str, ...]
    texts: int
    characters: int
    seconds: dict[str, tuple[float, float]]


# (seconds of the stage, of one of its first steps) on two idle CPU cores with bf16 instructions. Only their ratios
# matter: the estimate scales them by what it measures.
FULL = Sizes(
    name="demo",
    teacher=("model=micro",),
    student=("model=nano",),
    steps=(240, 160, 400),
    shared=(),
    running_text=(),
    finetuning=(),
    texts=400,
    characters=200_000,
    seconds={
        TEACHER: (154, 0.53),
        SCRATCH: (38, 0.15),
        DISTILLED: (84, 0.32),
        FROM_LAYERS: (83, 0.32),
        FINETUNED: (52, 0.087),
        SCORES: (11, 0),
    },
)
QUICK = Sizes(
    name="demo-quick",
    teacher=("model=nano", UNVERIFIED),
    student=("model=nano", "model.n_layer=1", "model.n_embd=64", "model.n_head=1"),
    steps=(40, 30, 30),
    shared=("context=128", "callbacks.samples.max_new_tokens=24", "callbacks.final_score=null", "logger=csv"),
    running_text=("batch_tokens=1024", "validate_tokens=8192"),
    finetuning=(
        *("batch_sequences=8", "validate_tokens=8192", UNVERIFIED),
        *("task.text.examples=16", "task.text.max_new_tokens=24"),
    ),
    texts=16,
    characters=40_000,
    seconds={
        TEACHER: (14, 0.1),
        SCRATCH: (9, 0.02),
        DISTILLED: (10, 0.03),
        FROM_LAYERS: (10, 0.03),
        FINETUNED: (12, 0.04),
        SCORES: (11, 0),
    },
)


@dataclass(frozen=True)
class Stage:
    """One command of the demo.

    Attributes:
        name: name of its run directory.
        title: heading on the terminal.
        program: train or evaluate.
        arguments: arguments of the program.
        steps: optimizer steps; 0 for evaluate.
        seconds: usual time of the whole stage.
        step_seconds: usual time of one step.
    """

    name: str
    title: str
    program: str
    arguments: tuple[str, ...]
    steps: int
    seconds: float
    step_seconds: float

    @property
    def command(self) -> list[str]:
        """Arguments of the Python interpreter."""
        program = [f"{self.program}.py"] if IS_CHECKOUT else ["-m", f"gpt2lab_scripts.{self.program}"]
        return [*program, *self.arguments]

    def is_done(self, whole: Path) -> bool:
        """Whether it is finished in the demo's folder `whole`."""
        return (whole / SCORES_FILE).is_file() if self.name == SCORES else is_finished(read_report(whole / self.name))


def stages(folder: Path, sizes: Sizes, data: tuple[str, ...], start: str = FROM_LAYERS) -> list[Stage]:
    """Return the commands; the students differ only in the teacher and in the initial weights.

    Args:
        folder: parent of the run directories.
        data: keys of the text that teacher and students are trained on.
        start: student that is fine-tuned.
    """
    text, lengths = (*sizes.shared, *sizes.running_text), [_lengths(steps) for steps in sizes.steps]
    teacher = (*sizes.teacher, *data, *text, *lengths[0])
    student = (*sizes.student, *data, *text, *lengths[1], UNVERIFIED)
    distill = ("task=distill", *student, f"teacher={folder / TEACHER}", f"baseline={folder / SCRATCH}")
    finetune = ("task=finetune", "data=summarize", f"init={folder / start}", *sizes.shared, *sizes.finetuning)
    scores = (f"checkpoint={folder / FINETUNED}", f"texts={sizes.texts}", f"json={folder / SCORES_FILE}")
    given = [
        (TEACHER, "Training a tokenizer, then pretraining a teacher", ("task=pretrain", *teacher), sizes.steps[0]),
        (
            SCRATCH,
            "Training a student without the teacher, to compare with",
            ("task=pretrain", *student),
            sizes.steps[1],
        ),
        (DISTILLED, "Distilling the teacher into the same student, on the same batches", distill, sizes.steps[1]),
        (
            FROM_LAYERS,
            "Distilling it into a student that starts with layers of the teacher",
            (*distill, "init=teacher_layers"),
            sizes.steps[1],
        ),
        (
            FINETUNED,
            f"Fine-tuning the best student ({start}): Python function to summary line",
            (*finetune, *lengths[2]),
            sizes.steps[2],
        ),
    ]
    trained = [
        Stage(name, title, "train", (*keys, f"run_dir={folder / name}", "resume=auto"), steps, *sizes.seconds[name])
        for name, title, keys, steps in given
    ]
    title = "Scoring its summaries against the function's first words"
    return [*trained, Stage(SCORES, title, "evaluate", scores, 0, *sizes.seconds[SCORES])]


def _lengths(steps: int) -> tuple[str, ...]:
    half = steps // 2
    often = (f"validate_every={half}", f"checkpoint_every={half}", f"sample_every={steps}")
    return (f"steps={steps}", *often, f"log_every={LOGGED_EVERY}")


def demo_command(sizes: Sizes, data: tuple[str, ...]) -> str:
    """Return the command that starts or continues this demo."""
    path = next((shlex.quote(word.removeprefix("path=")) for word in data if word.startswith("path=")), "")
    if IS_CHECKOUT:
        return f"make {sizes.name}" + (f" DATA={path}" if path else "")
    quick = " quick=true" if sizes.name == QUICK.name else ""
    return f"python -m launch.commands.demo{quick}" + (f" path={path}" if path else "")


def best_student(whole: Path) -> str:
    """Return the student with the lowest loss in the demo's folder `whole`; before there is one, FROM_LAYERS."""
    losses = {name: read_report(whole / name).get("val_loss") for name in STUDENTS}
    known = {name: loss for name, loss in losses.items() if loss is not None}
    return min(known, key=known.__getitem__) if known else FROM_LAYERS


def choose_folder(home: Path, sizes: Sizes, data: tuple[str, ...], identity: str) -> Path:
    """Return the folder of the demo with these sizes and this text, relative to `home`; created if there is none.

    Args:
        identity: hash of the reader's text; empty for the standard library.
    """
    for number in range(1, 1000):
        folder = Path("runs") / (sizes.name if number == 1 else f"{sizes.name}-{number}")
        plan = {"commands": [stage.command for stage in stages(folder, sizes, data)], "text": identity}
        file = home / folder / PLAN
        if not (home / folder).exists():
            (home / folder).mkdir(parents=True)
            write_json(file, plan)
            return folder
        try:
            if json.loads(file.read_text(encoding="utf-8")) == plan:
                return folder
        except (OSError, ValueError):
            continue
    raise InputError(f"{home / 'runs'} contains a thousand demos.\nRemove some.")


def read_text(path: str, sizes: Sizes) -> str:
    """Check that the reader's text is long enough, before anything is trained; return its hash.

    Raises:
        InputError: no such path, no readable text, or too little.
    """
    from datamodules.documents import text_corpus

    corpus, characters = text_corpus(path, "", "text", "stop"), 0
    for document in corpus.documents():
        characters += len(document.text)
        if characters >= sizes.characters:
            return str(corpus.identity["files"])
    smaller = f", or make {QUICK.name} with {QUICK.characters:,}" * (QUICK.characters <= characters)
    raise InputError(
        f"DATA={path} has {characters:,} characters of text; make {sizes.name} needs {sizes.characters:,} or more.\n"
        f"Give a folder with more text{smaller}."
    )
