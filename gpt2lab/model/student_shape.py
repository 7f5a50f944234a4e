"""Student shape: which sizes a student may have that is cut out of a teacher, and which of its layers it takes over.

Needs no torch, so that a size that does not fit is told before anything heavy is imported.
"""

from typing import Any

from gpt2lab.errors import InputError
from gpt2lab.settings import ModelShape

TEACHER_LAYERS = "teacher_layers"  # the value of init that asks for such a student
SIZES = ("n_layer", "n_embd", "n_positions", "vocab_size")


def kept_layers(teacher_layers: int, student_layers: int) -> list[int]:
    """Evenly spaced numbers of the teacher's layers, first and last among them: 12 → 6 gives 0, 2, 4, 7, 9, 11.

    These are DistilGPT-2's. A single layer is the first, the only one that has ever read embeddings.
    """
    if student_layers == 1:
        return [0]
    return [round(number * (teacher_layers - 1) / (student_layers - 1)) for number in range(student_layers)]


def check_fits(teacher: ModelShape, student: ModelShape) -> None:
    """Whether the student can be cut out of the teacher: no size above its own, heads of the same width.

    Raises:
        InputError: it cannot.
    """
    for name in SIZES:
        wanted, there = vars(student)[name], vars(teacher)[name]
        if wanted > there:
            cure = "" if name == "vocab_size" else f"Set model.{name}={there} or less, or name a larger teacher; "
            raise InputError(
                f"init=teacher_layers cuts the student out of the teacher, which has only {name}={there} "
                f"of the student's {wanted}.\n{cure}init=scratch takes any size."
            )
    head = teacher.n_embd // teacher.n_head
    if student.n_embd != student.n_head * head:
        heads = min(max(round(student.n_embd / head), 1), teacher.n_head)
        raise InputError(
            f"init=teacher_layers keeps whole heads; the teacher's have {head} channels, those of the student "
            f"{student.n_embd / student.n_head:g} (model.n_embd={student.n_embd}, model.n_head={student.n_head}).\n"
            f"Nearest that fits: model.n_embd={heads * head} model.n_head={heads}; init=scratch takes any size."
        )


def what_is_kept(teacher: ModelShape, student: ModelShape) -> dict[str, Any]:
    """What the report says of such a student."""
    narrower = student.n_embd < teacher.n_embd
    return {
        "kind": "narrowed by activation importance" if narrower else "copied",
        "layers": kept_layers(teacher.n_layer, student.n_layer),
        "of_layers": teacher.n_layer,
        "channels": student.n_embd,
        "of_channels": teacher.n_embd,
    }
