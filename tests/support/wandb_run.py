"""A W&B run of a few rows in a separate process: python tests/support/wandb_run.py RUN_DIR SECONDS [stop | resume].

SECONDS limits each wait for the server and for W&B's service. `stop` suspends the service after the first row; `resume`
resumes a run after its first step.
"""

import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil

from callbacks.loggers import bounded_calls, wandb
from callbacks.loggers.protocols import RunLabels
from gpt2lab.reports.samples_jsonl import Sample

if __name__ == "__main__":
    logging.basicConfig(level="INFO", format="%(message)s")
    seconds = int(sys.argv[2])
    wandb.INIT_SECONDS = wandb.FINISH_SECONDS = seconds
    wandb.UPLOAD_SECONDS = 2 * seconds
    bounded_calls.EXIT_SECONDS = float(seconds)
    logger = wandb.WeightsAndBiases(sys.argv[1])
    completed = int(sys.argv[3:] == ["resume"])
    logger.set_labels(RunLabels("run", completed=completed))
    logger.log_hyperparams({"seed": 1})
    for step in range(completed + 1, 300):
        logger.log_metrics({"train/loss": 5 / step}, step)
        if "WANDB_BASE_URL" not in os.environ:  # the stand-in knows no artifacts
            logger.log_samples([Sample(step, "def f(", "x" * 100, "greedy")], step)
        if sys.argv[3:] == ["stop"] and step == 2:
            for child in psutil.Process().children():
                child.suspend()
    logger.finalize("success")
    print("finished", flush=True)
