"""ClusterTask: a run as it is handed to SLURM or Ray, and the process that it becomes on the machine it is given."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from launch.config import machine, run_spec
from launch.config.schema import RunConfig
from launch.sweep.job_process import JobProcess


@dataclass
class ClusterTask:
    """Plain text and paths, so that it can be pickled; the folders are ones that all machines see.

    Attributes:
        config: a checked configuration, as YAML.
        folder: the working directory.
        output: file for what it prints.
        errors: file for its stderr, which may be the same.
        allow_targets: permissions of who submits it, which a configuration as YAML does not hold.
    """

    config: str
    folder: str
    output: str
    errors: str
    allow_targets: list[str]

    @classmethod
    def from_config(cls, config: RunConfig, output: Path, errors: Path) -> Self:
        """Return the task of a run in this working directory."""
        files = str(output.absolute()), str(errors.absolute())
        return cls(run_spec.to_yaml(config), str(Path.cwd()), *files, config.allow_targets)

    def start(self, rank: int = 0, is_requeued: bool = False) -> JobProcess:
        """Start it on this machine.

        Args:
            rank: of this process among those that were started for the same run; each but the first has its own file.
            is_requeued: whether the run was started before, and resumes from its last checkpoint.
        """
        os.chdir(self.folder)
        config = run_spec.from_yaml(RunConfig, self.config, "of this job")
        threads = config.threads
        if threads == "auto":  # of the machine this run has only what it requested
            threads = min(config.launcher.cpus, len(machine.usable_cores()))
        resume = "auto" if is_requeued and config.resume is None else config.resume
        config = replace(config, allow_targets=self.allow_targets, threads=threads, resume=resume)
        files = [Path(file) for file in (self.output, self.errors)]
        if rank:
            files = [file.with_name(f"{file.stem}-rank-{rank}{file.suffix}") for file in files]
        return JobProcess(config, output=files[0], errors=files[1])
