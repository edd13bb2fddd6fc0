"""Shards at a URL: each machine copies them once to a folder, and reads them from there.

The copies have the URL's path below that folder: of s3://bucket/set-{0000..0003}.tar they are
CACHE/s3/bucket/set-{0000..0003}.tar. A file there is complete, because it is renamed when its size
has been checked; so a second start needs no network, except to list a folder.
"""

import errno
import fcntl
import logging
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from util.data.shard_names import check_kinds, expand
from util.distributed import all_gather_objects
from util.io.errors import UserError, one_line
from util.io.files import atomic_write, remove_temporary_files

logger = logging.getLogger(__name__)

PACKAGES = dict(s3="s3fs", gs="gcsfs", gcs="gcsfs", http="aiohttp requests", hf="huggingface_hub")
PACKAGES |= dict(https=PACKAGES["http"], az="adlfs", abfs="adlfs")
CONNECTIONS = 16  # that ask for sizes at once
POLL_SECONDS = 1.0


class Shard(NamedTuple):
    remote: str  # path or URL, as its file system takes it
    local: Path


def localize(source: str, cache: str | None, *parts: str, any_part: bool = False) -> str:
    """The source itself; for a URL the local copy of its shards (a collective call).

    Args:
        source: what --data_path names; of a URL a pattern of shards, or a folder.
        cache: --shard_cache.
        parts: folders below a remote folder that are needed, such as "train"; "" for itself.
        any_part: the first part that holds shards is enough.

    Raises:
        UserError: on every rank, with the URL: it cannot be read, or the shards do not fit.
    """
    if "://" not in source or source.startswith("pipe:"):
        return source
    if not cache:
        raise UserError(
            f"{source} is not on this machine; add --shard_cache DIR, a folder for a copy of it."
        )
    if ".." in source.split("/"):
        raise UserError(f"{source} holds '..'; write the URL without.")
    protocol, _, path = source.partition("://")
    local = Path(cache, protocol, path.strip("/"))

    def copy(stop: threading.Event) -> None:
        file_system = open_file_system(source)
        if source.endswith(".tar"):
            urls, copies = expand(source), expand(str(local))
            shards = [Shard(url, Path(path)) for url, path in zip(urls, copies, strict=True)]
        else:
            shards = list_folder_shards(file_system, source, local, parts, any_part)
        with locked(Path(cache), stop):
            copy_missing(file_system, shards, Path(cache), stop)

    if source.endswith(".tar") and "" not in parts:
        raise UserError(
            f"{source} names shards; labels are needed here: name the folder that holds their "
            f"{'/ and '.join(parts)}/."
        )
    run_together(copy)
    logger.info("%s is read from its copy %s", source, local)
    return str(local)


def run_together(work: Callable[[threading.Event], None]) -> None:
    """Call `work` on every rank until all are done (a collective call).

    It runs in a thread while the ranks keep in touch, so that they may take longer than
    --dist_timeout and an error of one is raised on all. `work` should end early when the event that
    it is given is set.
    """
    errors, stop, done = [], threading.Event(), threading.Event()

    def target() -> None:
        try:
            work(stop)
        except Exception as error:  # raised below, on the main thread
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=target, daemon=True).start()
    try:
        is_running = [True]
        while any(is_running):
            done.wait(POLL_SECONDS)
            own = not done.is_set()  # before its error is read
            is_running, texts = zip(*all_gather_objects((own, [*map(str, errors)])), strict=True)
            if errors:
                raise errors[0]
            if failed := [text for text in texts if text]:
                raise UserError(failed[0][0])
    finally:
        stop.set()
        done.wait(5)


def open_file_system(source: str):
    """The fsspec file system of a URL; UserError where its package is missing."""
    from fsspec.core import url_to_fs

    protocol = source.partition("://")[0]
    try:
        return url_to_fs(source)[0]
    except ImportError as error:
        package = PACKAGES.get(protocol, f"fsspec[{protocol}]")
        raise UserError(f"{source} needs a package: pip install {package}") from error
    except Exception as error:  # file systems have no common base class of errors
        raise could_not_read(source, error) from error


def could_not_read(url: str, error: Exception) -> UserError:
    text = f"{type(error).__name__}: {one_line(error)}".removeprefix("Exception: ")
    return UserError(f"Cannot read {url} ({text}); check the URL, its access and the network.")


def list_folder_shards(
    file_system, source: str, local: Path, parts: Sequence[str], any_part: bool
) -> list[Shard]:
    """The shards of a remote folder, or of the folders in it."""
    shards = []
    for part in parts:
        folder = "/".join([source.rstrip("/"), *filter(None, [part])])
        try:
            paths = sorted(file_system.glob(f"{folder}/*.tar"))
        except FileNotFoundError:
            paths = []
        except Exception as error:
            raise could_not_read(folder, error) from error
        check_kinds(folder, paths, is_folder=True)
        urls = map(file_system.unstrip_protocol, paths)
        shards += [Shard(url, Path(local, part, Path(url).name)) for url in urls]
        if shards and any_part:
            break
        if not (paths or any_part):
            raise UserError(f"There is no .tar file in {folder}; labels are needed here.")
    if not shards:
        raise UserError(f"There is no .tar file in {source}; check the URL.")
    return shards


class locked:
    """Context in which no other process of this machine copies to the folder; waits for it.

    The lock ends with the process that holds it.
    """

    def __init__(self, folder: Path, stop: threading.Event):
        self.folder = folder
        self.stop = stop

    def __enter__(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = open(self.folder / ".lock", "w")
        except OSError as error:
            raise UserError(
                f"Cannot write to --shard_cache {self.folder} ({error.strerror}); choose another."
            ) from error
        while True:
            try:
                return fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                if self.stop.wait(POLL_SECONDS / 2):
                    raise

    def __exit__(self, *_) -> None:
        self.file.close()


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
