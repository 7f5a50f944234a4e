"""Hub upload: uploads the model of a finished run to the Hugging Face Hub, within a limited time, without failing it.

python -m launch.run.hub_upload REQUEST     the upload itself, a process of its own; REQUEST is JSON, as is its output
"""

import json
import logging
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpt2lab.reports.model_card import read_step
from gpt2lab.reports.run_report import write_report
from gpt2lab.settings import HubSettings
from gpt2lab.storage.hub import hub_is_reachable
from gpt2lab.storage.report_json import is_finished, read_report
from launch.distributed import child_processes

log = logging.getLogger(__name__)

BASE_SECONDS, BYTES_PER_SECOND = 300.0, 1e6  # limit of an upload; huggingface_hub itself waits without one
LONGEST_REASON = 300  # characters


def upload_finished(hub: HubSettings, run_dir: Path) -> None:
    """Upload `hf/` of a run to `hub.push` if the run is complete, and add the upload to its report.

    A failure is a warning with the command that uploads the model later.
    """
    folder, report = run_dir / "hf", read_report(run_dir)
    if not is_finished(report) or not folder.is_dir():
        return
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"Uploading {folder} ({size / 1e6:,.0f} MB) to {hub.push}", file=sys.stderr, flush=True)
    try:
        found = _upload(hub, folder, BASE_SECONDS + size / BYTES_PER_SECOND)
    except (OSError, ValueError, subprocess.SubprocessError, KeyboardInterrupt) as error:
        log.warning(
            "%s was not uploaded: %s.\nThe run is complete. Upload it later: %s",
            folder,
            _reason(error),
            upload_command(hub, folder),
        )
        return
    print(f"Uploaded: {found['url']}", file=sys.stderr, flush=True)
    try:
        write_report(run_dir, {**report, "hub": {"repository": hub.push, "revision": hub.revision, **found}})
    except OSError as error:
        log.warning("The upload could not be added to the report: %s", error)


def upload_command(hub: HubSettings, folder: Path) -> str:
    """Return the shell command that uploads a model folder."""
    options = [
        *(["--private"] if hub.private else []),
        *(["--revision", hub.revision] if hub.revision != "main" else []),
    ]
    return shlex.join(["hf", "upload", str(hub.push), str(folder), ".", *options])


def _upload(hub: HubSettings, folder: Path, seconds: float) -> dict[str, str]:
    """Return address and id of the commit.

    Raises:
        ValueError: the Hub refused the upload or cannot be reached.
        subprocess.TimeoutExpired: the time is over.
    """
    request = json.dumps({"hub": asdict(hub), "folder": str(folder.absolute()), "step": read_step(folder)})
    done = subprocess.run(
        [sys.executable, "-m", "launch.run.hub_upload", request],
        env=child_processes.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    if done.returncode:
        raise ValueError(" ".join(done.stderr.split()) or f"exit code {done.returncode}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return {name: str(found[name]) for name in ("url", "commit")}


def _reason(error: BaseException) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        return f"it took longer than {error.timeout:.0f} seconds"
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted"
    return str(error)[:LONGEST_REASON].rstrip(". ")


def _commit(request: dict[str, Any]) -> dict[str, str]:
    """Create repository and branch unless they exist, and commit the folder; return address and id of the commit."""
    from huggingface_hub import HfApi, constants

    hub = HubSettings(**request["hub"])
    assert hub.push is not None
    if not hub_is_reachable():
        raise OSError(f"{constants.ENDPOINT} cannot be reached from here")
    api = HfApi(library_name="gpt2-lab")
    api.create_repo(hub.push, private=hub.private or None, exist_ok=True)
    if hub.revision != constants.DEFAULT_REVISION:
        api.create_branch(hub.push, branch=hub.revision, exist_ok=True)
    step = f" of step {request['step']}" if request["step"] is not None else ""
    done = api.upload_folder(
        repo_id=hub.push,
        folder_path=request["folder"],
        revision=hub.revision,
        commit_message=f"Upload the model{step}",
    )
    return {"url": done.commit_url, "commit": done.oid}


def _program(request: str) -> int:
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        print(json.dumps(_commit(json.loads(request))))
    except Exception as error:
        print(error or type(error).__name__, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_program(sys.argv[1]))
