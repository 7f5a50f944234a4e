"""Two network namespaces simulate two machines: torchrun starts one rank on each, and they train one run.

Needs root and `ip` (iproute2).
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, SHRUNK, Answer, environment
from tests.launch.distributed.test_ranks import RUN, losses

# Namespace → its cable and address; names include this process id, because other processes may run these tests too
HOSTS = {f"g2l-{os.getpid()}-{host}": (f"cable-{host}", f"10.77.41.{number}") for number, host in enumerate("ab", 1)}
REFUSED = ("Operation not permitted", "Permission denied")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("ip") is None or os.geteuid() != 0, reason="network namespaces need root and iproute2"
    ),
]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})


@pytest.fixture(scope="module")
def hosts() -> Iterator[None]:
    """Two namespaces joined by a cable."""
    try:
        for host in HOSTS:
            ip("netns", "add", host)
        (a, (cable_a, _)), (b, (cable_b, _)) = HOSTS.items()
        ip("link", "add", cable_a, "netns", a, "type", "veth", "peer", "name", cable_b, "netns", b)
        for host, (cable, address) in HOSTS.items():
            ip("-n", host, "addr", "add", f"{address}/24", "dev", cable)
            ip("-n", host, "link", "set", cable, "up")
            ip("-n", host, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        remove()
        if any(words in error.stderr for words in REFUSED):
            pytest.skip(f"no rights to network namespaces here: {error.stderr}")
        pytest.fail(f"{' '.join(error.cmd)}: {error.stderr}")
    yield
    remove()


def remove() -> None:
    """Remove the namespaces that exist, and with them the cable."""
    there = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout.split()
    for host in HOSTS:
        if host in there:
            ip("netns", "del", host)


def on_both(hosts: None, cache: Path, folder: Path, *overrides: str) -> list[Answer]:
    """Run torchrun on each host and return the results."""
    processes = []
    for host, (cable, address) in HOSTS.items():
        is_first = int(not processes)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=10.77.41.1:29517", f"--rdzv-conf=is_host={is_first}"]
        torchrun += [f"--local-addr={address}", str(ROOT / "train.py")]
        process = subprocess.Popen(
            ["ip", "netns", "exec", host, *torchrun, *overrides],
            cwd=folder,
            env=environment(cache) | {"GLOO_SOCKET_IFNAME": cable},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
    outputs = [process.communicate(timeout=240) for process in processes]
    return [Answer(process.returncode, *texts) for process, texts in zip(processes, outputs, strict=True)]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_machines_have_the_losses_of_one_process(
    strategy: str, hosts: None, cache: Path, sources: Path, tmp_path: Path
):
    keys = [*SHRUNK, f"path={sources}", *RUN]
    train = [sys.executable, str(ROOT / "train.py"), *keys, "run_dir=alone"]
    subprocess.run(train, cwd=tmp_path, env=environment(cache), check=True, capture_output=True)
    first, second = on_both(hosts, cache, tmp_path, *keys, f"strategy={strategy}", "num_nodes=2", "run_dir=together")
    assert first.code == second.code == 0, first.stderr + second.stderr
    assert losses(tmp_path / "together") == pytest.approx(losses(tmp_path / "alone"), abs=2e-5)
    assert (first.stdout + second.stdout).count("finished: val/loss") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "together"]


def test_user_error_ends_both_hosts_and_is_printed_once(hosts: None, cache: Path, sources: Path, tmp_path: Path):
    keys = [*SHRUNK, f"path={sources}", *RUN, "init=no/such/run", "run_dir=together"]
    answers = on_both(hosts, cache, tmp_path, *keys)
    assert all(answer.code != 0 for answer in answers)
    assert sum("error: init=no/such/run" in answer.stderr for answer in answers) == 1
    assert not (tmp_path / "together").exists()


def test_other_counts_than_were_started_are_refused(hosts: None, cache: Path, sources: Path, tmp_path: Path):
    answers = on_both(hosts, cache, tmp_path, *SHRUNK, f"path={sources}", "num_nodes=3")
    assert all(answer.code != 0 for answer in answers)
    assert any("num_nodes=3, but 2 were started" in answer.stderr for answer in answers)
