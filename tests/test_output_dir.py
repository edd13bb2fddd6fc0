"""Output folders: earlier runs are moved and never overwritten, one run at a time, newest found."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from util.io.checkpoint_file import read_position
from util.io.errors import UserError
from util.run.output_dir import (
    clear_output_dir,
    find_newest,
    lock_output_dir,
    remove_old_checkpoints,
    truncate_log,
)

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def write_run(folder: Path, epochs: int, best: int = 0) -> None:
    """Files of a run that has finished so many epochs; its best epoch has a file of its own."""
    folder.mkdir(exist_ok=True)
    names = {"checkpoint.pth": epochs - 1, "checkpoint-best.pth": best}
    names |= {f"checkpoint-{epoch}.pth": epoch for epoch in range(epochs)}
    for name, epoch in names.items():
        torch.save({"model": {}, "epoch": epoch}, folder / name)
    lines = [json.dumps({"epoch": epoch}) for epoch in range(epochs)]
    (folder / "log.txt").write_text("".join(f"{line}\n" for line in lines))
    (folder / "run.json").write_text("{}")
    (folder / "events.out.tfevents.1.host").write_text("curves")


def run_args(folder: Path, resume: str = "") -> Namespace:
    return Namespace(rank=0, output_dir=str(folder), log_dir=str(folder), resume=resume, device=CPU)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def epochs_in(log: Path) -> list[int]:
    return [json.loads(line)["epoch"] for line in log.read_text().splitlines()]


def test_a_new_run_moves_the_earlier_one(tmp_path, caplog):
    """Also when the new run resumes from another folder; and twice in the same second."""
    folder = tmp_path / "out"
    for _ in range(2):
        write_run(folder, 2)
        before = names_in(folder) - {x for x in names_in(folder) if x.startswith("previous-")}
        for path in folder.iterdir():
            os.utime(path, (10**9, 10**9))
        clear_output_dir(run_args(folder, resume=str(tmp_path / "other/checkpoint.pth")), 1)
        assert all(name.startswith("previous-") for name in names_in(folder))
    first, second = sorted(folder.iterdir())
    assert names_in(first) == names_in(second) == before
    assert f"Kept 7 files of an earlier run in {first}" in caplog.text


def test_curves_in_a_folder_of_their_own_move_too(tmp_path):
    folder, curves = tmp_path / "out", tmp_path / "curves"
    write_run(folder, 1)
    write_run(curves, 1)
    args = run_args(folder)
    args.log_dir = str(curves)
    clear_output_dir(args, 0)
    (previous,) = (path for path in curves.iterdir() if path.name.startswith("previous-"))
    assert names_in(previous) == {"events.out.tfevents.1.host"}  # nothing else there is ours
    assert "checkpoint.pth" in names_in(curves)
    assert all(name.startswith("previous-") for name in names_in(folder))


def test_a_resumed_run_moves_nothing(tmp_path):
    write_run(tmp_path, 3, best=1)
    before = names_in(tmp_path)
    clear_output_dir(run_args(tmp_path, resume=str(tmp_path / "checkpoint.pth")), 3)
    assert names_in(tmp_path) == before and epochs_in(tmp_path / "log.txt") == [0, 1, 2]


def test_resuming_an_older_checkpoint_keeps_what_came_after(tmp_path, caplog):
    """Without this, the best model and the log of later epochs are gone."""
    write_run(tmp_path, 8, best=3)
    clear_output_dir(run_args(tmp_path, resume=str(tmp_path / "checkpoint-0.pth")), 1)
    (previous,) = (path for path in tmp_path.iterdir() if path.is_dir())
    later = {f"checkpoint-{epoch}.pth" for epoch in range(1, 8)}
    assert names_in(previous) == later | {"checkpoint.pth", "checkpoint-best.pth", "log.txt"}
    assert epochs_in(previous / "log.txt") == list(range(8))
    assert epochs_in(tmp_path / "log.txt") == [0]
    assert "checkpoint-0.pth" in names_in(tmp_path)
    assert str(previous) in caplog.text


def test_a_restarted_epoch_keeps_the_resumed_checkpoint(tmp_path):
    """With another batch size the interrupted epoch starts over, from the file it was saved in."""
    write_run(tmp_path, 2)
    torch.save({"model": {}, "epoch": 1, "state": {"iteration": 3}}, tmp_path / "checkpoint.pth")
    before = names_in(tmp_path)
    clear_output_dir(run_args(tmp_path, resume=str(tmp_path / "checkpoint.pth")), 2)
    assert names_in(tmp_path) == before


def test_an_older_best_checkpoint_stays(tmp_path):
    write_run(tmp_path, 8, best=2)
    clear_output_dir(run_args(tmp_path, resume=str(tmp_path / "checkpoint-4.pth")), 5)
    assert "checkpoint-best.pth" in names_in(tmp_path)
    assert read_position(tmp_path / "checkpoint-best.pth") == (3, 0)


def test_line_of_an_epoch_that_was_not_saved_is_dropped(tmp_path):
    """The usual kill between the log line and the checkpoint."""
    write_run(tmp_path, 2)
    with open(tmp_path / "log.txt", "a") as log:
        log.write('{"epoch": 2}\n{"epo')
    before = names_in(tmp_path)
    clear_output_dir(run_args(tmp_path, resume=str(tmp_path / "checkpoint.pth")), 2)
    assert names_in(tmp_path) == before and epochs_in(tmp_path / "log.txt") == [0, 1]


@pytest.mark.parametrize("bad", [b"\0\0\0\0", b"\xff\xfe{", b"{}", b"[3]", b'{"epoch": "1"}', b""])
def test_invalid_lines_of_a_log(bad, tmp_path):
    """NULs as a power cut leaves them, invalid UTF-8, foreign JSON: the rest is kept."""
    log = tmp_path / "log.txt"
    content = b'{"epoch": 0}\n' + bad + b'\n{"epoch": 1}\n'
    log.write_bytes(content)
    truncate_log(log, 2)
    assert epochs_in(log) == [0, 1]
    (copy,) = tmp_path.glob("previous-*/log.txt")
    assert copy.read_bytes() == content


def test_newest_is_decided_by_content(tmp_path):
    """Not by the files' times, which another host's clock may have set."""
    for name, epoch, iteration in (("0", 0, 0), ("3", 3, 0), ("best", 1, 0), ("7", 2, 5)):
        path = tmp_path / f"checkpoint-{name}.pth"
        torch.save({"model": {}, "epoch": epoch, "state": {"iteration": iteration}}, path)
        os.utime(path, (2e9 - epoch, 2e9 - epoch))
    assert find_newest(tmp_path)[0] == str(tmp_path / "checkpoint-3.pth")
    torch.save({"model": {}, "epoch": 3}, tmp_path / "checkpoint.pth")
    assert find_newest(tmp_path)[0] == str(tmp_path / "checkpoint.pth")
    (tmp_path / "checkpoint.pth").write_bytes(b"broken")
    assert find_newest(tmp_path)[0] == str(tmp_path / "checkpoint-3.pth")


def test_kept_files_of_an_earlier_run_do_not_count(tmp_path):
    for epoch in (0, 1, 2, 8, 9):
        (tmp_path / f"checkpoint-{epoch}.pth").touch()
    (tmp_path / "checkpoint-best.pth").touch()
    remove_old_checkpoints(tmp_path, keep_last=2, epoch=2)
    kept = {"checkpoint-1.pth", "checkpoint-2.pth", "checkpoint-8.pth", "checkpoint-9.pth"}
    assert names_in(tmp_path) == kept | {"checkpoint-best.pth"}


HOLD = """
import sys, torch
from argparse import Namespace
from util.run.output_dir import lock_output_dir
lock = lock_output_dir(Namespace(rank=0, output_dir=sys.argv[1], device=torch.device("cpu")))
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_folder_in_use_is_refused(tmp_path):
    """By another process, until that one is gone, however it ends."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as holder:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=rf"in use by another run \(host .*, pid {holder.pid}"):
            lock_output_dir(run_args(tmp_path))
        holder.kill()
        holder.wait()
        lock_output_dir(run_args(tmp_path)).close()
