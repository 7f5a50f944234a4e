"""Side files: all files of a run directory except configuration and checkpoints, repaired when a run is resumed.

A run is resumed from its checkpoints only. A damaged side file is renamed to `<name>.damaged`, its valid part is kept,
and one warning names what is lost.
"""

import logging
from pathlib import Path

from gpt2lab.evaluation.document_losses import repair_document_losses
from gpt2lab.reports.samples_jsonl import repair_samples
from gpt2lab.storage.checkpoint_ledger import checkpoint_files, checkpoint_step
from gpt2lab.storage.damaged_files import is_not_folder, is_unreadable, set_aside
from gpt2lab.storage.metrics_csv import missing_steps, repair_metrics
from gpt2lab.storage.report_json import repair_report

FOLDERS = ("checkpoints", ".hydra", "logs", "wandb", "tensorboard", "lightning", "inspect")

log = logging.getLogger(__name__)


def repair(run_dir: Path) -> None:
    """Repair the files that a resumed run reads or appends to; called once, by its first process."""
    step = max(map(checkpoint_step, checkpoint_files(run_dir)), default=0)
    if not repair_metrics(run_dir, step) and (missing := missing_steps(run_dir, step)):
        log.warning(
            "%s has no rows for steps %d to %d; checkpoints do not contain them.", run_dir / "metrics.csv", *missing
        )
    repair_samples(run_dir, step)
    repair_report(run_dir)
    repair_document_losses(run_dir)
    if is_unreadable(page := run_dir / "report.html"):
        log.warning("%s is not a file that can be read. It was renamed to %s.", page, set_aside(page).name)
    for path in (run_dir / name for name in FOLDERS):
        if is_not_folder(path):
            log.warning("%s is not a folder. It was renamed to %s.", path, set_aside(path).name)
