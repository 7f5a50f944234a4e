"""Student shape: allowed sizes of a student initialized from a teacher, and the teacher layers that it keeps.

Imports no torch, so that a size that does not fit is reported before slow imports.
"""

from typing import Any

from gpt2lab.errors import InputError
from gpt2lab.settings import ModelShape

TEACHER_LAYERS = "teacher_layers"  # value of init
SIZES = ("n_layer", "n_embd", "n_positions", "vocab_size")


def kept_layers(teacher_layers: int, student_layers: int) -> list[int]:
    """Evenly spaced teacher layers including first and last: 12 → 6 gives 0, 2, 4, 7, 9, 11, as in DistilGPT-2.

    A student of one layer keeps the first, the only one trained on embeddings as input.
    """
    if student_layers == 1:
        return [0]
    return [round(number * (teacher_layers - 1) / (student_layers - 1)) for number in range(student_layers)]


def check_fits(teacher: ModelShape, student: ModelShape) -> None:
    """Check that the student can be initialized from the teacher: no larger size, heads of the same width.

    Raises:
        InputError: a size is larger or the heads differ.
    """
    for name in SIZES:
        size, limit = vars(student)[name], vars(teacher)[name]
        if size > limit:
            fix = "" if name == "vocab_size" else f"Set model.{name}={limit} or less, or use a larger teacher; "
            raise InputError(
                f"init=teacher_layers needs {name} no larger than the teacher's {limit}; the student has {size}.\n"
                f"{fix}init=scratch allows any size."
            )
    head = teacher.n_embd // teacher.n_head
    if student.n_embd != student.n_head * head:
        heads = min(max(round(student.n_embd / head), 1), teacher.n_head)
        raise InputError(
            f"init=teacher_layers keeps whole heads; the teacher's have {head} channels, those of the student "
            f"{student.n_embd / student.n_head:g} (model.n_embd={student.n_embd}, model.n_head={student.n_head}).\n"
            f"Nearest that fits: model.n_embd={heads * head} model.n_head={heads}; init=scratch allows any size."
        )


def describe_pruning(teacher: ModelShape, student: ModelShape) -> dict[str, Any]:
    """Return the report's entry on the layers and channels kept."""
    narrower = student.n_embd < teacher.n_embd
    return {
        "kind": "narrowed by activation importance" if narrower else "copied",
        "layers": kept_layers(teacher.n_layer, student.n_layer),
        "of_layers": teacher.n_layer,
        "channels": student.n_embd,
        "of_channels": teacher.n_embd,
    }
