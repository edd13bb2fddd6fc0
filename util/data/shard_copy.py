"""Copying remote files to this machine, one process at a time; each is complete or absent."""

import contextlib
import errno
import fcntl
import logging
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from util.io.errors import UserError, one_line
from util.io.files import atomic_write, remove_temporary_files

logger = logging.getLogger(__name__)

CONNECTIONS = 16  # that ask for sizes at once
POLL_SECONDS = 0.5


class Shard(NamedTuple):
    remote: str  # path or URL, as its file system takes it
    local: Path


@contextlib.contextmanager
def locked(folder: Path, stop: threading.Event) -> Iterator[None]:
    """While inside, no other process copies to the folder; waits for it.

    The lock ends with the process that holds it.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    except OSError as error:
        raise UserError(
            f"Cannot write to --shard_cache {folder} ({error.strerror}); choose another folder."
        ) from error
    with file:
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if stop.wait(POLL_SECONDS):
                    raise
            except OSError as error:
                logger.warning("Cannot lock %s (%s)", folder, error.strerror)
                break
        yield


def copy_missing(file_system, shards: list[Shard], cache: Path, stop: threading.Event) -> None:
    """Copy the shards that are not there yet; nothing is copied if they do not all fit.

    Raises:
        UserError: with the URL, or with the size of the shards and of the free space.
    """
    missing = [shard for shard in shards if not shard.local.is_file()]
    if not missing:
        return
    for folder in {shard.local.parent for shard in missing}:
        if folder.is_dir():
            remove_temporary_files(folder)  # of killed copies: this process holds the lock
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        sizes = list(pool.map(lambda shard: ask_size(file_system, shard.remote), missing))
    free = shutil.disk_usage(cache).free
    if sum(sizes) > free:
        raise UserError(
            f"{len(missing)} shards to copy take {in_gib(sum(sizes))}, --shard_cache {cache} has "
            f"{in_gib(free)} free; make room, choose another folder, or name fewer shards."
        )
    text = f"{len(missing)} of {len(shards)} shards"
    sized = dict(total=sum(sizes), unit="B", unit_scale=True, unit_divisor=1024)
    with StoppableBar(desc=text, **sized) as bar:
        bar.stop = stop
        for shard, size in zip(missing, sizes, strict=True):
            copy_shard(file_system, shard, size, bar)


def ask_size(file_system, remote: str) -> int:
    try:
        size = file_system.size(remote)
    except Exception as error:
        raise could_not_read(remote, error) from error
    if size is None:
        raise UserError(f"The server does not tell the size of {remote}; copy it yourself.")
    return size


def in_gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB"


class StoppableBar(tqdm):
    """Bar of the bytes copied, whose update raises InterruptedError when `stop` is set."""

    stop = threading.Event()  # replaced

    def update(self, n: float = 1) -> bool | None:
        if self.stop.is_set():
            raise InterruptedError(errno.EINTR, "stopped")
        return super().update(n)


def copy_shard(file_system, shard: Shard, size: int, bar: StoppableBar) -> None:
    """Copy one shard; it appears complete or not at all."""
    from fsspec.callbacks import TqdmCallback  # the only kind that the Hub's fast download takes

    class OneBar(TqdmCallback):
        """The same bar for all shards."""

        def set_size(self, size) -> None:
            self.tqdm = bar

        def close(self) -> None:
            pass

    with atomic_write(shard.local) as tmp_path:
        try:
            file_system.get_file(shard.remote, str(tmp_path), callback=OneBar())
        except Exception as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise  # of this machine's disk
            raise could_not_read(shard.remote, error) from error
        if (got := tmp_path.stat().st_size) != size:
            raise UserError(
                f"{shard.remote} ended after {got:,} of {size:,} bytes; start again to copy it."
            )


def could_not_read(url: str, error: Exception) -> UserError:
    text = f"{type(error).__name__}: {one_line(error)}".removeprefix("Exception: ")
    return UserError(f"Cannot read {url} ({text}); check the URL, its access and the network.")
