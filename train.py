"""Train a GPT-2: pretrain, distil or fine-tune it, as conf/ and the command line say. README shows the commands.

python train.py                                                    python train.py task=distill model=small
"""

import os
import sys

os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors, and launch.answer tells them in a few lines

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from launch import answer
from launch.configuration import arguments, checks, config, recorded_command
from launch.configuration.groups import CONF
from launch.configuration.help_text import help_text

config.register()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
def main(tree: DictConfig) -> float | None:
    """One run, or a study of many: check what was composed, then train. Returns the watched metric of one run."""
    with answer.ending_in_a_code():
        settings = config.typed(tree, HydraConfig.get(), command=arguments.command())
        recorded_command.put_values_in_place(settings)
        checks.check(settings)
        if settings.is_study:
            from launch.studying.study import run_study

            run_study(settings)
            return None
        if settings.launcher.name != "processes" and not settings.plan:
            from launch.running import elsewhere

            return elsewhere.run(settings)
        from launch.running.job import run_job  # torch, lightning and transformers are imported only now

        return run_job(settings)["watched"]


def command_line() -> None:
    """Hand Hydra the command line, made readable for it."""
    if {"--help", "-h"} & set(sys.argv):
        print(help_text())
        return
    sys.argv[1:] = arguments.readable_by_hydra(sys.argv[1:])
    main()


if __name__ == "__main__":
    answer.end(command_line)
