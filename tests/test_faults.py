"""Faults made for real: kills at random moments, full disks, lost folders, numbers gone wrong."""

import os
import random
import signal
import time

import pytest
from processes import EPOCHS, OFTEN, STEPS, read_log, read_steps, undisturbed

from util.checkpoint import read_checkpoint

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
        waiting = self.folder / f"checkpoint.pth.tmp.{run.pid}"
        wanted = before + self.random.randrange(0, 5)
        pause = self.random.uniform(0, 0.04)
        deadline = time.monotonic() + LIMIT

        def is_there():
            if len(read_steps(self.folder / "steps.0")) < wanted:
                return False
            return not while_saving or waiting.exists()

        while run.is_alive() and not is_there():
            assert time.monotonic() < deadline, run.text()
        time.sleep(pause)
        run.kill_group(signal.SIGKILL)
        code = run.wait(LIMIT)
        assert code in (0, -signal.SIGKILL), run.text()
        self.counts["kills"] += code != 0
        self.counts["saving"] += waiting.exists()
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
