"""Images inside tar files (shards, as webdataset writes them), with random access.

Instead of reading the shards in sequence, every image is read through an index of where it starts:
an epoch has every image once in a fully shuffled order, for any number of ranks, and can be resumed
anywhere. Needs uncompressed tar files on a disk.
"""

import io
import os
import tarfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from util.data.image_io import is_array, is_image_name
from util.data.shard_names import find_shards
from util.distributed import all_gather_objects, get_rank, get_world_size
from util.io.errors import UserError, one_line

INDEX_ENTRY = np.dtype(  # shard index, then offsets and size in bytes
    [("shard", "i4"), ("header", "i8"), ("data", "i8"), ("size", "i8"), ("is_array", "?")]
    + [("label", "i4")]
)
INDEX_ERRORS = (  # what tarfile raises on damaged files
    *(OSError, tarfile.TarError, ValueError, LookupError, ArithmeticError),
    *(MemoryError, RecursionError),
)
MAX_LABEL = 200  # bytes of a KEY.cls member that are read


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
        try:
            with open(self.shard, "rb") as file:
                file.seek(self.header)
                return f"{self.shard}:{tarfile.open(fileobj=file, mode='r:').next().name}"
        except (OSError, tarfile.TarError, AttributeError):  # it changed since it was indexed
            return f"{self.shard} at byte {self.header}"


class ShardIndex(NamedTuple):
    """The images of one shard."""

    images: np.ndarray  # one INDEX_ENTRY per image; label: index of `names`, -1 without a label
    names: list[str]  # of classes
    has_cls: bool  # whether labels are KEY.cls members, not folders


class ShardSamples(Sequence):
    """(ShardMember, class index) of every image, in the order of the shards; 33 bytes of memory
    each.
    """

    def __init__(self, paths: list[str], index: np.ndarray, classes: list[str], unlabeled: str):
        """
        Args:
            index: one INDEX_ENTRY per image.
            classes: names by class index; empty where the images have no labels.
            unlabeled: why they have none, else "".
        """
        self.paths = paths
        self.index = index
        self.classes = classes
        self.unlabeled = unlabeled

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> tuple[ShardMember, int]:
        shard, *location, label = self.index[index].item()
        return ShardMember(self.paths[shard], *location), label

    def relabel(self, classes: list[str], labels: list[int]) -> "ShardSamples":
        """The same images with other class names; labels are the new ones by the old."""
        index = self.index.copy()
        index["label"] = np.array(labels)[index["label"]]
        return ShardSamples(self.paths, index, classes, self.unlabeled)

    @property
    def has_arrays(self) -> bool:
        """Whether any image is a NumPy array."""
        return bool(self.index["is_array"].any())


def read_shards(source: str) -> ShardSamples:
    """All images of the shards; every rank indexes a part of them (a collective call).

    Raises:
        UserError: a shard is damaged (raised on every rank) or missing, or none has an image.
    """
    paths = find_shards(source)
    own = [try_index(path) for path in paths[get_rank() :: get_world_size()]]
    parts = all_gather_objects(own)
    shards = [parts[i % len(parts)][i // len(parts)] for i in range(len(paths))]
    for path, shard in zip(paths, shards, strict=True):
        if isinstance(shard, str):
            raise UserError(f"Cannot read the shard {path} ({shard}); fetch it again.")
    classes, unlabeled = merge_labels(paths, shards)
    for number, shard in enumerate(shards):
        shard.images["shard"] = number
    if not any(len(shard.images) for shard in shards):
        raise UserError(
            f"There is no image in the {len(paths)} shards of {source}; check the pattern."
        )
    images = np.concatenate([shard.images for shard in shards])
    return ShardSamples(paths, images, classes, unlabeled)


def merge_labels(paths: list[str], shards: list[ShardIndex]) -> tuple[list[str], str]:
    """Class names of all shards, to which their labels are changed; or [] and why there are none.

    Names are sorted as those of class folders; numbers in KEY.cls by value, so that 0..K-1 are the
    class indices.
    """
    unlabeled = ""
    if len({shard.has_cls for shard in shards if len(shard.images)}) > 1:
        unlabeled = "only some of them hold KEY.cls members"
    for path, shard in zip(paths, shards, strict=True):
        missing = np.flatnonzero(shard.images["label"] < 0)
        if len(missing) and not unlabeled:
            _, *location, _ = shard.images[missing[0]].item()
            lacking = "no KEY.cls" if shard.has_cls else "neither KEY.cls nor a folder in its key"
            unlabeled = f"{ShardMember(path, *location)} has {lacking}"
    classes = sorted({name for shard in shards for name in shard.names})
    if any(shard.has_cls for shard in shards) and all(name.isdecimal() for name in classes):
        classes.sort(key=int)
    labels = {name: 0 if unlabeled else index for index, name in enumerate(classes)}
    for shard in shards:
        own = np.array([*map(labels.get, shard.names), 0], dtype="i4")  # the last for label -1
        shard.images["label"] = own[shard.images["label"]]
    return ([], unlabeled) if unlabeled else (classes, "")


def try_index(path: str) -> ShardIndex | str:
    """Index of one shard, or why it cannot be read."""
    try:
        return index_shard(path)
    except INDEX_ERRORS as error:
        return getattr(error, "strerror", None) or one_line(error)


def index_shard(path: str) -> ShardIndex:
    """Images and labels of a shard; members in hidden places are skipped.

    Hard links are followed to their bytes. Damaged shards and sparse members, whose bytes are not
    contiguous, raise tarfile.TarError, OSError or what tarfile raises for invalid headers.
    """
    entries, names, cls, size, end = [], [], {}, os.path.getsize(path), 0
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            end = end_of(member)
            name = member.name.removeprefix("./")
            is_label = name.endswith(".cls")
            if not (is_label or is_image_name(name)) or f"/{name}".count("/."):
                continue
            data = tar.getmember(member.linkname) if member.islnk() else member
            if not data.isreg():
                continue
            if data.issparse():
                raise tarfile.ReadError(f"{member.name} is sparse; pack it without tar's -S")
            if not 0 <= data.size <= size - data.offset_data:
                raise tarfile.ReadError(f"{member.name} claims {data.size} bytes, {size} are there")
            if is_label:
                tar.fileobj.seek(data.offset_data)
                text = tar.fileobj.read(min(data.size, MAX_LABEL))
                cls[name.removesuffix(".cls")] = text.decode(errors="backslashreplace").strip()
                continue
            entries.append((0, member.offset, data.offset_data, data.size, is_array(name), -1))
            names.append(name)
        tar.fileobj.seek(end)  # tarfile takes a damaged header as the end
        while rest := tar.fileobj.read(2**20):
            if rest.strip(b"\0"):
                raise tarfile.ReadError(f"it is damaged near byte {end}")
    images, labels = np.array(entries, dtype=INDEX_ENTRY), [label_of(name, cls) for name in names]
    classes = sorted(set(labels) - {""})
    ids = {name: index for index, name in enumerate(classes)}
    images["label"] = [ids.get(label, -1) for label in labels]
    return ShardIndex(images, classes, bool(cls))


def end_of(member: tarfile.TarInfo) -> int:
    """Byte of the tar file behind this member."""
    if member.isreg() or member.type not in tarfile.SUPPORTED_TYPES:
        num_blocks = -(-member.size // tarfile.BLOCKSIZE)
        return member.offset_data + num_blocks * tarfile.BLOCKSIZE
    return member.offset_data


def label_of(name: str, cls: dict[str, str]) -> str:
    """Label of the image member `name`, "" where it has none: the text of its KEY.cls where the
    shard holds such members, else the folder that holds the image.
    """
    folder, _, file = name.rpartition("/")
    if not cls:
        return folder.rpartition("/")[2]
    key = name[: len(name) - len(file)] + file.partition(".")[0]
    return cls.get(name.rpartition(".")[0], cls.get(key, ""))
