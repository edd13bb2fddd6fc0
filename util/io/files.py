"""Writing files that are complete or absent, and that reach the disk."""

import contextlib
import errno
import os
import platform
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from util.io.errors import UserError, one_line

TEMPORARY = re.compile(r"^\..*\.tmp\.[^/]+\.\d+(\.\w+)?$")


def temporary_path(path: Path) -> Path:
    """Hidden name beside `path`, with its suffix; processes of several hosts never share one."""
    return path.with_name(f".{path.stem}.tmp.{platform.node()}.{os.getpid()}{path.suffix}")


@contextlib.contextmanager
def atomic_write(
    path: str | Path, links: Sequence[str | Path] = (), parents: bool = True
) -> Iterator[Path]:
    """Yield a temporary path to write to; it becomes `path` when the block succeeds.

    The file is flushed to the disk, then renamed, so that a kill leaves the previous file or the
    new one. When the block fails, the temporary file is removed.

    Args:
        links: further names for the same file, set before `path` so that none is ever newer.
        parents: create the folder where it is missing.

    Raises:
        UserError: the file cannot be written; the previous one is intact.
    """
    path, links = Path(path), [Path(link) for link in links]
    tmp_path = temporary_path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        tmp_path.touch()
        mode = tmp_path.stat().st_mode  # the user's umask; some libraries set a mode of their own
        yield tmp_path
        tmp_path.chmod(mode)
        sync_file(tmp_path)
        for link in links:
            temporary_path(link).unlink(missing_ok=True)
            link_or_copy(tmp_path, temporary_path(link))
            os.replace(temporary_path(link), link)
        os.replace(tmp_path, path)
        sync_folder(path.parent)
    except OSError as error:
        previous = "; the previous file is intact" if path.is_file() else ""
        raise UserError(
            f"Cannot write {path} ({error.strerror or one_line(error)}; "
            f"{free_space(path.parent)}){previous}."
        ) from error
    finally:
        for leftover in (tmp_path, *map(temporary_path, links)):
            with contextlib.suppress(OSError):
                leftover.unlink()


def sync_file(path: Path) -> None:
    """Flush a file to the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a rename to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link; a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        shutil.copyfile(source, target)
        sync_file(target)


def remove_temporary_files(folder: Path) -> None:
    """Delete what killed writes left in a folder."""
    for path in folder.iterdir():
        if TEMPORARY.match(path.name):
            path.unlink(missing_ok=True)


def free_space(folder: Path) -> str:
    """Free disk space, for error messages."""
    try:
        disk = os.statvfs(folder)
    except OSError as error:
        return error.strerror
    return f"{disk.f_bavail * disk.f_frsize / 2**20:,.0f} MiB free"
