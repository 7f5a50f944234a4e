"""Side files: everything in a run directory but its configuration and checkpoints, repaired before a run continues.

Checkpoints alone decide from where a run continues. Of a damaged side file the valid part is kept, the file itself is
renamed to `<name>.damaged`, and one warning names what is lost.
"""

import logging
from pathlib import Path

from gpt2lab.evaluation.document_losses import repair_document_losses
from gpt2lab.reports.run_report import repair_report
from gpt2lab.reports.samples_jsonl import repair_samples
from gpt2lab.storage.checkpoint_ledger import checkpoint_files, step_of
from gpt2lab.storage.damaged_files import is_no_folder, set_aside
from gpt2lab.storage.metrics_csv import missing_steps, repair_metrics

FOLDERS = ("logs", "wandb", "tensorboard", "inspect")

log = logging.getLogger(__name__)


def repair(run_dir: Path) -> None:
    """Repair what a run that continues would read or append to; called once, by its first process."""
    step = max(map(step_of, checkpoint_files(run_dir)), default=0)
    if not repair_metrics(run_dir, step) and (missing := missing_steps(run_dir, step)):
        log.warning(
            "%s has no rows of steps %d to %d; checkpoints do not hold them.", run_dir / "metrics.csv", *missing
        )
    repair_samples(run_dir, step)
    repair_report(run_dir)
    repair_document_losses(run_dir)
    for path in (run_dir / name for name in FOLDERS):
        if is_no_folder(path):
            log.warning("%s is no folder. It was renamed to %s.", path, set_aside(path).name)
