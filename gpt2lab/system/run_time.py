"""Run time: how often a run validates, samples and saves, and what a forward pass costs beside a training step."""


def count_events(first: int, last: int, every: int) -> int:
    """Return the number of events after step `first`: every `every` steps, and after step `last`."""
    return max(-(-last // every) - first // every, 0) if first < last else 0


def forward_share(student: float, teacher: float = 0.0) -> float:
    """Return the cost of forward passes of student and teacher, as a share of a training step on the same tokens.

    A backward pass costs two forward passes.

    Args:
        student: parameters, or FLOP per token.
        teacher: the same of a teacher that runs at every step; 0: there is none.
    """
    return (student + teacher) / (3 * student + teacher)
