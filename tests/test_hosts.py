"""Several machines: two network namespaces, joined by a virtual cable, train as one."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, assert_near_run, wait_until

from lib.checkpoint import STATE

Hosts = dict[str, str]  # namespace -> address


def ip(*args: str) -> str:
    return subprocess.run(["ip", *args], check=True, capture_output=True, text=True, timeout=30).stdout


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2's ip, for network namespaces")
    hosts = {f"owlet-{os.getpid()}-{number}": f"10.71.0.{number}" for number in (1, 2)}
    first, second = hosts
    try:
        for host in hosts:
            ip("netns", "add", host)
        ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
        for host, address in hosts.items():
            ip("-n", host, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", host, "link", "set", device, "up")
            ip("netns", "exec", host, "true")
        yield hosts
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    finally:
        remove(hosts)


def remove(hosts: Hosts) -> None:
    for host in ip("netns", "list").split():
        if host in hosts:
            kill(host)
            ip("netns", "delete", host)


def kill(host: str, but: int | None = None) -> None:
    for pid in map(int, ip("netns", "pids", host).split()):
        if pid != but:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def start(hosts: Hosts, out: Path, *flags: object) -> list[subprocess.Popen]:
    """A torchrun of one rank on each host, with train.py's flags."""
    first = next(iter(hosts.values()))
    started = []
    for host, address in hosts.items():
        command = ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", "--nnodes=2",
                   "--nproc_per_node=1", "--max-restarts=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={first}:29400",
                   f"--rdzv-id={out.parent.name}",
                   # which machine it is, torchrun takes from its name; that of the namespaces is the same
                   f"--rdzv-conf=is_host={address == first}", f"--local-addr={address}"]
        with Path(f"{out}-{host}.log").open("w") as log:
            started.append(subprocess.Popen(
                [*command, ROOT / "train.py", "--out", out, *SMALL, *flags], stdout=log, stderr=log,
                # without the second, ranks that start again find the addresses of those before (pytorch #135712)
                env=os.environ | {"GLOO_SOCKET_IFNAME": "eth0", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}))
    return started


def ends_well(hosts: Hosts, out: Path, started: list[subprocess.Popen]) -> str:
    """What they printed, once all have ended well."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        for process in started:
            process.wait(timeout=120)
    said = "".join(Path(f"{out}-{host}.log").read_text() for host in hosts)
    assert [process.poll() for process in started] == [0, 0], said
    return said


def test_two_hosts_give_the_losses_of_one_process(hosts, finished, data, tmp_path):
    out = tmp_path / "two"
    ends_well(hosts, out, start(hosts, out, "--data", data, "--max-steps", "40"))
    assert_near_run(out, finished("--max-steps", 40))


@pytest.mark.long
def test_a_host_that_loses_its_rank_starts_it_again(hosts, finished, data, tmp_path):
    out = tmp_path / "two"
    started = start(hosts, out, "--data", data, "--max-steps", "40")
    wait_until((out / STATE).exists)
    kill(list(hosts)[1], but=started[1].pid)
    said = ends_well(hosts, out, started)
    assert "exitcode: -9" in said
    assert re.search("steps [123]0 to 40 ", said), said  # from a checkpoint, on both
    assert_near_run(out, finished("--max-steps", 40))
