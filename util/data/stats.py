"""Statistics of images: format, size and channels of one; mean and std of a data set."""

from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageSequence

from util.data import image_io
from util.io.errors import BadImage

GRAY_MODES = ("1", "L", "I", "F")  # prefixes of Pillow's modes with one channel
MODE_16_BIT = "I;16"
MIN_LEVELS = 32  # fewer in most images: values were lost somewhere, or are masks


class ImageStats(NamedTuple):
    """Statistics of one image, per channel; integer values are scaled to [0, 1]."""

    format: str
    mode: str
    width: int
    height: int
    mean: list[float]
    mean_square: list[float]
    low: float  # over all channels
    high: float
    num_levels: int  # different values of the first channel
    is_gray: bool  # all channels are equal


def inspect(path, first_page: bool = False) -> ImageStats | str:
    """Decode one file or shard member as training does; returns the reason where that fails.

    Args:
        first_page: read the first page of a multi-page TIFF, as for 1, 3 or 4 channels; else all of
            them as channels, unless they are 1, 3 or 4 together.
    """
    try:
        with image_io.raising_bad_image(path), image_io.open_bytes(path) as file:
            file_format, mode, channels = read_header(file, image_io.is_array(path), first_page)
        if channels in image_io.PIL_MODES and file_format != "NPY" and mode != MODE_16_BIT:
            pixels, scale = image_io.read_image(path, channels), 255
        else:
            pixels, scale = image_io.open_image(path, channels), 1
    except BadImage as error:
        return image_io.describe_error(error.__cause__ or error)
    height, width = pixels.shape[1:]
    mean, mean_square = [], []
    for values in (channel.double() / scale for channel in pixels):
        mean.append(values.mean().item())
        mean_square.append(values.square().mean().item())
    low, high = pixels.min().item() / scale, pixels.max().item() / scale
    is_gray = len(pixels) > 1 and bool((pixels[:3] == pixels[:1]).all())
    extent = low, high, len(pixels[0].unique())
    return ImageStats(file_format, mode, width, height, mean, mean_square, *extent, is_gray)


def read_header(file, is_array: bool, first_page: bool) -> tuple[str, str, int]:
    """Format, mode (or dtype), and the number of channels to read an image with."""
    if is_array:
        array = np.lib.format.read_array(file)
        return "NPY", str(array.dtype), array.shape[2] if array.ndim == 3 else 1
    with Image.open(file, formats=image_io.FORMATS) as img:
        mode = MODE_16_BIT if image_io.is_16_bit(img) else img.mode
        own_channels = 1 if mode.startswith(GRAY_MODES) else 4 if mode == "RGBA" else 3
        if img.format == "TIFF" and img.n_frames > 1 and not first_page:
            channels = sum(len(page.getbands()) for page in ImageSequence.Iterator(img))
            if channels not in image_io.PIL_MODES:
                return "TIFF", f"{img.n_frames} pages {mode}", channels
        return img.format, mode, own_channels


def channel_mean_std(stats: list[ImageStats]) -> tuple[list[float], list[float]]:
    """Mean and std of each channel of images with equal channels, each image weighted equally."""
    mean = torch.tensor([s.mean for s in stats], dtype=torch.float64).mean(dim=0)
    mean_square = torch.tensor([s.mean_square for s in stats], dtype=torch.float64).mean(dim=0)
    return mean.tolist(), (mean_square - mean.square()).clamp(min=0).sqrt().tolist()


def levels_note(stats: list[ImageStats]) -> str:
    """A sentence about images with very few different values, empty if most have enough."""
    levels = sorted(s.num_levels for s in stats)
    median = levels[len(levels) // 2] if levels else MIN_LEVELS
    if median >= MIN_LEVELS:
        return ""
    return (
        f"images have only {median} different values (median of {len(levels)}); if they were "
        "converted from more bits, use the originals"
    )


def with_main_channels(stats: list[ImageStats]) -> list[ImageStats]:
    """The images that have the most frequent number of channels."""
    (channels, _), *_ = Counter(len(s.mean) for s in stats).most_common(1)
    return [s for s in stats if len(s.mean) == channels]
