"""Train a GPT-2: pretrain, distill or fine-tune, with the configuration of conf/ and the command line.

python train.py                                                    python train.py task=distill model=small
"""

import os
import sys
from typing import NoReturn

os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors, which launch.exit_codes prints in a few lines

from launch import exit_codes

if __name__ == "__main__":
    exit_codes.exit_on_early_signal()
    exit_codes.exit_without_packages()

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from launch.checks import checks
from launch.config import cli_overrides, schema
from launch.config.groups import CONF
from launch.config.help_text import help_text
from launch.logging_setup import announce
from launch.version import version_text

schema.register()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def main(tree: DictConfig) -> float | None:
    """Check the configuration, then train one run or a study; return the watched metric of a single run."""
    with exit_codes.exit_on_error():
        config = schema.from_hydra(tree, HydraConfig.get(), command=cli_overrides.shell_command())
        checks.check(config)
        announce(f"Loading PyTorch to {'plan' if config.plan else 'start'} task={config.task_name}")
        if config.is_study:
            from launch.sweep.distill_study import run_study

            run_study(config)
            return None
        if config.launcher.name != "processes" and not config.plan:
            from launch.sweep import remote_run

            return remote_run.run(config)
        from launch.run import job  # imports torch, lightning and transformers

        return job.run(config)["watched"]


def command_line() -> None:
    """Run `main` through Hydra, with free text on the command line quoted."""
    if {"--help", "-h"} & set(sys.argv):
        print(help_text(sys.argv[1:]))
        return
    if "--version" in sys.argv:
        print(version_text())
        return
    sys.argv[1:] = cli_overrides.quote_free_text(sys.argv[1:])
    main()


def run() -> NoReturn:
    """Run the command line and exit with its exit code."""
    exit_codes.run_and_exit(command_line)


if __name__ == "__main__":
    run()
