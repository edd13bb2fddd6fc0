"""SIGTERM, SIGUSR1 and Ctrl-C finish the step, save, and end all ranks."""

import os
import signal
import time
from pathlib import Path

import pytest
from processes import (
    EPOCHS,
    STEPS,
    read_steps,
    start_python,
    start_torchrun,
    uninterrupted_run,
    wait_until,
)

from util.io.checkpoint_file import read_checkpoint
from util.run.signals import EXIT_INTERRUPTED

ROOT = Path(__file__).resolve().parent.parent
SLOW = {"delay": 0.3}  # seconds per step, so that signals arrive between steps
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def test_exit_status_of_interrupted_runs():
    """The status documented for batch scripts."""
    assert EXIT_INTERRUPTED == 75


@pytest.mark.parametrize("signum", STOP_SIGNALS, ids=lambda n: n.name)
def test_signal_saves_and_resume_matches_on_one_rank(signum, tmp_path):
    """The signal reaches the workers too, as from a terminal or scheduler."""
    case = uninterrupted_run("main_pretrain")
    (run,) = case.start(tmp_path, "--num_workers", 2, faults={0: SLOW})
    wait_until(lambda: len(read_steps(tmp_path / "steps.0")) >= STEPS + 1)
    run.kill_group(signum)
    assert run.wait() == EXIT_INTERRUPTED, run.text()
    assert "Saved at epoch 1, iteration" in run.text() and "Traceback" not in run.text()
    (run,) = case.start(tmp_path)
    assert run.wait() == 0
    steps = read_steps(tmp_path / "steps.0")
    assert len(steps) == len(set(steps)), "steps were repeated"
    case.check(tmp_path)


@pytest.mark.parametrize("ranks", [[0], [1], [0, 1]], ids=["rank 0", "rank 1", "both"])
def test_signal_stops_both_ranks_at_the_same_step(ranks, tmp_path):
    """The signal reaches one rank, or both at different steps."""
    case = uninterrupted_run("main_finetune", 2)
    runs = case.start(tmp_path, "--num_workers", 2, faults={0: SLOW, 1: SLOW})
    wait_until(lambda: len(read_steps(tmp_path / f"steps.{ranks[0]}")) >= STEPS + 1)
    for rank, signum in zip(ranks, (signal.SIGUSR1, signal.SIGTERM), strict=False):
        runs[rank].kill_group(signum)
        time.sleep(0.1)
    for run in runs:
        assert run.wait() == EXIT_INTERRUPTED, run.text()
    assert len(read_steps(tmp_path / "steps.0")) == len(read_steps(tmp_path / "steps.1"))
    for run in case.start(tmp_path):
        assert run.wait() == 0, run.text()
    case.check(tmp_path)


def test_second_signal_ends_immediately(tmp_path):
    case = uninterrupted_run("main_pretrain")
    (run,) = case.start(tmp_path, faults={0: {"delay": 20.0}})
    wait_until(lambda: "Start training" in run.text())
    run.kill(signal.SIGTERM)
    time.sleep(0.2)
    assert run.is_alive()
    start = time.monotonic()
    run.kill(signal.SIGTERM)
    assert run.wait() == -signal.SIGTERM
    assert time.monotonic() - start < 2


def test_signal_during_last_step(tmp_path):
    """The run completes with status 0, or can be resumed."""
    case = uninterrupted_run("main_pretrain")
    (run,) = case.start(tmp_path, faults={0: {"delay": 0.1}})
    wait_until(lambda: len(read_steps(tmp_path / "steps.0")) >= STEPS * EPOCHS, every=0)
    run.kill(signal.SIGTERM)
    code = run.wait()
    assert code in (0, EXIT_INTERRUPTED)
    if code:
        (again,) = case.start(tmp_path)
        assert again.wait() == 0, again.text()
    case.check(tmp_path)


@pytest.mark.slow  # torchrun and its two ranks each import everything: 20 to 60 s
@pytest.mark.parametrize("signum", STOP_SIGNALS, ids=lambda n: n.name)
def test_torchrun_forwards_signals(signum, tmp_path):
    """torchrun forwards the signal to its ranks and their workers."""
    case = uninterrupted_run("main_pretrain", 2)
    handled = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    command = case.command(tmp_path, "--num_workers", 2, "--epochs", 40)
    launcher = start_torchrun(command, tmp_path / "out", "--signals-to-handle", handled)
    try:
        wait_until((tmp_path / "checkpoint.pth").exists, 180, 0.05)
        if signum == signal.SIGINT:  # Ctrl-C reaches the whole foreground process group
            os.killpg(launcher.pid, signum)
        else:
            launcher.send_signal(signum)
        launcher.wait(60)
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    text = (tmp_path / "out").read_text()
    assert "Stopped by a signal" in text, text
    assert launcher.returncode != 0
    saved = read_checkpoint(tmp_path / "checkpoint.pth")
    assert len(saved["state"]["random"]) == 2


def test_first_signal_ends_a_tool(tmp_path):
    """Without training, Ctrl-C ends immediately with one line and leaves no temporary file."""
    code = (
        "import time\n"
        "from pathlib import Path\n"
        "from util.run.launch import launch\n"
        "from util.io.files import atomic_write\n"
        "def main(out):\n"
        "    with atomic_write(out):\n"
        "        Path(out).with_name('ready').touch()\n"
        "        time.sleep(60)\n"
        f"launch(main, {str(tmp_path / 'out.npz')!r})\n"
    )
    tool = start_python("-c", code)
    wait_until((tmp_path / "ready").exists)
    tool.kill(signal.SIGINT)
    assert tool.wait(30) == 130 and tool.text().splitlines()[-1].endswith("Error: interrupted")
    assert [path.name for path in tmp_path.iterdir()] == ["ready"]
