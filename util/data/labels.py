"""Images with labels, for fine-tuning, evaluation and k-nearest neighbors."""

import functools
from pathlib import Path

from util.data.shard_names import is_shards
from util.data.shards import ShardSamples
from util.data.sources import (
    ImageList,
    find_classes,
    is_folder,
    list_classes,
    list_folder,
    list_source,
)
from util.io.errors import UserError


def list_labeled(folder: str | Path) -> ImageList:
    """Images with labels, of class folders or shards, for fine-tuning.

    Raises:
        UserError: as list_classes or list_labeled_shards.
    """
    return list_labeled_shards(str(folder)) if has_shards(folder) else list_classes(folder)


def find_labels(folder: str | Path) -> list[str]:
    """Class names of list_labeled; of class folders without a look at their images."""
    if has_shards(folder):
        return list_labeled_shards(str(folder)).classes
    return find_classes(folder)


def has_shards(folder: str | Path) -> bool:
    """Whether a folder holds shards and no class folder."""
    return is_shards(str(folder)) and not any(map(is_folder, list_folder(folder)))


@functools.lru_cache(maxsize=2)  # train/ and val/: their classes are asked for several times
def list_labeled_shards(folder: str) -> ImageList:
    """Images of the shards in a folder, for fine-tuning (a collective call).

    Raises:
        UserError: an image has no label.
    """
    images = list_source(folder)
    if not images.classes:
        raise UserError(
            f"The shards of {folder} have no labels ({images.samples.unlabeled}); labels are "
            "needed here: pack KEY.cls beside each image, or CLASS/KEY.jpg."
        )
    return images


def order_classes(images: ImageList, classes: list[str]) -> ImageList:
    """The same images with the labels of `classes`: the same names in another order.

    Class folders are sorted as text, numbers in KEY.cls by value.
    """
    if images.classes == classes:
        return images
    labels = [classes.index(name) for name in images.classes]  # new by old
    if isinstance(images.samples, ShardSamples):
        samples = images.samples.relabel(classes, labels)
    else:
        samples = [(path, labels[label]) for path, label in images.samples]
    return ImageList(samples, classes, images.description)


def check_same_classes(data_path: str, train: list[str], val: list[str]) -> None:
    """Raises UserError where the classes of train/ and val/ differ."""
    mismatched = sorted(set(train) ^ set(val))
    if mismatched:
        raise UserError(
            f"train/ and val/ of {data_path} have different classes (such as "
            f"{', '.join(mismatched[:3])}); both need the same."
        )
