"""A SLURM cluster of two nodes on this machine: the daemons of Debian's slurm-wlm, without systemd.

Needs root, munged, slurmctld and slurmd (Debian: apt install slurm-wlm). By hand, until Enter is pressed:

    python tests/support/slurm_cluster.py FOLDER        then, elsewhere: export SLURM_CONF=FOLDER/slurm.conf
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
WHY_NOT = "a SLURM cluster needs root and slurm-wlm (apt install slurm-wlm)"

# No cgroups, no accounting; processes are tracked by their parents. Both nodes are this host, each with two CPUs.
CONFIGURATION = """\
ClusterName=trial
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=30
MinJobAge=60
NodeName=trial-a NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=trial-b NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def is_possible() -> bool:
    """Return whether this machine can run a cluster."""
    return os.geteuid() == 0 and all(shutil.which(program) for program in NEEDED)


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Run the cluster during the block; return the environment variables for SLURM's commands."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state").mkdir(exist_ok=True)
    host = socket.gethostname().split(".")[0]
    text = CONFIGURATION.format(host=host, folder=folder, ports=free_ports(3))
    (folder / "slurm.conf").write_text(text)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    munged = ["munged", "--force", "--foreground", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket"]
    munged += [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
    nodes = [["slurmd", "-D", "-N", node] for node in ("trial-a", "trial-b")]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in (munged, ["slurmctld", "-D", "-c"], *nodes):
            with (folder / "daemons.log").open("ab") as log:
                daemons.append(
                    subprocess.Popen(command, env=environment, stdout=log, stderr=log, preexec_fn=end_with_parent)
                )
            time.sleep(0.5)
        wait_until_idle(environment, folder)
        yield {"SLURM_CONF": environment["SLURM_CONF"]}
        subprocess.run(["scancel", "--me"], env=environment, check=False)
    finally:
        for daemon in reversed(daemons):
            end(daemon)


def end_with_parent() -> None:
    """Have the kernel kill the daemon when this process dies."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(timeout=10)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def wait_until_idle(environment: dict[str, str], folder: Path) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        nodes = subprocess.run(["sinfo", "-h", "-o", "%t %D"], env=environment, capture_output=True, text=True)
        if nodes.stdout.strip() == "idle 2":
            return
        time.sleep(0.2)
    raise RuntimeError(
        f"SLURM does not come up: {nodes.stdout}{nodes.stderr}\n{(folder / 'daemons.log').read_text()[-2000:]}"
    )


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


if __name__ == "__main__":
    with cluster(Path(sys.argv[1]).absolute()) as variables:
        print(*(f"export {name}={value}" for name, value in variables.items()), flush=True)
        sys.stdin.readline()
