"""Faults made for real: kills at random moments, full disks, lost folders, numbers gone wrong."""

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
    OFTEN,
    STEPS,
    free_port,
    launch,
    read_log,
    read_steps,
    undisturbed,
    wait_until,
    warm,
)

from util.io.checkpoint_file import read_checkpoint

KILLS = int(os.environ.get("KILLS", 28))  # 200 in the long campaign
LIMIT = 120  # seconds for one attempt


class Campaign:
    """Kills runs of one script at random moments and looks at what is left each time."""

    def __init__(self, script: str, seed: int, folder):
        self.case = undisturbed(script)
        self.random = random.Random(seed)
        self.folder = folder
        self.best = None
        self.counts = dict(kills=0, saving=0, runs=0, files=0)

    def kill_once(self) -> bool:
        """Start or go on, kill at a random moment. Returns whether it was killed in time."""
        seldom = ["--save_every_minutes", "0.002"]
        (run,) = self.case.start(self.folder, *self.random.choice([OFTEN, seldom]))
        before = len(read_steps(self.folder / "steps.0"))
        while_saving = self.random.random() < 0.5

        def is_saving():
            return any(self.folder.glob(f".checkpoint.tmp.*.{run.pid}.pth"))

        wanted = before + self.random.randrange(0, 5)
        pause = self.random.uniform(0, 0.04)
        deadline = time.monotonic() + LIMIT

        def is_there():
            if len(read_steps(self.folder / "steps.0")) < wanted:
                return False
            return not while_saving or is_saving()

        while run.is_alive() and not is_there():
            assert time.monotonic() < deadline, run.text()
        time.sleep(pause)
        run.kill_group(signal.SIGKILL)
        code = run.wait(LIMIT)
        assert code in (0, -signal.SIGKILL), run.text()
        self.counts["kills"] += code != 0
        self.counts["saving"] += is_saving()
        return code != 0

    def look(self) -> None:
        """Every checkpoint is complete, and the best one no worse than before."""
        files = list(self.folder.glob("checkpoint*.pth"))
        for path in files:
            checkpoint = read_checkpoint(path)
            assert all(value.isfinite().all() for value in checkpoint["model"].values())
        self.counts["files"] += len(files)
        path = self.folder / "checkpoint-best.pth"
        assert self.best is None or path.exists(), "the best file is lost"
        if path.exists():
            best = read_checkpoint(path)["state"]["best"]
            assert self.best is None or best >= self.best
            self.best = best

    def finish(self) -> None:
        """Let the run come to its end and compare it with the undisturbed one."""
        (run,) = self.case.start(self.folder, *OFTEN)
        assert run.wait(LIMIT) == 0, run.text()
        self.case.check(self.folder)
        if self.best is not None:
            best = max(line["test_acc1"] for line in read_log(self.folder))
            assert read_checkpoint(self.folder / "checkpoint-best.pth")["state"]["best"] == best
        self.counts["runs"] += 1


@pytest.mark.parametrize("script", ["main_pretrain", "main_finetune"])
def test_kill_campaign(script, tmp_path, capsys):
    """kill -9 at random moments, about half of them while a file is being written."""
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
                campaign.look()
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


def sentence_of(run) -> str:
    """The one line that says why a run ended; there must be no trace of the program's inside."""
    text = run.text()
    assert "Traceback" not in text, text
    lines = [line for line in text.splitlines() if "Error: " in line]
    assert len(lines) == 1, text
    return lines[0].split("Error: ", 1)[1]


# Numbers that are not finite


def test_nan_on_one_rank(tmp_path):
    """All ranks end within 30 s and name the place and the last good checkpoint, which goes on."""
    case = undisturbed("main_pretrain", 2)
    start = time.monotonic()
    runs = case.start(tmp_path, *OFTEN, faults={1: {"nan_at": [STEPS + 1]}})
    assert [run.wait(30) for run in runs] == [1, 1]
    assert time.monotonic() - start < 30
    for run in runs:
        sentence = sentence_of(run)
        assert "Loss is nan" in sentence and "epoch 1, iteration 1;" in sentence
        path = tmp_path / "checkpoint.pth"
        assert f"the last checkpoint is {path} (resumes at epoch 1, iter" in sentence
    for run in case.start(tmp_path):
        assert run.wait() == 0
    losses = [values for _, _, values in read_steps(tmp_path / "steps.1")]
    assert sum("nan" in values for values in losses) == 1
    expected = read_steps(case.folder / "steps.0")
    assert {s for s in read_steps(tmp_path / "steps.0") if "nan" not in s[2]} == set(expected)


def test_skipped_steps(tmp_path):
    """--skip_nonfinite 2: two steps of an epoch change nothing and are counted; a third ends it."""
    case = undisturbed("main_pretrain", 2)
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
    assert "epoch 0, iteration 3; nothing was saved yet." in sentence_of(runs[1])


def test_skips_are_counted_over_a_resume(tmp_path):
    """What an epoch skipped before it was interrupted still counts after it went on."""
    case = undisturbed("main_pretrain")
    flags = [*OFTEN, "--skip_nonfinite", 1]
    (run,) = case.start(tmp_path, *flags, faults={0: {"nan_at": [0], "die_at": 2}})
    assert run.wait() == -signal.SIGKILL
    (run,) = case.start(tmp_path, *flags, faults={0: {"nan_at": [0]}})
    assert run.wait() == 1 and "epoch 0, iteration 2" in sentence_of(run)


# Places that cannot be written


@contextlib.contextmanager
def small_disk(folder, megabytes: int):
    """A disk of its own below the folder; skips where there may be none."""
    disk = folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def check_intact(path) -> None:
    checkpoint = read_checkpoint(path)
    assert all(value.isfinite().all() for value in checkpoint["model"].values())
    assert not list(path.parent.glob("*.tmp.*"))


@pytest.mark.parametrize("size", [1, 2])
def test_disk_too_small_for_a_second_file(size, tmp_path):
    """The first checkpoint fits, the second does not fit beside it."""
    case = undisturbed("main_finetune", size)
    with small_disk(tmp_path, 22) as disk:
        runs = case.start(tmp_path, "--output_dir", disk)
        assert [run.wait() for run in runs] == [1] * size
        assert f"Cannot write {disk}/checkpoint" in sentence_of(runs[0])
        assert "MiB free); the previous file is intact." in sentence_of(runs[0])
        assert size == 1 or "Rank 0 could not write" in sentence_of(runs[1])
        check_intact(disk / "checkpoint.pth")
        check_intact(disk / "checkpoint-best.pth")
        subprocess.run(["mount", "-o", "remount,size=99m", str(disk)], check=True)
        for run in case.start(tmp_path, "--output_dir", disk):
            assert run.wait() == 0
        shutil.copytree(disk, tmp_path, dirs_exist_ok=True)
    case.check(tmp_path)


def test_disk_full_to_the_brim(tmp_path):
    """Not even a line of the log fits any more."""
    case = undisturbed("main_pretrain")
    with small_disk(tmp_path, 60) as disk:
        (run,) = case.start(tmp_path, "--output_dir", disk, faults={0: {"delay": 0.1}})
        wait_until((disk / "checkpoint.pth").exists)
        with contextlib.suppress(OSError), open(disk / "other", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        assert run.wait() == 1
        sentence = sentence_of(run)
        assert f"Cannot write {disk}/log.txt (No space left" in sentence or (
            f"Cannot write TensorBoard's file in {disk} (" in sentence
        )
        (disk / "other").unlink()
        check_intact(disk / "checkpoint.pth")
        assert case.start(tmp_path, "--output_dir", disk)[0].wait() == 0
        shutil.copytree(disk, tmp_path, dirs_exist_ok=True)
    case.check(tmp_path)


def test_file_size_limit(tmp_path):
    """As a quota has it: torch reports what it cannot write in its own way."""
    case = undisturbed("main_pretrain")
    (run,) = case.start(tmp_path, faults={0: {"die_at": STEPS + 1}})
    assert run.wait() == -signal.SIGKILL
    before = (tmp_path / "checkpoint.pth").read_bytes()
    (run,) = case.start(tmp_path, faults={0: {"file_limit": 5 << 20}})
    assert run.wait() == 1
    assert f"Cannot write {tmp_path}/checkpoint.pth" in sentence_of(run)
    check_intact(tmp_path / "checkpoint.pth")
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


@pytest.mark.parametrize("size", [1, 2])
def test_folder_deleted(size, tmp_path):
    case = undisturbed("main_pretrain", size)
    folder = tmp_path / "out"
    faults = {rank: {"delay": 0.1} for rank in range(size)}
    runs = case.start(tmp_path, "--output_dir", folder, faults=faults)
    wait_until((folder / "checkpoint.pth").exists)
    shutil.rmtree(folder)
    assert [run.wait() for run in runs] == [1] * size
    sentence = sentence_of(runs[0])  # whichever file is written first
    assert sentence.startswith("Cannot write ") and f"{folder}" in sentence
    assert "No such file or directory" in sentence
    assert size == 1 or "lost another rank" in sentence_of(runs[1])


@pytest.mark.parametrize("kind", ["below a file", "read-only disk"])
def test_unwritable_folder(kind, tmp_path):
    """Found before the first step."""
    case = undisturbed("main_pretrain")
    with contextlib.ExitStack() as stack:
        if kind == "below a file":
            (tmp_path / "file").touch()
            folder = tmp_path / "file" / "out"
        else:
            folder = stack.enter_context(small_disk(tmp_path, 1))
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        (run,) = case.start(tmp_path, "--output_dir", folder)
        assert run.wait() == 1
        assert f"Cannot write to the output folder {folder} (" in sentence_of(run)
        assert not read_steps(tmp_path / "steps.0")


def test_folder_becomes_read_only(tmp_path):
    """While the run goes on; chattr does to root what permissions do to others."""
    case = undisturbed("main_pretrain")
    folder = tmp_path / "out"
    (run,) = case.start(tmp_path, "--output_dir", folder, *OFTEN, faults={0: {"delay": 0.1}})
    wait_until((folder / "checkpoint.pth").exists)
    if subprocess.run(["chattr", "+i", str(folder)], capture_output=True).returncode:
        run.kill()
        pytest.skip("needs chattr and a file system that knows it")
    try:
        assert run.wait() == 1
        assert f"Cannot write {folder}/checkpoint.pth (" in sentence_of(run)
    finally:
        subprocess.run(["chattr", "-i", str(folder)], check=True)
    check_intact(folder / "checkpoint.pth")


# Processes that do not answer


@pytest.mark.parametrize("rank", [0, 1])
def test_the_other_never_comes(rank, tmp_path):
    case = undisturbed("main_pretrain", 2)
    port = str(free_port())
    env = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = case.command(tmp_path, "--dist_timeout", 4)
    run = warm.start(command, tmp_path / "out.0", env)
    assert run.wait(30) == 1
    sentence = sentence_of(run)
    assert (
        f"Rank {rank} of 2 could not join the process group at 127.0.0.1:{port} within 4"
        in sentence
    )
    assert "--master_port" in sentence


def test_port_in_use(tmp_path):
    case = undisturbed("main_pretrain", 2)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        run = warm.start(case.command(tmp_path, "--dist_timeout", 4), tmp_path / "out.0", env)
        assert run.wait(30) == 1
    assert f"127.0.0.1:{port}" in sentence_of(run) and "that the port is free" in sentence_of(run)


def test_a_process_hangs(tmp_path):
    """A rank that stops answering ends the others after --dist_timeout, with a hint."""
    case = undisturbed("main_pretrain", 2)
    flags = [*OFTEN, "--dist_timeout", 5]
    runs = case.start(tmp_path, *flags, faults={1: {"freeze_at": STEPS + 1}})
    assert runs[0].wait(40) == 1
    runs[1].kill()
    sentence = sentence_of(runs[0])
    assert "Rank 0 of 2 (group at 127.0.0.1:" in sentence and "--dist_timeout" in sentence
    assert runs[1].wait() == -signal.SIGKILL
    for run in case.start(tmp_path):
        assert run.wait() == 0
    case.check(tmp_path)


@pytest.mark.slow  # torchrun and every generation of its ranks import anew: 30 to 90 s
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_restarts(rank, tmp_path):
    """A rank is killed: torchrun starts the group again and the run goes on by itself."""
    case = undisturbed("main_pretrain", 2)
    launcher = launch(case.command(tmp_path, *OFTEN), tmp_path / "out", "--max-restarts", 3)
    try:
        wait_until((tmp_path / "checkpoint.pth").exists, 180)
        os.kill(find_rank(launcher.pid, rank), signal.SIGKILL)
        assert launcher.wait(240) == 0, (tmp_path / "out").read_text()
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    text = (tmp_path / "out").read_text()
    assert "exactly where it stopped" in text
    assert [line["epoch"] for line in read_log(tmp_path)] == list(range(EPOCHS))
    case.check_files(tmp_path)


def find_rank(launcher: int, rank: int) -> int:
    """Process number of a rank that torchrun started."""
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError):
            with open(f"/proc/{name}/stat") as file:
                parent = int(file.read().rsplit(")", 1)[1].split()[1])
            with open(f"/proc/{name}/environ", "rb") as file:
                if parent == launcher and f"RANK={rank}".encode() in file.read().split(b"\0"):
                    return int(name)
    raise AssertionError(f"torchrun has no rank {rank}")
