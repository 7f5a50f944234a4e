"""W&B merge: makes one offline W&B run of the folders that a run left, which was killed and resumed.

    python -m launch.commands.wandb_merge runs/pretrain/nano …        or        make wandb-merge RUN=runs/pretrain/nano

Training does this itself when a run ends or is stopped; a run that was killed and not resumed needs the command. Its
rows are those of metrics.csv and samples.jsonl. Then `wandb sync RUN_DIR/wandb/offline-run-*` uploads it.
"""

import sys
from contextlib import closing
from pathlib import Path

from gpt2lab.errors import InputError
from gpt2lab.storage.utf8 import check_process
from launch import logging_setup
from launch.config import run_spec
from launch.config.run_dir import RunDirectory
from launch.exit_codes import run_and_exit

WANDB = "callbacks.loggers.wandb.WeightsAndBiases"


def merge(folder: Path) -> bool:
    """Merge the offline runs of a run directory; return whether there was anything to merge.

    Raises:
        InputError: there is no run, it has no offline W&B run, or another process uses it.
    """
    spec = run_spec.load(folder / "config.yaml")
    if not list((folder / "wandb").glob("offline-run-*")):
        raise InputError(f"{folder}/wandb has no offline run.\nGive the directory of a run with logger=wandb.")
    nodes = [node for node in spec.config.logger_nodes.values() if node["_target_"] == WANDB]
    from callbacks.loggers.wandb import WeightsAndBiases
    from launch.config.targets import instantiate
    from launch.run.labels import run_labels, searchable_values

    with closing(RunDirectory()) as directory:
        directory.open(folder)
        node = {**nodes[0], "run_dir": str(folder)} if nodes else {"_target_": WANDB, "run_dir": str(folder)}
        logger = instantiate(node, "logger", [], folder)
        assert isinstance(logger, WeightsAndBiases)
        logger.set_labels(run_labels(spec, folder))
        return logger.merge_offline_runs(searchable_values(spec))


def _program(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    check_process(arguments)
    if not arguments:
        raise InputError("Give run directories: python -m launch.commands.wandb_merge runs/pretrain/nano")
    logging_setup.configure_logging()
    for given in arguments:
        folder = Path(given).expanduser()
        logging_setup.announce(f"Reading {folder}/wandb")
        merged = "merged" if merge(folder) else "one complete run already"
        print(f"{folder}/wandb: {merged}; upload it with: wandb sync {folder}/wandb/offline-run-*", flush=True)


if __name__ == "__main__":
    run_and_exit(lambda: _program(sys.argv[1:]))
