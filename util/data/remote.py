"""Shards at a URL: each machine copies them once to a folder, and reads them from there.

The copies have the URL's path below that folder: of s3://bucket/set-{0000..0003}.tar they are
CACHE/s3/bucket/set-{0000..0003}.tar. A file there is complete, because it is renamed when its size
has been checked; so a second start needs no network, except to list a folder.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from util.data.shard_copy import Shard, copy_missing, could_not_read, locked
from util.data.shard_names import check_kinds, expand
from util.distributed import all_gather_objects
from util.io.errors import UserError

logger = logging.getLogger(__name__)

PACKAGES = dict(s3="s3fs", gs="gcsfs", gcs="gcsfs", http="aiohttp requests", hf="huggingface_hub")
PACKAGES |= dict(https=PACKAGES["http"], az="adlfs", abfs="adlfs")
POLL_SECONDS = 1.0


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
    check_kinds(source, [source], is_folder=False)
    if source.endswith(".tar") and "" not in parts:
        raise UserError(
            f"{source} names shards; labels are needed here: name the folder that holds their "
            f"{'/ and '.join(parts)}/."
        )
    protocol, _, path = source.partition("://")
    local = Path(cache, protocol, path.strip("/"))

    def copy(stop: threading.Event) -> None:
        file_system = open_file_system(source)
        if source.endswith(".tar"):
            urls, copies = expand(source), expand(str(local))
            shards = [Shard(url, Path(path)) for url, path in zip(urls, copies, strict=True)]
        else:
            shards = list_folder_shards(file_system, source, local, parts, any_part)
            refuse_others(shards, source)
        with locked(Path(cache), stop):
            copy_missing(file_system, shards, Path(cache), stop)

    run_together(copy)
    logger.info("%s is read from its copy %s", source, local)
    return str(local)


def refuse_others(shards: list[Shard], source: str) -> None:
    """Raises UserError for shards beside the copies that are not at the source any more."""
    copies = {shard.local for shard in shards}
    for folder in sorted({copy.parent for copy in copies}):
        for path in sorted(set(folder.glob("[!.]*.tar")) - copies):
            raise UserError(f"{path} is not at {source} any more; delete this copy.")


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
            is_busy = not done.is_set()  # before its error is read
            own = errors[:]  # what the other ranks will know
            states = all_gather_objects((is_busy, [*map(str, own)]))
            is_running, texts = zip(*states, strict=True)
            if own:
                raise own[0]
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
