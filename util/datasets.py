"""Datasets: listed images, each read and transformed.

The augmentation of an image is seeded with seed, epoch and image index, so that it depends neither
on the number of DataLoader workers nor on where a run was interrupted.
"""

import logging
from functools import partial
from pathlib import Path

from torch.utils.data import Dataset

from util.data.image_io import PIL_MODES, is_array, open_8_bit, open_image, read_image
from util.data.labels import list_labeled, order_classes
from util.data.shards import ShardSamples
from util.data.sources import evenly_spaced, list_pretrain_images
from util.data.stats import MODE_16_BIT, ImageStats, inspect, levels_note
from util.data.transforms import (
    PRETRAIN_CROP_SCALE,
    FastPretrainTransform,
    build_array_transform,
    build_pretrain_transform,
    build_transform,
)
from util.io.errors import BadImage, UserError
from util.rng import seeded

logger = logging.getLogger(__name__)

NUM_INSPECTED = 16  # images looked at before training
MAX_ATTEMPTS = 10  # bad images in a row that --skip_bad_images accepts, plus one


class ImageDataset(Dataset):
    """Item (epoch, index) -> (transformed image, class index).

    With `skip_bad`, the next readable image replaces one that is not, and items are (transformed
    image, class index, `index` if it was replaced, else -1).
    """

    description = ""  # where the images were found

    def __init__(
        self, samples, classes: list[str], transform, read, seed: int = 0, skip_bad: bool = False
    ):
        """
        Args:
            samples: sequence of (path, class index).
            classes: names by class index.
            read: path -> what `transform` takes.
        """
        self.samples = samples
        self.classes = classes
        self.transform = transform
        self.read = read
        self.seed = seed
        self.skip_bad = skip_bad

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]):
        first = key[1]
        if not self.skip_bad:
            return self.load(key, first)
        for index in range(first, first + MAX_ATTEMPTS):
            try:
                item = self.load(key, index % len(self))
            except BadImage as error:
                last_error = error
            else:
                return *item, -1 if index == first else first
        raise BadImage(
            f"{MAX_ATTEMPTS} images in a row are bad, more than --skip_bad_images skips. "
            f"{last_error}"
        )

    def load(self, key: tuple[int, int], index: int):
        """Image `index`, augmented with the random numbers of item `key`, and its class index."""
        path, label = self.samples[index]
        with seeded(self.seed, *key):
            return self.transform(self.read(path)), label


def build_pretrain_dataset(args) -> ImageDataset:
    """Training images of pre-training; see list_pretrain_images for what --data_path may be.

    Raises:
        UserError: there is nothing to train on; the message names the place.
    """
    samples, classes, description = list_pretrain_images(args.data_path)
    are_tensors = prepare_reading(samples, args)
    # Pillow weighs colors by alpha when it resizes RGBA, which the fast path does not.
    if args.loader == "fast" and args.in_chans in (1, 3) and not are_tensors:
        scale = getattr(args, "crop_scale", PRETRAIN_CROP_SCALE)
        transform, read = FastPretrainTransform(args.input_size, scale), read_image
    else:
        transform, read = build_pretrain_transform(args), open_image
    read = partial(read, in_chans=args.in_chans)
    skip_bad = getattr(args, "skip_bad_images", False)
    dataset = ImageDataset(samples, classes, transform, read, args.seed, skip_bad)
    dataset.description = description
    return dataset


def build_dataset(is_train: bool, args) -> ImageDataset:
    """Images of fine-tuning or evaluation, of DATA/train or DATA/val, with labels."""
    folder = Path(args.data_path, "train" if is_train else "val")
    images = list_labeled(folder)
    samples, classes, _ = order_classes(images, getattr(args, "_classes", images.classes))
    are_tensors = prepare_reading(samples, args)
    if is_train and are_tensors:
        transform = build_array_transform(args)
    else:
        transform = build_transform(is_train, args)
    read = open_8_bit if is_train and not are_tensors else open_image
    read = partial(read, in_chans=args.in_chans)
    skip_bad = is_train and getattr(args, "skip_bad_images", False)
    return ImageDataset(samples, classes, transform, read, args.seed, skip_bad)


def prepare_reading(samples, args) -> bool:
    """Look at a few images: whether open_image gives tensors. Warns if they have few levels.

    Raises:
        UserError: --mean or --std cannot be one of these images.
    """
    if has_arrays(samples, args.in_chans):
        return True
    check_scale(args)
    found = [inspect(path, True) for path, _ in evenly_spaced(samples, NUM_INSPECTED)]
    stats = [s for s in found if isinstance(s, ImageStats)]
    if note := levels_note(stats):
        logger.info("Warning: %s", note)
    return any(s.mode == MODE_16_BIT for s in stats)


def check_scale(args) -> None:
    """Raises UserError for a mean or std that cannot be one of images, whose values are in 0..1."""
    for name in ("mean", "std"):
        outside = [value for value in getattr(args, name) if not 0 <= value <= 1]
        if outside:
            raise UserError(
                f"--{name} holds {outside[0]:g}, but images have values in 0..1; divide it by 255."
            )


def has_arrays(samples, in_chans: int) -> bool:
    """Whether there are arrays, or Pillow has no mode for the channels."""
    if in_chans not in PIL_MODES:
        return True
    if isinstance(samples, ShardSamples):
        return samples.has_arrays
    return any(is_array(path) for path, _ in samples)
