"""SIGTERM, SIGUSR1 and Ctrl-C end a run after the step it is at, saved, on all ranks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import (
    EPOCHS,
    STEPS,
    launch,
    read_steps,
    undisturbed,
    wait_until,
)

from util.io.checkpoint_file import read_checkpoint
from util.run.signals import EXIT_INTERRUPTED

ROOT = Path(__file__).resolve().parent.parent
SLOW = {"delay": 0.3}  # seconds per step, so that a signal arrives between two of them
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def test_exit_status():
    """The status that docs and batch scripts rely on."""
    assert EXIT_INTERRUPTED == 75


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda n: n.name)
def test_one_process(number, tmp_path):
    """The signal goes to loader processes too, as a terminal or scheduler sends it."""
    case = undisturbed("main_pretrain")
    (run,) = case.start(tmp_path, "--num_workers", 2, faults={0: SLOW})
    wait_until(lambda: len(read_steps(tmp_path / "steps.0")) >= STEPS + 1)
    run.kill_group(number)
    assert run.wait() == EXIT_INTERRUPTED, run.text()
    assert "Saved at epoch 1, iteration" in run.text() and "Traceback" not in run.text()
    (run,) = case.start(tmp_path)
    assert run.wait() == 0
    steps = read_steps(tmp_path / "steps.0")
    assert len(steps) == len(set(steps)), "steps were done twice"
    case.check(tmp_path)


@pytest.mark.parametrize("who", [[0], [1], [0, 1]], ids=["rank 0", "rank 1", "both"])
def test_two_processes(who, tmp_path):
    """A signal that reaches one rank, or both at different steps, stops both at the same step."""
    case = undisturbed("main_finetune", 2)
    runs = case.start(tmp_path, "--num_workers", 2, faults={0: SLOW, 1: SLOW})
    wait_until(lambda: len(read_steps(tmp_path / f"steps.{who[0]}")) >= STEPS + 1)
    for position, rank in enumerate(who):
        runs[rank].kill_group([signal.SIGUSR1, signal.SIGTERM][position])
        time.sleep(0.1)
    for run in runs:
        assert run.wait() == EXIT_INTERRUPTED, run.text()
    assert len(read_steps(tmp_path / "steps.0")) == len(read_steps(tmp_path / "steps.1"))
    for run in case.start(tmp_path):
        assert run.wait() == 0, run.text()
    case.check(tmp_path)


def test_second_signal(tmp_path):
    """Whoever cannot wait sends it again: the process ends at once, by the signal."""
    case = undisturbed("main_pretrain")
    (run,) = case.start(tmp_path, faults={0: {"delay": 20.0}})
    wait_until(lambda: "Start training" in run.text())
    run.kill(signal.SIGTERM)
    time.sleep(0.2)
    assert run.is_alive()
    start = time.monotonic()
    run.kill(signal.SIGTERM)
    assert run.wait() == -signal.SIGTERM
    assert time.monotonic() - start < 2


def test_signal_at_the_end_of_a_run(tmp_path):
    """A signal during the very last step: the run is complete, and says so by status 0."""
    case = undisturbed("main_pretrain")
    (run,) = case.start(tmp_path, faults={0: {"delay": 0.1}})
    wait_until(lambda: len(read_steps(tmp_path / "steps.0")) >= STEPS * EPOCHS, every=0)
    run.kill(signal.SIGTERM)
    code = run.wait()
    assert code in (0, EXIT_INTERRUPTED)
    if code:
        (again,) = case.start(tmp_path)
        assert again.wait() == 0, again.text()
    case.check(tmp_path)


@pytest.mark.slow  # torchrun and its two ranks each import everything anew: 20 to 60 s
@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda n: n.name)
def test_torchrun(number, tmp_path):
    """torchrun passes the signal on to the groups of its ranks, loader processes included."""
    case = undisturbed("main_pretrain", 2)
    handled = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    command = case.command(tmp_path, "--num_workers", 2, "--epochs", 40)
    launcher = launch(command, tmp_path / "out", "--signals-to-handle", handled)
    try:
        wait_until((tmp_path / "checkpoint.pth").exists, 180, 0.05)
        if number == signal.SIGINT:  # Ctrl-C reaches everybody in the terminal's group
            os.killpg(launcher.pid, number)
        else:
            launcher.send_signal(number)
        launcher.wait(60)
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    text = (tmp_path / "out").read_text()
    assert "Stopped by a signal" in text, text
    assert launcher.returncode != 0
    saved = read_checkpoint(tmp_path / "checkpoint.pth")
    assert len(saved["state"]["random"]) == 2


def test_outside_of_training_the_first_signal_ends(tmp_path):
    """A tool is not trained: Ctrl-C ends it at once, in one sentence, and its file is not left."""
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
    tool = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    wait_until((tmp_path / "ready").exists)
    tool.send_signal(signal.SIGINT)
    out, _ = tool.communicate(timeout=30)
    assert tool.returncode == 130 and out.splitlines()[-1].endswith("Error: interrupted")
    assert [path.name for path in tmp_path.iterdir()] == ["ready"]
