"""Train a GPT-2: pretrain, distil or fine-tune it, as conf/ and the command line say. README shows the commands.

python train.py                                                    python train.py task=distill model=small
"""

import os
import sys

os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors, and launch.exit_codes tells them in a few lines

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from launch import exit_codes
from launch.checks import checks
from launch.config import cli_overrides, schema
from launch.config.groups import CONF
from launch.config.help_text import help_text

schema.register()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def main(tree: DictConfig) -> float | None:
    """One run, or a study of many: check what was composed, then train. Returns the watched metric of one run."""
    with exit_codes.ending_in_a_code():
        config = schema.from_hydra(tree, HydraConfig.get(), command=cli_overrides.command())
        checks.check(config)
        if config.is_study:
            from launch.sweep.distill_study import run_study

            run_study(config)
            return None
        if config.launcher.name != "processes" and not config.plan:
            from launch.sweep import remote_run

            return remote_run.run(config)
        from launch.run import job  # torch, lightning and transformers are imported only now

        return job.run(config)["watched"]


def command_line() -> None:
    """Hand Hydra the command line, made readable for it."""
    if {"--help", "-h"} & set(sys.argv):
        print(help_text())
        return
    sys.argv[1:] = cli_overrides.readable_by_hydra(sys.argv[1:])
    main()


if __name__ == "__main__":
    exit_codes.end(command_line)
