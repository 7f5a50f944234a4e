"""ClusterTask: a run as it is handed to SLURM or Ray, and the process that it becomes on the machine it is given."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from launch.config import machine, schema
from launch.config.schema import Config
from launch.sweep.job_process import JobProcess


@dataclass
class ClusterTask:
    """Plain text and paths, so that it can be pickled; the folders are ones that all machines see.

    Attributes:
        settings: a checked configuration, as YAML.
        folder: the working directory.
        output: file for what it prints.
        errors: file for its stderr, which may be the same.
        allow_targets: permissions of who submits it, which a configuration as YAML does not hold.
    """

    settings: str
    folder: str
    output: str
    errors: str
    allow_targets: list[str]

    @classmethod
    def of(cls, settings: Config, output: Path, errors: Path) -> Self:
        """For a run of this working directory."""
        files = str(output.absolute()), str(errors.absolute())
        return cls(schema.dumped(settings), str(Path.cwd()), *files, settings.allow_targets)

    def start(self, rank: int = 0, goes_on: bool = False) -> JobProcess:
        """Start it on this machine.

        Args:
            rank: of this process among those that were started for the same run; each but the first has its own file.
            goes_on: the run was begun before, and is to go on from its last checkpoint.
        """
        os.chdir(self.folder)
        settings = schema.parsed(self.settings, "handed over")
        settings.allow_targets = self.allow_targets
        if settings.threads == "auto":  # of the machine this run has only what it asked for
            settings.threads = min(settings.launcher.cpus, len(machine.usable_cores()))
        if goes_on and settings.resume is None:
            settings.resume = "auto"
        files = [Path(file) for file in (self.output, self.errors)]
        if rank:
            files = [file.with_name(f"{file.stem}-rank-{rank}{file.suffix}") for file in files]
        return JobProcess(settings, output=files[0], errors=files[1])
