"""From what the user names (folders, image files, lists, shards) to a list of images."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from util.data.image_io import is_image_name
from util.data.shard_names import is_shards
from util.data.shards import ShardMember, read_shards
from util.io.errors import UserError


class ImageList(NamedTuple):
    """Images with class indices (0 where there are no classes)."""

    samples: Sequence[tuple[str | ShardMember, int]]
    classes: list[str]  # names by index; empty without classes
    description: str  # where the images were found


def list_images(*sources: str | Path) -> ImageList:
    """Images of one or several sources, in a fixed order.

    A source is an image file, a list (.txt), a folder, or shards. One folder with images in its
    subfolders only has these subfolders as classes, shards have those of their labels if every
    image has one; several sources have none.

    Raises:
        UserError: a source does not exist, holds no image, or cannot be read.
    """
    lists = [list_source(str(source)) for source in sources]
    if len(lists) == 1:
        return lists[0]
    samples = [(path, 0) for images in lists for path, _ in images.samples]
    return ImageList(samples, [], f"in {len(sources)} places")


def list_source(source: str) -> ImageList:
    """Images of one source; see list_images."""
    if is_shards(source):
        refuse_mixture(source)
        samples = read_shards(source)
        description = f"in {len(samples.paths)} shards of {source}"
        return ImageList(samples, samples.classes, description)
    if os.path.isdir(source):
        return list_subfolders(source)
    try:
        os.stat(source)
    except OSError as error:
        raise UserError(f"Cannot read {source} ({error.strerror}); check the path.") from error
    if source.endswith(".txt"):
        return read_list(source)
    return ImageList([(source, 0)], [], f"of the file {source}")


def list_pretrain_images(data_path: str) -> ImageList:
    """Images to pre-train on: those of DATA/train where it exists, else of DATA.

    As list_images, but any text file is a list, class folders of DATA/train must not be empty, and
    elsewhere a tree deeper than folder/CLASS/image has no classes.

    Raises:
        UserError: as list_images, or there is a val/ without train/.
    """
    train = os.path.join(data_path, "train")
    has_train = os.path.isdir(train)
    source = train if has_train else data_path
    if is_shards(source):
        return list_source(source)._replace(classes=[])
    if os.path.isfile(source) and not is_image_name(source):
        return read_list(source)
    entries = list_folder(source) if os.path.isdir(source) else []
    if has_train and not any(is_image_name(entry.name) for entry in entries):
        return list_classes(source)
    if not has_train and any(entry.name == "val" for entry in entries):
        raise UserError(
            f"There is val/ but no train/ in {source}; --data_path must name the folder that holds "
            "train/, or one with nothing but training images."
        )
    images = list_source(source)
    if any(len(path_below(path, source)) > 2 for path, _ in images.samples):
        description = f"in the folders below {source} (without classes)"
        return ImageList([(path, 0) for path, _ in images.samples], [], description)
    return images


def list_classes(folder: str | Path) -> ImageList:
    """Images of folder/CLASS/, in any depth, for fine-tuning.

    Raises:
        UserError: there is no such folder, no class folder in it, or one without an image.
    """
    classes = find_classes(folder)
    samples = []
    for index, name in enumerate(classes):
        paths = list(find_images(os.path.join(folder, name)))
        if not paths:
            raise UserError(
                f"There is no image in the class folder {Path(folder, name)}; add some or "
                "remove it."
            )
        samples += [(path, index) for path in paths]
    return ImageList(samples, classes, f"in {len(classes)} class folders of {folder}")


def list_subfolders(folder: str) -> ImageList:
    """All images below a folder; subfolders are classes if the folder itself holds none."""
    paths = list(find_images(folder))
    if not paths:
        raise UserError(
            f"There is no image in {folder}; name a folder of images, a list of them, or shards."
        )
    parts = [path_below(path, folder) for path in paths]
    depths = {len(names) for names in parts}
    if 1 in depths:
        where = "in the flat folder" if depths == {1} else "in the folders below"
        return ImageList([(path, 0) for path in paths], [], f"{where} {folder} (without classes)")
    classes = sorted({names[0] for names in parts})
    labels = {name: index for index, name in enumerate(classes)}
    samples = [(path, labels[names[0]]) for path, names in zip(paths, parts, strict=True)]
    return ImageList(samples, classes, f"in {len(classes)} class folders of {folder}")


def path_below(path: str, folder: str) -> list[str]:
    """Parts of a path that find_images(folder) yields, relative to the folder."""
    return path.removeprefix(os.path.join(folder, "")).split(os.sep)


def read_list(path: str | Path) -> ImageList:
    """Images that a text file lists, one path a line, relative to the file's folder."""
    path = Path(path)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is neither a folder nor a text file with the path of an image on each line."
        ) from error
    names = [line for line in lines if line]
    invalid = [name for name in names if not is_image_name(name)]
    if invalid:
        raise UserError(f"The list {path} holds {invalid[0]!r}, not an image; remove the line.")
    if not names:
        raise UserError(f"There is no line in the list {path}; add the paths of the images.")
    return ImageList([(str(path.parent / name), 0) for name in names], [], f"of the list {path}")


def refuse_mixture(source: str) -> None:
    """Raises UserError if a folder holds both tar files and images of its own."""
    image = next(find_images(source), None) if os.path.isdir(source) else None
    if image is not None:
        raise UserError(
            f"{source} holds tar files and images (such as {image}); for the shards name them "
            f"('{source}/NAME-{{0000..0003}}.tar'), else move the tar files away."
        )


def find_classes(folder: str | Path) -> list[str]:
    """Sorted names of the visible class folders; UserError if it is unreadable or has none."""
    try:
        classes = [entry.name for entry in scan(folder) if is_folder(entry)]
    except OSError as error:
        raise UserError(
            f"Cannot read the folder {folder} ({error.strerror}); labels are needed here: "
            f"name a folder that holds {Path(folder).name}/CLASS/*."
        ) from error
    if not classes:
        raise UserError(
            f"There is no class folder in {folder}; labels are needed here: put the images of "
            "each class into a folder of its own there."
        )
    return classes


def find_images(folder: str | Path) -> Iterator[str]:
    """Paths of the images below a folder, in a fixed order; UserError if a folder cannot be read.

    Hidden entries, symlink cycles and folders reached a second time are skipped. Dangling symlinks
    are kept: they are images that cannot be read.
    """
    seen = {str(parent) for parent in Path(os.path.realpath(folder)).parents}
    stack = [str(folder)]
    while stack:
        current = stack.pop()
        real = os.path.realpath(current)
        if real in seen:
            continue
        seen.add(real)
        entries = list_folder(current)
        folders = {e.name for e in entries if is_folder(e)}
        yield from (e.path for e in entries if is_image_name(e.name) and e.name not in folders)
        stack += [e.path for e in reversed(entries) if e.name in folders]


def list_folder(folder: str | Path) -> list[os.DirEntry]:
    """Entries of a folder by name, without hidden ones; UserError if it cannot be read."""
    try:
        return scan(folder)
    except OSError as error:
        raise UserError(
            f"Cannot read the folder {folder} ({error.strerror}); correct its name or permissions."
        ) from error


def scan(folder: str | Path) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if e.name[0] != "."), key=lambda e: e.name)


def is_folder(entry: os.DirEntry) -> bool:
    """Whether it is a folder or a symlink to one; a symlink to itself is not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def evenly_spaced(items: Sequence, count: int) -> list:
    """At most `count` items, spread evenly over the sequence."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
