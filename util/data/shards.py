"""Images inside tar files (shards, as webdataset writes them), with random access.

Instead of reading the shards in sequence, every image is read through an index of where it starts:
an epoch has every image once in a fully shuffled order, for any number of ranks, and can be resumed
anywhere. Needs uncompressed tar files on a disk.
"""

import io
import itertools
import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from util.data.image_io import is_array, is_image_name
from util.distributed import all_gather_objects, get_rank, get_world_size
from util.io.errors import UserError, one_line

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
REMOTE = re.compile(r"^(pipe:|[a-z0-9]+://)")
INDEX_ENTRY = np.dtype(  # shard index, then offsets and size in bytes
    [("shard", "i4"), ("header", "i8"), ("data", "i8"), ("size", "i8"), ("is_array", "?")]
)


class ShardMember(NamedTuple):
    """One image of a shard; as text `shard.tar:name`."""

    shard: str
    header: int  # offset in bytes
    data: int  # offset in bytes
    size: int
    is_array: bool

    def open(self) -> io.BytesIO:
        """Its bytes as an open file."""
        with open(self.shard, "rb", buffering=0) as file:
            file.seek(self.data)
            return io.BytesIO(file.read(self.size))

    def __str__(self) -> str:
        with open(self.shard, "rb") as file:
            file.seek(self.header)
            return f"{self.shard}:{tarfile.open(fileobj=file, mode='r:').next().name}"


class ShardSamples(Sequence):
    """(ShardMember, 0) of every image, in the order of the shards; 29 bytes of memory each."""

    def __init__(self, paths: list[str], index: np.ndarray):
        self.paths = paths
        self.index = index  # one INDEX_ENTRY per image

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> tuple[ShardMember, int]:
        shard, *location = self.index[index].item()
        return ShardMember(self.paths[shard], *location), 0

    @property
    def has_arrays(self) -> bool:
        """Whether any image is a NumPy array."""
        return bool(self.index["is_array"].any())


def is_shards(source: str) -> bool:
    """Whether the source is a pattern of shards or a folder that holds some."""
    names_shards = source.endswith((".tar", *COMPRESSED)) or REMOTE.match(source)
    return bool(names_shards) or (Path(source).is_dir() and any(list_shards(source)))


def list_shards(folder: str | Path) -> list[str]:
    """The tar files in a folder; none where it cannot be read."""
    try:
        names = sorted(os.listdir(folder))
    except PermissionError:
        return []
    tars = [n for n in names if n.endswith((".tar", *COMPRESSED)) and not n.startswith(".")]
    return [path for path in (os.path.join(folder, n) for n in tars) if os.path.isfile(path)]


def find_shards(source: str) -> list[str]:
    """The shards of a folder or a pattern such as name-{0000..0003}.tar.

    Raises:
        UserError: they are not on a disk, compressed, of several kinds, or one is missing.
    """
    if REMOTE.match(source):
        raise UserError(
            f"{source} is not on a disk; copy the shards, or mount the place where they are and "
            "name the folder."
        )
    is_folder = Path(source).is_dir()
    paths = list_shards(source) if is_folder else expand(source)
    compressed = [path for path in paths if path.endswith(COMPRESSED)]
    if compressed:
        raise UserError(f"{compressed[0]} is compressed, which has no random access; unpack it.")
    kinds = sorted({re.sub(r"[\d._-]*\.tar$", "", Path(path).name) for path in paths})
    if is_folder and len(kinds) > 1:
        raise UserError(
            f"{source} holds shards of several kinds ({', '.join(kinds[:3])}); name those to use, "
            f"such as '{source}/{kinds[0]}-{{0000..0003}}.tar'."
        )
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise UserError(
            f"There is no file {missing[0]} ({len(missing)} of {len(paths)} shards are missing); "
            "correct the pattern."
        )
    return paths


def expand(pattern: str) -> list[str]:
    """The paths of a brace pattern: {0000..0003} counts, {a,b} lists."""
    parts = re.split(r"\{([^{}]*)\}", pattern)  # outside, inside, outside, ...
    choices = [expand_braces(part) if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(words) for words in itertools.product(*choices)]


def expand_braces(inside: str) -> list[str]:
    """Alternatives of one pair of braces."""
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if not bounds:
        return inside.split(",")
    first, last = bounds.groups()
    if int(last) < int(first):
        raise UserError(f"{{{inside}}} counts down; write {{{last}..{first}}}.")
    return [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]


def read_shards(source: str) -> ShardSamples:
    """All images of the shards; every rank indexes a part of them (a collective call).

    Raises:
        UserError: a shard is damaged (raised on every rank) or missing, or none has an image.
    """
    paths = find_shards(source)
    own = [try_index(path) for path in paths[get_rank() :: get_world_size()]]
    parts = all_gather_objects(own)
    indexes = [parts[i % len(parts)][i // len(parts)] for i in range(len(paths))]
    for shard, index in enumerate(indexes):
        if isinstance(index, str):
            raise UserError(f"Cannot read the shard {paths[shard]} ({index}); fetch it again.")
        index["shard"] = shard
    samples = ShardSamples(paths, np.concatenate(indexes))
    if not len(samples):
        raise UserError(
            f"There is no image in the {len(paths)} shards of {source}; check the pattern."
        )
    return samples


def try_index(path: str) -> np.ndarray | str:
    """Index of one shard, or why it cannot be read."""
    try:
        return index_shard(path)
    except (OSError, tarfile.TarError, ValueError, LookupError, ArithmeticError) as error:
        return getattr(error, "strerror", None) or one_line(error)


def index_shard(path: str) -> np.ndarray:
    """One INDEX_ENTRY per image of a shard; members in hidden places are skipped.

    Hard links are followed to their bytes. Damaged shards and sparse members, whose bytes are not
    contiguous, raise tarfile.TarError, OSError or what tarfile raises for invalid headers.
    """
    entries, size = [], os.path.getsize(path)
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            parts = member.name.removeprefix("./").split("/")
            if not is_image_name(parts[-1]) or any(part.startswith(".") for part in parts):
                continue
            data = tar.getmember(member.linkname) if member.islnk() else member
            if not data.isreg():
                continue
            if data.issparse():
                raise tarfile.ReadError(f"{member.name} is sparse; pack it without tar's -S")
            if not 0 <= data.size <= size - data.offset_data:
                raise tarfile.ReadError(f"{member.name} claims {data.size} bytes, {size} are there")
            entries.append((0, member.offset, data.offset_data, data.size, is_array(parts[-1])))
        tar.fileobj.seek(tar.offset)  # tarfile takes a damaged header as the end
        while rest := tar.fileobj.read(2**20):
            if rest.strip(b"\0"):
                raise tarfile.ReadError(f"it is damaged near byte {tar.offset}")
    return np.array(entries, dtype=INDEX_ENTRY)
