"""Document losses: the last validation of a run by document, stored beside its report to compare runs.

    val_documents.json    {"data": hash of the data, "group": […], "nats": […], "targets": […]}

The three lists have one item per document group (document_groups.py). Runs with the same validation targets are
compared document by document: the difficulty of a document, common to both, cancels in the difference.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2lab.storage.atomic_files import write_json
from gpt2lab.storage.damaged_files import read_file, set_aside, warn_once

if TYPE_CHECKING:  # reports are read without importing torch; functions that compute import it
    from torch import Tensor

    from gpt2lab.evaluation.jackknife import DocumentDifference

FILE = "val_documents.json"


@dataclass(frozen=True)
class DocumentLosses:
    """Loss sums in nats and target counts of each document group with a target, in ascending order of group."""

    group: list[int]
    nats: list[float]
    targets: list[int]
    data: str = ""

    @staticmethod
    def of(nats: "Tensor", targets: "Tensor") -> "DocumentLosses":
        """Create from sums (G,) over the whole split, where some groups may have no target."""
        kept = (targets > 0).nonzero().squeeze(1)
        counts = targets[kept].round().long()
        return DocumentLosses(kept.tolist(), nats[kept].double().tolist(), counts.tolist())

    @property
    def standard_error(self) -> float | None:
        """Standard error of the mean loss between documents; None for one document or a loss that is not finite."""
        if not all(map(math.isfinite, self.nats)):
            return None
        import torch

        from gpt2lab.evaluation.jackknife import mean_error

        return mean_error(torch.tensor(self.nats, dtype=torch.float64), torch.tensor(self.targets))

    def same_targets(self, other: "DocumentLosses") -> bool:
        """Return whether both have the same targets of the same data."""
        mine, theirs = (self.data, self.group, self.targets), (other.data, other.group, other.targets)
        return mine == theirs


def write_document_losses(run_dir: str | Path, losses: DocumentLosses) -> None:
    write_json(Path(run_dir) / FILE, asdict(losses))


def read_document_losses(run_dir: str | Path) -> DocumentLosses | None:
    """Read a run's last validation; None if there is none, or with a warning if the file is damaged."""
    path = Path(run_dir) / FILE
    if not os.path.lexists(path):
        return None
    try:
        losses = DocumentLosses(**json.loads(read_file(path)))
        rows = list(zip(losses.group, losses.nats, losses.targets, strict=True))
        if not all(type(group) is type(targets) is int and type(nats) in (int, float) for group, nats, targets in rows):
            raise TypeError("not numbers")
    except (OSError, ValueError, TypeError, RecursionError):
        warn_once(f"{path} is damaged: the standard error of val/loss is unknown until the next validation.")
        return None
    return losses


def repair_document_losses(run_dir: str | Path) -> None:
    """Set a damaged file aside; `read_document_losses` logs the warning."""
    path = Path(run_dir) / FILE
    if os.path.lexists(path) and read_document_losses(run_dir) is None:
        set_aside(path)


def mean_losses(runs: Sequence[DocumentLosses | None]) -> DocumentLosses | None:
    """Average runs, such as the seeds of a setting, by document; None unless all have the same targets."""
    known = [run for run in runs if run is not None]
    if not known or len(known) < len(runs) or not all(run.same_targets(known[0]) for run in known):
        return None
    first = known[0]
    nats = [sum(values) / len(known) for values in zip(*(run.nats for run in known), strict=True)]
    return DocumentLosses(first.group, nats, first.targets, first.data)


def loss_difference(first: DocumentLosses | None, second: DocumentLosses | None) -> "DocumentDifference | None":
    """Return first − second in nats per target, paired by document; None unless both have the same targets."""
    if first is None or second is None or not first.same_targets(second):
        return None
    if not all(map(math.isfinite, first.nats + second.nats)):
        return None
    import torch

    from gpt2lab.evaluation.jackknife import paired_mean_difference

    ours, theirs = (torch.tensor(one.nats, dtype=torch.float64) for one in (first, second))
    return paired_mean_difference(ours, theirs, torch.tensor(first.targets))


def share_of_gap(
    student: DocumentLosses | None, scratch: DocumentLosses | None, teacher: DocumentLosses | None
) -> tuple[float, float | None] | None:
    """Return (share of the gap between scratch and teacher that the student closes, its error between documents).

    None unless all have the same targets and the teacher is better than scratch.
    """
    if student is None or scratch is None or teacher is None:
        return None
    if not (student.same_targets(scratch) and student.same_targets(teacher)):
        return None
    import torch

    from gpt2lab.evaluation.distillation_metrics import gap_closed
    from gpt2lab.evaluation.jackknife import TOKENS, Figures, Sums, standard_errors, total

    named = {"scratch": scratch, "student": student, "teacher": teacher}
    sums = {name: torch.tensor(one.nats, dtype=torch.float64) for name, one in named.items()}
    sums[TOKENS] = torch.tensor(student.targets)

    def share(found: Sums) -> Figures:
        closed = gap_closed(*((found[name] / found[TOKENS]).item() for name in named))
        return {} if closed is None else {"share": closed}

    whole = share(total(sums)).get("share")
    return None if whole is None else (whole, standard_errors(sums, share).get("share"))
