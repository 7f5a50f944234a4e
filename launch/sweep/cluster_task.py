"""ClusterTask: a run in the picklable form that is submitted to SLURM or Ray; starts its process on the worker."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from launch.config import machine
from launch.config.schema import RunConfig
from launch.sweep.job_process import JobProcess


@dataclass
class ClusterTask:
    """A submitted run; all paths must be on a file system shared by all machines.

    Attributes:
        config: a checked configuration.
        output: file for stdout.
        errors: file for stderr; may be the same as `output`.
        folder: the working directory.
    """

    config: RunConfig
    output: Path
    errors: Path
    folder: Path = field(default_factory=Path.cwd)

    def start(self, rank: int = 0, is_requeued: bool = False) -> JobProcess:
        """Start the run on this machine.

        Args:
            rank: index among the processes that the cluster started for this run; ranks above 0 have their own files.
            is_requeued: whether the run was started before and resumes from its last checkpoint.
        """
        os.chdir(self.folder)
        config, threads = self.config, self.config.threads
        if threads == "auto":  # the cores that the job requested, not all of the machine
            threads = min(config.launcher.cpus, len(machine.usable_cores()))
        resume = "auto" if is_requeued and config.resume is None else config.resume
        config = replace(config, threads=threads, resume=resume)
        files = [self.output, self.errors]
        if rank:
            files = [file.with_name(f"{file.stem}-rank-{rank}{file.suffix}") for file in files]
        return JobProcess(config, output=files[0], errors=files[1])
