"""Which tar files a source means: a folder of shards, one of them, or a brace pattern."""

import itertools
import os
import re
from pathlib import Path

from util.io.errors import UserError

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
REMOTE = re.compile(r"^(pipe:|[a-z0-9]+://)")


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
    check_kinds(source, paths, is_folder)
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise UserError(
            f"There is no file {missing[0]} ({len(missing)} of {len(paths)} shards are missing); "
            "correct the pattern."
        )
    return paths


def check_kinds(source: str, paths: list[str], is_folder: bool) -> None:
    """Raises UserError if shards are compressed, or those of a folder are of several kinds."""
    compressed = [path for path in paths if path.endswith(COMPRESSED)]
    if compressed:
        raise UserError(f"{compressed[0]} is compressed, which has no random access; unpack it.")
    kinds = sorted({re.sub(r"([\d._-]+of)?[\d._-]*\.tar$", "", Path(path).name) for path in paths})
    if is_folder and len(kinds) > 1:
        raise UserError(
            f"{source} holds shards of several kinds ({', '.join(kinds[:3])}); name those to use, "
            f"such as '{source}/{kinds[0]}-{{0000..0003}}.tar'."
        )


def expand(pattern: str) -> list[str]:
    """The paths of a brace pattern: {0000..0003} counts, {a,b} lists."""
    if os.path.isfile(pattern):
        return [pattern]
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
