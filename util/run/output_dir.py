"""The output folder of a run: made, searched for a checkpoint to resume, and cleaned."""

import argparse
import datetime
import json
import logging
import os
import platform
from pathlib import Path

from util.io.checkpoint_file import read_checkpoint
from util.io.errors import CheckpointError, UserError
from util.io.files import atomic_write, remove_temporary_files

logger = logging.getLogger(__name__)


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


def resolve_resume(args: argparse.Namespace) -> dict | None:
    """Replace `--resume auto` by the newest complete checkpoint; returns its content.

    Without one, args.resume becomes '' and None is returned.
    """
    if args.resume != "auto":
        return None
    args.resume, checkpoint = find_newest(Path(args.output_dir))
    if not args.resume:
        logger.info("No checkpoint in %s yet: starting from scratch", args.output_dir)
    return checkpoint


def find_newest(folder: Path) -> tuple[str, dict | None]:
    """Path and content of the newest complete checkpoint in a folder; ('', None) without one.

    Damaged files are named and skipped.
    """
    files = [p for p in folder.glob("checkpoint*.pth") if p.is_file()]
    for path in sorted(files, key=lambda p: p.stat().st_mtime_ns, reverse=True):
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
        (folder / f"checkpoint-{old}.pth").unlink(missing_ok=True)


def clean_output_dir(args: argparse.Namespace, first_epoch: int) -> None:
    """Remove what an interrupted run left: temporary files, and log lines of epochs to be rerun.

    Rank 0 does it. Where another run wrote to the folder, its log.txt is renamed.
    """
    if args.rank or not args.output_dir:
        return
    folder = Path(args.output_dir)
    remove_temporary_files(folder)
    log = folder / "log.txt"
    is_resumed = bool(args.resume) and Path(args.resume).resolve().parent == folder.resolve()
    if is_resumed:
        if log.exists():
            truncate_log(log, first_epoch)
        return
    if (folder / "checkpoint.pth").exists():
        logger.warning(
            "%s holds a run already; this one replaces its checkpoint.pth (--resume auto would "
            "continue it)",
            folder,
        )
    if log.exists():
        ended = datetime.datetime.fromtimestamp(log.stat().st_mtime)
        renamed = log.with_name(f"log-until-{ended:%Y%m%d-%H%M%S}.txt")
        log.replace(renamed)
        logger.warning("The log of the previous run is now %s", renamed)


def truncate_log(log: Path, first_epoch: int) -> None:
    """Keep the complete lines of epochs before first_epoch."""
    lines = log.read_text(encoding="utf-8").splitlines()
    kept = [
        line for line in lines if line.endswith("}") and json.loads(line)["epoch"] < first_epoch
    ]
    if kept != lines:
        with atomic_write(log) as tmp_path:
            tmp_path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
