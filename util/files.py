"""Writing files that are whole or not there, and reach the disk."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A name to write to. It becomes `path` when the block ends well and is removed otherwise.

    Raises:
        OSError: the place cannot be written to; before the block begins.
    """
    path = Path(path)
    waiting = path.with_name(f"{path.stem}.tmp.{os.getpid()}{path.suffix}")
    if path.is_dir():
        raise OSError(f"Cannot write {path}: it is a folder; name a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        waiting.touch()
        mode = waiting.stat().st_mode  # as the user's umask has it; some libraries set their own
    except OSError as error:
        raise OSError(f"Cannot write {path} ({error.strerror}); choose another place.") from error
    try:
        yield waiting
        waiting.chmod(mode)
        with open(waiting, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(waiting, path)
        sync_folder(path.parent)
    finally:
        waiting.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step, so that a kill leaves the old one or the new one."""
    waiting = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    with open(waiting, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(waiting, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring a rename to the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file; a copy where the file system knows no such thing."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        shutil.copyfile(source, target)
        with open(target, "rb+") as file:
            os.fsync(file.fileno())


def room_left(folder: Path) -> str:
    try:
        disk = os.statvfs(folder)
    except OSError as error:
        return error.strerror
    return f"{disk.f_bavail * disk.f_frsize / 2**20:,.0f} MiB left there"
