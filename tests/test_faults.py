"""Real faults: kills at random moments, non-finite losses, full disks, lost folders, dead ranks."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time

import pytest
from processes import (
    EPOCHS,
    SAVE_EVERY_STEP,
    STEPS,
    fork_server,
    free_port,
    read_log,
    read_steps,
    start_torchrun,
    uninterrupted_run,
    wait_until,
)

from util.io.checkpoint_file import read_checkpoint

KILLS = int(os.environ.get("KILLS", 16))  # docs/reliability.md: 200
TIMEOUT = 120  # seconds per run


class Campaign:
    """Kills runs of a script at random moments and checks the files after each kill."""

    def __init__(self, script: str, seed: int, folder):
        self.case = uninterrupted_run(script)
        self.rng = random.Random(seed)
        self.folder = folder
        self.best = None
        self.counts = dict(kills=0, saving=0, runs=0, files=0)

    def kill_once(self) -> bool:
        """Start or resume, kill at a random moment. Returns False if the run ended before."""
        rarely = ["--save_every_minutes", "0.002"]
        (run,) = self.case.start(self.folder, *self.rng.choice([SAVE_EVERY_STEP, rarely]))
        steps_before = len(read_steps(self.folder / "steps.0"))
        kill_while_saving = self.rng.random() < 0.5

        def is_saving():
            return any(self.folder.glob(f".checkpoint.tmp.*.{run.pid}.pth"))

        kill_step = steps_before + self.rng.randrange(0, 5)
        delay = self.rng.uniform(0, 0.04)
        deadline = time.monotonic() + TIMEOUT

        def is_kill_moment():
            if len(read_steps(self.folder / "steps.0")) < kill_step:
                return False
            return not kill_while_saving or is_saving()

        while run.is_alive() and not is_kill_moment():
            assert time.monotonic() < deadline, run.text()
        time.sleep(delay)
        run.kill_group(signal.SIGKILL)
        code = run.wait(TIMEOUT)
        assert code in (0, -signal.SIGKILL), run.text()
        self.counts["kills"] += code != 0
        self.counts["saving"] += is_saving()
        return code != 0

    def check_files(self) -> None:
        """Every checkpoint is complete, and the best one is not worse than before."""
        files = list(self.folder.glob("checkpoint*.pth"))
        for path in files:
            checkpoint = read_checkpoint(path)
            assert all(value.isfinite().all() for value in checkpoint["model"].values())
        self.counts["files"] += len(files)
        path = self.folder / "checkpoint-best.pth"
        assert self.best is None or path.exists(), "the best checkpoint is lost"
        if path.exists():
            best = read_checkpoint(path)["state"]["best"]
            assert self.best is None or best >= self.best
            self.best = best

    def finish(self) -> None:
        """Complete the run and compare it with the uninterrupted one."""
        (run,) = self.case.start(self.folder, *SAVE_EVERY_STEP)
        assert run.wait(TIMEOUT) == 0, run.text()
        self.case.check(self.folder)
        if self.best is not None:
            best = max(line["test_acc1"] for line in read_log(self.folder))
            assert read_checkpoint(self.folder / "checkpoint-best.pth")["state"]["best"] == best
        self.counts["runs"] += 1


@pytest.mark.parametrize("script", ["main_pretrain", "main_finetune"])
def test_kill_campaign(script, tmp_path, capsys):
    """kill -9 at random moments, about half of them while a checkpoint is being written."""
    seed = int(os.environ.get("KILL_SEED", time.time()))
    totals = dict(kills=0, saving=0, runs=0, files=0)
    start = time.monotonic()
    while totals["kills"] < KILLS // 2:
        folder = tmp_path / str(totals["runs"])
        folder.mkdir()
        campaign = Campaign(script, seed + totals["runs"], folder)
        try:
            while totals["kills"] + campaign.counts["kills"] < KILLS // 2:
                was_killed = campaign.kill_once()
                campaign.check_files()
                if not was_killed:
                    break
            campaign.finish()
        except BaseException:
            print(f"KILL_SEED={seed}, run {totals['runs']}, {campaign.counts}")
            raise
        for name, count in campaign.counts.items():
            totals[name] += count
    assert totals["saving"] > 0
    with capsys.disabled():
        print(
            f"\n{script}: {totals['kills']} kills ({totals['saving']} while saving), "
            f"{totals['files']} checkpoint files read, {totals['runs']} runs of "
            f"{STEPS * EPOCHS} steps compared, 0 losses, {time.monotonic() - start:.0f} s"
        )


def error_of(run) -> str:
    """The error message of a run: exactly one line, and no traceback."""
    text = run.text()
    assert "Traceback" not in text, text
    lines = [line for line in text.splitlines() if "Error: " in line]
    assert len(lines) == 1, text
    return lines[0].split("Error: ", 1)[1]


# Non-finite losses


def test_nan_on_one_rank_ends_all_ranks(tmp_path):
    """All ranks end within 30 s, name the step and the last checkpoint; the run can be resumed."""
    case = uninterrupted_run("main_pretrain", 2)
    start = time.monotonic()
    runs = case.start(tmp_path, *SAVE_EVERY_STEP, faults={1: {"nan_at": [STEPS + 1]}})
    assert [run.wait(30) for run in runs] == [1, 1]
    assert time.monotonic() - start < 30
    for run in runs:
        message = error_of(run)
        assert "Loss is nan" in message and "epoch 1, iteration 1;" in message
        path = tmp_path / "checkpoint.pth"
        assert f"the last checkpoint is {path} (resumes at epoch 1, iter" in message
    for run in case.start(tmp_path):
        assert run.wait() == 0
    losses = [values for _, _, values in read_steps(tmp_path / "steps.1")]
    assert sum("nan" in values for values in losses) == 1
    expected = read_steps(case.folder / "steps.0")
    assert {s for s in read_steps(tmp_path / "steps.0") if "nan" not in s[2]} == set(expected)


def test_skip_nonfinite_skips_and_counts_steps(tmp_path):
    """--skip_nonfinite 2: two steps per epoch are skipped and counted; a third ends the run."""
    case = uninterrupted_run("main_pretrain", 2)
    runs = case.start(tmp_path, "--skip_nonfinite", 2, faults={1: {"nan_at": [1, 2, STEPS]}})
    assert [run.wait() for run in runs] == [0, 0], runs[0].text()
    text = runs[0].text()
    assert "iteration 2: step skipped (2 of at most 2 in this epoch)" in text
    assert "epoch 1, iteration 0: step skipped (1 of at most 2" in text
    model = read_checkpoint(tmp_path / "checkpoint.pth")["model"]
    assert all(value.isfinite().all() for value in model.values())
    other = tmp_path / "other"
    other.mkdir()
    runs = case.start(other, "--skip_nonfinite", 2, faults={0: {"nan_at": [0, 1, 3]}})
    assert [run.wait() for run in runs] == [1, 1]
    assert "epoch 0, iteration 3; nothing was saved yet." in error_of(runs[1])


def test_skipped_steps_are_counted_across_resume(tmp_path):
    """Steps skipped before an interruption count towards the limit of the epoch."""
    case = uninterrupted_run("main_pretrain")
    flags = [*SAVE_EVERY_STEP, "--skip_nonfinite", 1]
    (run,) = case.start(tmp_path, *flags, faults={0: {"nan_at": [0], "kill_at": 2}})
    assert run.wait() == -signal.SIGKILL
    (run,) = case.start(tmp_path, *flags, faults={0: {"nan_at": [0]}})
    assert run.wait() == 1 and "epoch 0, iteration 2" in error_of(run)


# Unwritable folders


@contextlib.contextmanager
def mount_small_disk(folder, megabytes: int):
    """A tmpfs mounted at folder/disk; skips the test without the right to mount."""
    disk = folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def assert_intact(path) -> None:
    checkpoint = read_checkpoint(path)
    assert all(value.isfinite().all() for value in checkpoint["model"].values())
    assert not list(path.parent.glob("*.tmp.*"))


@pytest.mark.parametrize("size", [1, 2])
def test_disk_full_while_writing_second_checkpoint(size, tmp_path):
    """The disk has space for one checkpoint but not for two."""
    case = uninterrupted_run("main_finetune", size)
    with mount_small_disk(tmp_path, 22) as disk:
        runs = case.start(tmp_path, "--output_dir", disk)
        assert [run.wait() for run in runs] == [1] * size
        assert f"Cannot write {disk}/checkpoint" in error_of(runs[0])
        assert "MiB free); the previous file is intact." in error_of(runs[0])
        assert size == 1 or "Rank 0 could not write" in error_of(runs[1])
        assert_intact(disk / "checkpoint.pth")
        assert_intact(disk / "checkpoint-best.pth")
        subprocess.run(["mount", "-o", "remount,size=99m", str(disk)], check=True)
        for run in case.start(tmp_path, "--output_dir", disk):
            assert run.wait() == 0
        shutil.copytree(disk, tmp_path, dirs_exist_ok=True)
    case.check(tmp_path)


def test_completely_full_disk(tmp_path):
    """There is no space even for a line of the log."""
    case = uninterrupted_run("main_pretrain")
    with mount_small_disk(tmp_path, 60) as disk:
        (run,) = case.start(tmp_path, "--output_dir", disk, faults={0: {"delay": 0.1}})
        wait_until((disk / "checkpoint.pth").exists)
        with contextlib.suppress(OSError), open(disk / "other", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        assert run.wait() == 1
        message = error_of(run)
        assert f"Cannot write {disk}/log.txt (No space left" in message or (
            f"Cannot write TensorBoard's file in {disk} (" in message
        )
        (disk / "other").unlink()
        assert_intact(disk / "checkpoint.pth")
        assert case.start(tmp_path, "--output_dir", disk)[0].wait() == 0
        shutil.copytree(disk, tmp_path, dirs_exist_ok=True)
    case.check(tmp_path)


def test_file_size_limit_keeps_old_checkpoint(tmp_path):
    """Like a quota; torch raises another type of error for a failed write."""
    case = uninterrupted_run("main_pretrain")
    (run,) = case.start(tmp_path, faults={0: {"kill_at": STEPS + 1}})
    assert run.wait() == -signal.SIGKILL
    before = (tmp_path / "checkpoint.pth").read_bytes()
    (run,) = case.start(tmp_path, faults={0: {"max_file_size": 5 << 20}})
    assert run.wait() == 1
    assert f"Cannot write {tmp_path}/checkpoint.pth" in error_of(run)
    assert_intact(tmp_path / "checkpoint.pth")
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


@pytest.mark.parametrize("size", [1, 2])
def test_deleted_output_dir_ends_all_ranks(size, tmp_path):
    case = uninterrupted_run("main_pretrain", size)
    folder = tmp_path / "out"
    faults = {rank: {"delay": 0.1} for rank in range(size)}
    runs = case.start(tmp_path, "--output_dir", folder, faults=faults)
    wait_until((folder / "checkpoint.pth").exists)
    shutil.rmtree(folder)
    assert [run.wait() for run in runs] == [1] * size
    message = error_of(runs[0])  # names the first file that could not be written
    assert message.startswith("Cannot write ") and f"{folder}" in message
    assert "No such file or directory" in message
    assert size == 1 or "lost another rank" in error_of(runs[1])


@pytest.mark.parametrize("kind", ["below a file", "read-only disk"])
def test_unwritable_output_dir_is_refused(kind, tmp_path):
    """The check happens before the first step."""
    case = uninterrupted_run("main_pretrain")
    with contextlib.ExitStack() as stack:
        if kind == "below a file":
            (tmp_path / "file").touch()
            folder = tmp_path / "file" / "out"
        else:
            folder = stack.enter_context(mount_small_disk(tmp_path, 1))
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        (run,) = case.start(tmp_path, "--output_dir", folder)
        assert run.wait() == 1
        assert f"Cannot write to the output folder {folder} (" in error_of(run)
        assert not read_steps(tmp_path / "steps.0")


def test_output_dir_becoming_read_only_keeps_checkpoint(tmp_path):
    """Read-only during training, by chattr because root ignores permissions."""
    case = uninterrupted_run("main_pretrain")
    folder = tmp_path / "out"
    (run,) = case.start(
        tmp_path, "--output_dir", folder, *SAVE_EVERY_STEP, faults={0: {"delay": 0.1}}
    )
    wait_until((folder / "checkpoint.pth").exists)
    chattr = shutil.which("chattr")
    if not chattr or subprocess.run([chattr, "+i", folder], capture_output=True).returncode:
        run.kill()
        pytest.skip("needs chattr and a file system that supports it")
    try:
        assert run.wait() == 1
        assert f"Cannot write {folder}/checkpoint.pth (" in error_of(run)
    finally:
        subprocess.run([chattr, "-i", folder], check=True)
    assert_intact(folder / "checkpoint.pth")


# Ranks that do not respond


@pytest.mark.parametrize("rank", [0, 1])
def test_missing_rank_times_out(rank, tmp_path):
    case = uninterrupted_run("main_pretrain", 2)
    port = str(free_port())
    env = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = case.command(tmp_path, "--dist_timeout", 4)
    run = fork_server.start(command, tmp_path / "out.0", env)
    assert run.wait(30) == 1
    message = error_of(run)
    assert (
        f"Rank {rank} of 2 could not join the process group at 127.0.0.1:{port} within 4" in message
    )
    assert "--master_port" in message


def test_port_in_use_is_reported(tmp_path):
    case = uninterrupted_run("main_pretrain", 2)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        run = fork_server.start(
            case.command(tmp_path, "--dist_timeout", 4), tmp_path / "out.0", env
        )
        assert run.wait(30) == 1
    assert f"127.0.0.1:{port}" in error_of(run) and "that the port is free" in error_of(run)


def test_hanging_rank_times_out(tmp_path):
    """The other rank ends after --dist_timeout, with an error message."""
    case = uninterrupted_run("main_pretrain", 2)
    flags = [*SAVE_EVERY_STEP, "--dist_timeout", 5]
    runs = case.start(tmp_path, *flags, faults={1: {"freeze_at": STEPS + 1}})
    assert runs[0].wait(40) == 1
    runs[1].kill()
    message = error_of(runs[0])
    assert "Rank 0 of 2 (group at 127.0.0.1:" in message and "--dist_timeout" in message
    assert runs[1].wait() == -signal.SIGKILL
    for run in case.start(tmp_path):
        assert run.wait() == 0
    case.check(tmp_path)


@pytest.mark.slow  # torchrun and its ranks import everything at every start: 30 to 90 s
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_restarts_after_killed_rank(rank, tmp_path):
    """torchrun restarts the process group, which resumes automatically."""
    case = uninterrupted_run("main_pretrain", 2)
    launcher = start_torchrun(
        case.command(tmp_path, *SAVE_EVERY_STEP), tmp_path / "out", "--max-restarts", 3
    )
    try:
        wait_until((tmp_path / "checkpoint.pth").exists, 180)
        os.kill(find_pid_of_rank(launcher.pid, rank), signal.SIGKILL)
        assert launcher.wait(240) == 0, (tmp_path / "out").read_text()
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    text = (tmp_path / "out").read_text()
    assert "exactly where it stopped" in text
    assert [line["epoch"] for line in read_log(tmp_path)] == list(range(EPOCHS))
    case.check_files(tmp_path)


def find_pid_of_rank(launcher: int, rank: int) -> int:
    """Process id of a rank started by torchrun."""
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            with open(f"/proc/{name}/stat") as file:
                parent = int(file.read().rsplit(")", 1)[1].split()[1])
            with open(f"/proc/{name}/environ", "rb") as file:
                if parent == launcher and f"RANK={rank}".encode() in file.read().split(b"\0"):
                    return int(name)
    raise AssertionError(f"torchrun has no rank {rank}")
