"""Pictures inside tar files (shards, as webdataset writes them), each at random access.

An index of where every picture begins takes the place of reading the shards in order: an epoch
then has every picture once and in any order, for any number of processes, and can be resumed in
its middle. It needs uncompressed tar files on a disk, and nothing but the standard library.
"""

import io
import itertools
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.distributed as dist

from util.data.image_io import is_array, is_image_name
from util.distributed import get_rank, get_world_size
from util.io.errors import UserError

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
REMOTE = re.compile(r"^(pipe:|[a-z0-9]+://)")
ENTRY = np.dtype(  # of the index: number of the shard, then positions and size in bytes
    [("shard", "i4"), ("header", "i8"), ("start", "i8"), ("size", "i8"), ("is_array", "?")]
)


class Member(NamedTuple):
    """One picture of a shard; as text `shard.tar:name`."""

    shard: str
    header: int
    start: int
    size: int
    is_array: bool

    def open(self) -> io.BytesIO:
        """Its bytes as an open file."""
        with open(self.shard, "rb", buffering=0) as file:
            file.seek(self.start)
            return io.BytesIO(file.read(self.size))

    def __str__(self) -> str:
        with open(self.shard, "rb") as file:
            file.seek(self.header)
            return f"{self.shard}:{tarfile.open(fileobj=file, mode='r:').next().name}"


class ShardSamples(Sequence):
    """(Member, 0) of every picture, in the order of the shards; 29 bytes of memory for each."""

    def __init__(self, paths: list[str], index: np.ndarray):
        """
        Args:
            index: one ENTRY per picture.
        """
        self.paths = paths
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> tuple[Member, int]:
        shard, *where = self.index[number].item()
        return Member(self.paths[shard], *where), 0

    @property
    def has_arrays(self) -> bool:
        """Whether any of them is a NumPy array."""
        return bool(self.index["is_array"].any())


def is_shards(data_path: str) -> bool:
    """Whether --data_path names shards, and not a folder or a list of pictures."""
    names_shards = data_path.endswith((".tar", *PACKED)) or REMOTE.match(data_path)
    return bool(names_shards) or (Path(data_path).is_dir() and any(list_shards(data_path)))


def list_shards(folder: str | Path) -> list[str]:
    """The tar files that lie in a folder."""
    names = (".tar", *PACKED)
    return sorted(str(p) for p in Path(folder).iterdir() if p.name.endswith(names))


def find_shards(data_path: str) -> list[str]:
    """The shards that a pattern such as name-{0000..0003}.tar or a folder means.

    Raises:
        UserError: they are not on a disk, packed, or of several kinds.
        UserError: one is missing.
    """
    if REMOTE.match(data_path):
        raise UserError(
            f"--data_path {data_path} is not on a disk; copy the shards, or mount the place where "
            "they are and name the folder."
        )
    is_folder = Path(data_path).is_dir()
    paths = list_shards(data_path) if is_folder else expand(data_path)
    packed = [path for path in paths if path.endswith(PACKED)]
    if packed:
        raise UserError(f"{packed[0]} is packed, so no picture can be found in it; unpack it.")
    kinds = sorted({re.sub(r"[\d._-]*\.tar$", "", Path(path).name) for path in paths})
    if is_folder and len(kinds) > 1:
        raise UserError(
            f"{data_path} holds shards of several kinds ({', '.join(kinds[:3])}); name those to "
            f"train on, such as --data_path '{data_path}/{kinds[0]}-{{0000..0003}}.tar'."
        )
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise UserError(
            f"There is no file {missing[0]} ({len(missing)} of {len(paths)} shards are missing); "
            "correct --data_path."
        )
    return paths


def expand(pattern: str) -> list[str]:
    """Names that a brace pattern means: {0000..0003} counts, {a,b} lists."""
    parts = re.split(r"\{([^{}]*)\}", pattern)  # outside, inside, outside, ...
    choices = [list_choices(part) if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(words) for words in itertools.product(*choices)]


def list_choices(inside: str) -> list[str]:
    """What stands for one pair of braces."""
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if not numbers:
        return inside.split(",")
    first, last = numbers.groups()
    if int(last) < int(first):
        raise UserError(f"{{{inside}}} counts down; write {{{last}..{first}}}.")
    return [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]


def read_shards(data_path: str) -> ShardSamples:
    """All pictures of the shards; the processes share the work of looking for them.

    Raises:
        UserError: a shard is damaged; on every process.
        UserError: a shard is missing, or none has a picture.
    """
    paths = find_shards(data_path)
    own = [try_index(path) for path in paths[get_rank() :: get_world_size()]]
    parts = [own]
    if get_world_size() > 1:
        parts = [None] * get_world_size()
        dist.all_gather_object(parts, own)
    indexes = [parts[i % len(parts)][i // len(parts)] for i in range(len(paths))]
    for path, index in zip(paths, indexes, strict=True):
        if isinstance(index, str):
            raise UserError(f"Cannot read the shard {path} ({index}); fetch it again.")
    for number, index in enumerate(indexes):
        index["shard"] = number
    samples = ShardSamples(paths, np.concatenate(indexes))
    if not len(samples):
        raise UserError(f"There is no picture in the {len(paths)} shards of {data_path}.")
    return samples


def try_index(path: str) -> np.ndarray | str:
    """Index of one shard, or what is wrong with it."""
    try:
        return index_shard(path)
    except (OSError, tarfile.TarError) as error:
        return getattr(error, "strerror", None) or str(error)


def index_shard(path: str) -> np.ndarray:
    """One ENTRY per picture of a shard; hidden members do not count.

    Raises:
        OSError, tarfile.TarError: it cannot be read to its end.
    """
    entries = []
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            name = member.name.rsplit("/", 1)[-1]
            if member.isreg() and is_image_name(name) and name[0] != ".":
                where = member.offset, member.offset_data, member.size, is_array(name)
                entries.append((0, *where))
        tar.fileobj.seek(tar.offset)  # tarfile takes a damaged header for the end
        while rest := tar.fileobj.read(2**20):
            if rest.strip(b"\0"):
                raise tarfile.ReadError(f"it is damaged near byte {tar.offset}")
    return np.array(entries, dtype=ENTRY)
