"""Two hosts on one machine: two network namespaces joined by a cable of their own.

Training starts on both with torchrun, the cable is pulled, both ends say so and end, the cable is
put back and the run goes on. Needs root and iproute2, and is skipped with its reason elsewhere.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys

import pytest
from processes import LAUNCHER_NAMES, OFTEN, ROOT, undisturbed, wait_until

HOSTS = {0: "10.77.0.1", 1: "10.77.0.2"}
PORT = 29477
CARD = "cable"  # name of the network interface in both hosts


def ip(*words) -> None:
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, timeout=20)


@pytest.fixture
def cable():
    """Two hosts that see each other and nobody else; gives their names."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("needs root and iproute2 to make two hosts of one machine")
    names = [f"host{i}-{os.getpid()}" for i in HOSTS]
    try:
        for name in names:
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"may not make a network namespace: {error.stderr.decode().strip()}")
        ip(*f"-n {names[0]} link add {CARD} type veth peer name {CARD} netns {names[1]}".split())
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"{HOSTS[number]}/24", "dev", CARD)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", CARD, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start(names, command, folder, attempt: int) -> list[subprocess.Popen]:
    """torchrun on both hosts, one process each."""
    script, *flags = command
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHER_NAMES}
    env |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": CARD}
    hosts = []
    for number, name in enumerate(names):
        line = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"]
        line += ["--nnodes", 2, "--nproc_per_node", 1, "--rdzv_backend", "c10d"]
        line += ["--rdzv_endpoint", f"{HOSTS[0]}:{PORT}", "--rdzv_id", f"try{attempt}"]
        line += ["--rdzv_conf", f"is_host={not number}"]  # by itself it looks at the host's name
        line += ["--local_addr", HOSTS[number], ROOT / f"{script}.py", *flags]
        with open(folder / f"host{number}.{attempt}", "wb") as out:
            hosts.append(
                subprocess.Popen(
                    list(map(str, line)),
                    cwd=ROOT,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    return hosts


def end(hosts) -> None:
    for host in hosts:
        if host.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(host.pid, signal.SIGKILL)
            host.wait(20)


@pytest.mark.slow  # torchrun twice on two hosts, with all imports, and a timeout: about 90 s
def test_cable_pulled_and_put_back(cable, tmp_path):
    case = undisturbed("main_pretrain", 2)
    command = case.command(tmp_path, *OFTEN, "--dist_timeout", 8)
    hosts = start(cable, command, tmp_path, 0)
    try:
        wait_until((tmp_path / "checkpoint.pth").exists, 180)
        ip("-n", cable[0], "link", "set", CARD, "down")
        texts = [tmp_path / "host0.0", tmp_path / "host1.0"]
        for text in texts:
            wait_until(lambda t=text: "lost another rank" in t.read_text(), 60, 0.1)
        assert hosts[0].wait(120) != 0
        # The ranks have ended. torchrun of the cut-off host goes on looking for the other one for
        # minutes, in code of its own; a batch system would end it, and so do we.
    finally:
        end(hosts)
    ip("-n", cable[0], "link", "set", CARD, "up")
    hosts = start(cable, command, tmp_path, 1)
    try:
        for number, host in enumerate(hosts):
            assert host.wait(240) == 0, (tmp_path / f"host{number}.1").read_text()
    finally:
        end(hosts)
    assert "exactly where it stopped" in (tmp_path / "host0.1").read_text()
    case.check_files(tmp_path)
