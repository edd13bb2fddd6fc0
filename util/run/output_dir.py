"""The output folder of a run: made, locked, searched for a checkpoint, cleared of earlier runs."""

import argparse
import datetime
import fcntl
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterable
from pathlib import Path

from util.distributed import all_reduce_max
from util.io.checkpoint_file import read_checkpoint, read_position
from util.io.errors import CheckpointError, UserError
from util.io.files import atomic_write, remove_temporary_files

logger = logging.getLogger(__name__)

RUN_FILES = ("checkpoint*.pth", "log.txt", "run.json", "nonfinite.jsonl")
EVENTS = "events.out.tfevents.*"  # of TensorBoard


def prepare_output(args: argparse.Namespace) -> None:
    """Make the output folder and the TensorBoard folder, which defaults to it.

    Raises:
        UserError: a folder cannot be made or written to.
    """
    if args.log_dir is None:
        args.log_dir = args.output_dir
    for flag in ("output_dir", "log_dir"):
        if getattr(args, flag):
            make_writable(getattr(args, flag), flag)


def make_writable(folder: str, flag: str) -> None:
    """Make a folder and try to write to it.

    Raises:
        UserError: that failed; names the flag.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        # Ranks on several hosts may do this at once, in containers even with equal process ids.
        probe = Path(folder, f".writable.{platform.node()}.{os.getpid()}")
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"Cannot write to the output folder {folder} ({error.strerror}); "
            f"choose another --{flag}."
        ) from error


def lock_output_dir(args: argparse.Namespace):
    """Lock the output folder for this run; returns the open file that holds the lock, or None.

    A POSIX lock: it ends with the process, is not inherited by DataLoader workers, and works on
    NFS. File systems without locks are used unlocked.

    Raises:
        UserError: on every rank, if another run has locked the folder; names its host and process.
    """
    if not args.output_dir:
        return None
    file, holder = None, ""
    if args.rank == 0:
        file = open(Path(args.output_dir, ".lock"), "a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(f"host {platform.node()}, pid {os.getpid()}")
            file.flush()
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read() or "an unknown process"
        except OSError as error:
            logger.warning("Cannot lock %s (%s)", args.output_dir, error.strerror)
    (is_busy,) = all_reduce_max([bool(holder)], args.device)
    if is_busy:
        raise UserError(
            f"The output folder {args.output_dir} is in use by another run"
            f"{f' ({holder})' if holder else ''}; stop that run or choose another --output_dir."
        )
    return file


def resolve_resume(args: argparse.Namespace) -> dict | None:
    """Read the checkpoint of --resume; None without one.

    `auto`, the default of --replay, is replaced by the newest complete checkpoint in the output
    folder, or by ''.
    """
    if getattr(args, "replay", None) and args.output_dir and not args.resume:
        args.resume = "auto"
    if args.resume != "auto":
        return read_checkpoint(args.resume) if args.resume else None
    args.resume, checkpoint = find_newest(Path(args.output_dir))
    if not args.resume:
        logger.info("No checkpoint in %s yet: starting from scratch", args.output_dir)
    return checkpoint


def find_newest(folder: Path) -> tuple[str, dict | None]:
    """Path and content of the complete checkpoint with the latest epoch and iteration.

    Damaged files are named and skipped; ('', None) without a complete one. The files' times do not
    matter: clocks of hosts differ.
    """
    files = [p for p in folder.glob("checkpoint*.pth") if p.is_file()]
    files.sort(key=lambda p: (read_position(p), p.name == "checkpoint.pth"), reverse=True)
    for path in files:
        try:
            return str(path), read_checkpoint(path)
        except CheckpointError as error:
            logger.warning("Skipped: %s", error)
    return "", None


def remove_old_checkpoints(folder: Path, keep_last: int, epoch: int) -> None:
    """Delete all but the last `keep_last` of checkpoint-EPOCH.pth; 0 keeps all.

    Args:
        epoch: the current one; files of later epochs belong to another run and stay.
    """
    names = [p.stem.removeprefix("checkpoint-") for p in folder.glob("checkpoint-*.pth")]
    epochs = sorted(int(name) for name in names if name.isdecimal() and int(name) <= epoch)
    for old in epochs[:-keep_last] if keep_last else []:
        (folder / f"checkpoint-{old}.pth").unlink()


def clear_output_dir(args: argparse.Namespace, epoch: int) -> None:
    """Make room for a run that starts at this epoch; nothing of another run is overwritten.

    Rank 0 does it. Files of an earlier run move to previous-TIME/ inside the folder. Where an older
    checkpoint of the folder is resumed, that is what was written after it. Log lines of epochs
    that run again are dropped.
    """
    if args.rank or not args.output_dir:
        return
    folder = Path(args.output_dir)
    remove_temporary_files(folder)
    log = folder / "log.txt"
    is_resumed = bool(args.resume) and Path(args.resume).resolve().parent == folder.resolve()
    if is_resumed:
        resumed = read_position(Path(args.resume))
        later = [p for p in folder.glob("checkpoint*.pth") if read_position(p) > resumed]
        if later:
            move_to_previous(folder, later, copies=[log] if log.exists() else [])
        if log.exists():
            truncate_log(log, epoch)
        return
    earlier = [path for name in RUN_FILES for path in folder.glob(name)]
    if any(path.name != "run.json" for path in earlier):
        move_to_previous(folder, [*earlier, *folder.glob(EVENTS)])
    if args.log_dir and Path(args.log_dir) != folder:
        move_to_previous(Path(args.log_dir), Path(args.log_dir).glob(EVENTS))


def move_to_previous(folder: Path, paths: Iterable[Path], copies: Iterable[Path] = ()) -> None:
    """Move files that exist, or copy them, to a new folder/previous-TIME/."""
    paths = [path for path in paths if path.exists()]
    copies = list(copies)
    if not paths and not copies:
        return
    target = folder / f"previous-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
    target.mkdir()
    for path in copies:
        shutil.copy2(path, target / path.name)
    for path in paths:
        path.rename(target / path.name)
    logger.warning("Kept %d files of an earlier run in %s", len(paths) + len(copies), target)


def truncate_log(log: Path, first_epoch: int) -> None:
    """Keep the lines of epochs before first_epoch.

    Where another line than the last, which a kill may cut, is not one of log.txt, the whole log is
    kept in a previous-TIME folder.
    """
    lines = log.read_bytes().decode("utf-8", errors="replace").splitlines()
    epochs = [epoch_of(line) for line in lines]
    kept = [x for x, e in zip(lines, epochs, strict=True) if e is not None and e < first_epoch]
    if kept == lines:
        return
    if None in epochs[:-1]:
        logger.warning("%s has invalid lines, which are dropped", log)
        move_to_previous(log.parent, [], copies=[log])
    with atomic_write(log) as tmp_path:
        tmp_path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def epoch_of(line: str) -> int | None:
    """Epoch of a line of log.txt; None if it is not one."""
    try:
        epoch = json.loads(line)["epoch"]
    except (ValueError, TypeError, LookupError):
        return None
    return epoch if type(epoch) is int else None
