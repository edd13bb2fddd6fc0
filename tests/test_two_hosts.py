"""Two hosts simulated on one machine by two network namespaces and a virtual link.

torchrun starts training on both, the link is cut, both end with an error message, the link is
restored and the run resumes. Needs root and iproute2; skipped otherwise.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys

import pytest
from processes import LAUNCHER_VARIABLES, ROOT, SAVE_EVERY_STEP, uninterrupted_run, wait_until

HOSTS = {0: "10.77.0.1", 1: "10.77.0.2"}
PORT = 29477
INTERFACE = "veth0"  # name of the network interface on both hosts


def ip(*words) -> None:
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, timeout=20)


@pytest.fixture
def host_names():
    """Names of two network namespaces that are connected only to each other."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("needs root and iproute2 to create network namespaces")
    names = [f"host{i}-{os.getpid()}" for i in HOSTS]
    try:
        for name in names:
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"cannot create a network namespace: {error.stderr.decode().strip()}")
        peer = f"peer name {INTERFACE} netns {names[1]}"
        ip(*f"-n {names[0]} link add {INTERFACE} type veth {peer}".split())
        for index, name in enumerate(names):
            ip("-n", name, "addr", "add", f"{HOSTS[index]}/24", "dev", INTERFACE)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", INTERFACE, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start(names, command, folder, attempt: int) -> list[subprocess.Popen]:
    """Start torchrun on both hosts, one rank each."""
    script, *flags = command
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    env["GLOO_SOCKET_IFNAME"] = INTERFACE
    hosts = []
    for index, name in enumerate(names):
        line = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"]
        line += ["--nnodes", 2, "--nproc_per_node", 1, "--rdzv_backend", "c10d"]
        line += ["--rdzv_endpoint", f"{HOSTS[0]}:{PORT}", "--rdzv_id", f"try{attempt}"]
        line += ["--rdzv_conf", f"is_host={not index}"]  # the default compares host names
        line += ["--local_addr", HOSTS[index], ROOT / f"{script}.py", *flags]
        with open(folder / f"host{index}.{attempt}", "wb") as out:
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


def kill(hosts) -> None:
    for host in hosts:
        if host.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(host.pid, signal.SIGKILL)
            host.wait(20)


@pytest.mark.slow  # two starts of torchrun on two hosts, and a timeout: about 90 s
def test_link_failure_ends_both_hosts_and_run_resumes(host_names, tmp_path):
    case = uninterrupted_run("main_pretrain", 2)
    command = case.command(tmp_path, *SAVE_EVERY_STEP, "--dist_timeout", 8)
    hosts = start(host_names, command, tmp_path, 0)
    try:
        wait_until((tmp_path / "checkpoint.pth").exists, 180)
        ip("-n", host_names[0], "link", "set", INTERFACE, "down")
        texts = [tmp_path / "host0.0", tmp_path / "host1.0"]
        for text in texts:
            wait_until(lambda t=text: "lost another rank" in t.read_text(), 60, 0.1)
        assert hosts[0].wait(120) != 0
        # The ranks have ended, but torchrun on the other host retries its rendezvous for minutes.
    finally:
        kill(hosts)
    ip("-n", host_names[0], "link", "set", INTERFACE, "up")
    hosts = start(host_names, command, tmp_path, 1)
    try:
        for index, host in enumerate(hosts):
            assert host.wait(240) == 0, (tmp_path / f"host{index}.1").read_text()
    finally:
        kill(hosts)
    assert "exactly where it stopped" in (tmp_path / "host0.1").read_text()
    case.check_files(tmp_path)
