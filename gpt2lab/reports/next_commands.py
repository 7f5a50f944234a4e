"""Next commands: what can be done with a run after it has ended, as commands to paste."""

import shlex
from typing import Any

from gpt2lab.storage.report_json import is_finished

LONGER = "train longer"


def next_commands(report: dict[str, Any], folder: str, has_export: bool) -> dict[str, str]:
    """Return {what it does: command} for a run that has ended.

    Args:
        report: its `status`, and in `uses` the commands that the exported model of a finished run permits.
        folder: the run directory as typed in commands.
        has_export: whether it contains an exported model.
    """
    status, commands = report.get("status"), {}
    if not is_finished(report) and status != "pruned":
        commands["resume"] = resume_command(folder)
    uses = report.get("uses", {}) if has_export else {}
    return commands | {name: command for name, command in uses.items() if name != LONGER or status == "finished"}


def resume_command(folder: str) -> str:
    """Return the command that continues the run in a folder."""
    return f"python train.py resume={shlex.quote(folder)}"
