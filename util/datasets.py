"""Data sets and transforms: what the pictures are and what happens to each of them.

Every picture's augmentation has random numbers of its own, from seed, epoch and picture number, so
that it depends neither on the number of loader processes nor on where a run was interrupted.

Letters: C channels, H height, W width.
"""

import contextlib
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image, ImageOps
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from util.images import find_classes, find_images, open_image, read_image

CROP_SHARE = 0.875  # of the short side that evaluation keeps, up to 224 pixels


class Images(Dataset):
    """Pictures with class numbers: item (epoch, i) -> (transformed picture, class number).

    `samples` is a list of (path, class number), `classes` the list of class names.
    """

    def __init__(self, samples, classes: list[str], transform, read, seed: int = 0):
        """
        Args:
            read: path -> what `transform` takes.
        """
        self.samples = samples
        self.classes = classes
        self.transform = transform
        self.read = read
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        path, label = self.samples[index]
        with seeded(self.seed, epoch, index):
            return self.transform(self.read(path)), label


@contextlib.contextmanager
def seeded(*key: int):
    """Give python, numpy and torch random numbers that depend on `key` alone, then put theirs
    back.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch the GPU's as well
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class Reader:
    """path -> picture; a class, so that it travels to loader processes however they are started."""

    def __init__(self, read, in_chans: int):
        self.read = read
        self.in_chans = in_chans

    def __call__(self, path: str):
        return self.read(path, self.in_chans)


def build_pretrain_transform(args):
    """Recipe chain of pre-training, PIL -> normalised (C, H, W): random crop and flip.

    The crop has 20-100 % of the area and a side ratio of 3/4 to 4/3, resized bicubically.
    """
    return T.Compose(
        [
            T.RandomResizedCrop(
                args.input_size, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC
            ),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize(args.mean, args.std),
        ]
    )


class FastPretrainTransform:
    """The same crops and flips on uint8 tensors, (C, H, W) -> uint8 (C, h, w), normalised later.

    Draws the same random numbers in the same order as the recipe chain.
    """

    def __init__(self, input_size: int | tuple[int, int]):
        self.crop = T.RandomResizedCrop(input_size, scale=(0.2, 1.0))

    def __call__(self, img: Tensor) -> Tensor:
        top, left, height, width = self.crop.get_params(img, self.crop.scale, self.crop.ratio)
        img = img[:, top : top + height, left : left + width]
        img = F.interpolate(img[None], self.crop.size, mode="bicubic", antialias=True)[0]
        return img.flip(2) if torch.rand(1) < 0.5 else img


def build_transform(is_train: bool, args):
    """Recipe chain of fine-tuning, PIL -> normalised (C, H, W)."""
    if is_train:
        transform = create_transform(
            args.input_size if isinstance(args.input_size, int) else (3, *args.input_size),
            is_training=True,
            color_jitter=args.color_jitter,
            auto_augment=args.aa or None,
            interpolation="bicubic",
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
            mean=args.mean,
            std=args.std,
        )
        for step in transform.transforms:
            for op in getattr(step, "ops", []):
                if op.name.startswith("Posterize"):
                    op.aug_fn = posterize
        return transform
    size = args.input_size
    if isinstance(size, int):
        short_side = int(size / CROP_SHARE) if size <= 224 else size
        resize = T.Resize(short_side, InterpolationMode.BICUBIC)
    else:
        resize = ResizeToCover(*(int(side / CROP_SHARE) if side <= 224 else side for side in size))
    return T.Compose([resize, T.CenterCrop(size), T.ToTensor(), T.Normalize(args.mean, args.std)])


def posterize(img, bits: int, **_):
    """Keep the `bits` highest bits of every channel; with none, black.

    timm's own hands 0 bits to Pillow, which newer versions refuse: a run would die at a rare draw.
    """
    return ImageOps.posterize(img, bits) if bits else Image.new(img.mode, img.size)


class ResizeToCover:
    """Resize a PIL picture, keeping its shape, to the smallest size that covers height x width."""

    def __init__(self, height: int, width: int):
        self.height, self.width = height, width

    def __call__(self, img):
        scale = max(self.height / img.height, self.width / img.width)
        size = [
            max(round(img.height * scale), self.height),
            max(round(img.width * scale), self.width),
        ]
        return TF.resize(img, size, InterpolationMode.BICUBIC)


def build_pretrain_dataset(args) -> Images:
    """Training pictures of pre-training, DATA/train/CLASS/*."""
    classes, samples = list_classes(Path(args.data_path, "train"))
    if args.loader == "fast":
        transform, read = FastPretrainTransform(args.input_size), read_image
    else:
        transform, read = build_pretrain_transform(args), open_image
    return Images(samples, classes, transform, Reader(read, args.in_chans), args.seed)


def build_dataset(is_train: bool, args) -> Images:
    """Pictures of fine-tuning or evaluation, DATA/train/CLASS/* or DATA/val/CLASS/*."""
    classes, samples = list_classes(Path(args.data_path, "train" if is_train else "val"))
    reader = Reader(open_image, args.in_chans)
    return Images(samples, classes, build_transform(is_train, args), reader, args.seed)


def list_classes(folder: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """Class names, and (path, class number) of every picture below folder/CLASS/.

    Raises:
        FileNotFoundError: there is no such folder, no class folder in it, or one without a picture.
    """
    classes = find_classes(folder)
    samples = []
    for number, name in enumerate(classes):
        before = len(samples)
        samples += [(path, number) for path in find_images(folder / name)]
        if len(samples) == before:
            raise FileNotFoundError(
                f"There is no picture in the class folder {folder / name}; add some or remove it."
            )
    return classes, samples
