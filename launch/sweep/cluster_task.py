"""ClusterTask: a run in the picklable form that is submitted to SLURM or Ray; starts its process on the worker."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from launch.config import machine, run_spec
from launch.config.schema import RunConfig
from launch.sweep.job_process import JobProcess


@dataclass
class ClusterTask:
    """A submitted run; all paths must be on a file system shared by all machines.

    Attributes:
        config: a checked configuration, as YAML.
        folder: the working directory.
        output: file for stdout.
        errors: file for stderr; may be the same as `output`.
        allow_targets: the user's permissions, which the YAML does not contain.
    """

    config: str
    folder: str
    output: str
    errors: str
    allow_targets: list[str]

    @classmethod
    def from_config(cls, config: RunConfig, output: Path, errors: Path) -> Self:
        """Create the task of a run in the current working directory."""
        files = str(output.absolute()), str(errors.absolute())
        return cls(run_spec.to_yaml(config), str(Path.cwd()), *files, config.allow_targets)

    def start(self, rank: int = 0, is_requeued: bool = False) -> JobProcess:
        """Start the run on this machine.

        Args:
            rank: index among the processes that the cluster started for this run; ranks above 0 have their own files.
            is_requeued: whether the run was started before and resumes from its last checkpoint.
        """
        os.chdir(self.folder)
        config = run_spec.from_yaml(RunConfig, self.config, "of this job")
        threads = config.threads
        if threads == "auto":  # the cores that the job requested, not all of the machine
            threads = min(config.launcher.cpus, len(machine.usable_cores()))
        resume = "auto" if is_requeued and config.resume is None else config.resume
        config = replace(config, allow_targets=self.allow_targets, threads=threads, resume=resume)
        files = [Path(file) for file in (self.output, self.errors)]
        if rank:
            files = [file.with_name(f"{file.stem}-rank-{rank}{file.suffix}") for file in files]
        return JobProcess(config, output=files[0], errors=files[1])
