"""Opening images: one place, so that every error names its file.

An image is a file, or a member of a tar file (util.data.shards). Pillow and the JPEG decoder read
8-bit images with 1, 3 or 4 channels; NumPy arrays (.npy), 16-bit grayscale and TIFF files of
several pages become float32.

Shapes: C channels, H height, W width.
"""

import contextlib
import io
import os
import stat
import struct
import zlib

import numpy as np
import torch
from PIL import Image, ImageSequence, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from util.data.jpeg import MODES, decode_jpeg
from util.io.errors import BadImage

EXTENSIONS = tuple(".jpg .jpeg .png .ppm .bmp .pgm .tif .tiff .webp .npy".split())
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")  # others may start other programs
MAX_ASPECT = 1000  # of the sides: evaluation resizes the short one
PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
JPEG_MODES = {1: ("L",), 3: ("L", "RGB")}  # that the fast decoders decode as Pillow does
ORIENTATION = 0x0112  # EXIF tag
PAGE_MODES = ("L", "LA", "RGB", "RGBA", "F", "I;16", "I;16B", "I;16L")  # lossless as arrays
JPEG_MAGIC = b"\xff\xd8\xff"
DECODE_ERRORS = (  # what decoders raise on damaged files
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError),
    *(MemoryError, struct.error, zlib.error, Image.DecompressionBombError),
)


def open_image(path, in_chans: int = 3) -> Image.Image | Tensor:
    """Read an image with `in_chans` channels: as PIL, or as a float32 tensor (C, H, W) where it is
    a NumPy array or 16-bit grayscale, or Pillow has no mode for that many channels.

    The EXIF orientation is ignored.

    Args:
        path: of a file, or a util.data.shards.ShardMember.

    Raises:
        BadImage: it is not a readable image; the message names it.
    """
    with raising_bad_image(path), open_bytes(path) as file:
        if is_array(path):
            return to_tensor(np.lib.format.read_array(file), in_chans)
        with Image.open(file, formats=FORMATS) as img:
            check_aspect(*img.size)
            if in_chans not in PIL_MODES:
                return to_tensor(stack_pages(img), in_chans)
            if is_16_bit(img):
                return gray_to_tensor(np.asarray(img).astype(np.uint16), in_chans)
            return convert_mode(img, PIL_MODES[in_chans])


def open_8_bit(path, in_chans: int = 3) -> Image.Image:
    """As open_image, for pipelines of 8-bit images; BadImage for any other."""
    img = open_image(path, in_chans)
    if isinstance(img, Tensor):
        raise BadImage(
            f"The image {path} has 16 bits per value, the images looked at first have 8; convert "
            "it, or for pre-training use --loader pillow."
        )
    return img


def read_image(path, in_chans: int = 3) -> Tensor:
    """Read an image with 1, 3 or 4 channels as uint8 (C, H, W); JPEG in half the time.

    The pixels and the errors are those of `open_8_bit`.
    """
    if in_chans in MODES and decode_jpeg:
        with raising_bad_image(path), open_bytes(path) as file:
            data = file.read() if file.read(3) == JPEG_MAGIC else b""
        with contextlib.suppress(RuntimeError, *DECODE_ERRORS):  # then Pillow decides
            pixels = decode_exactly(bytearray(JPEG_MAGIC + data), in_chans) if data else None
            if pixels is not None:
                return pixels
    return pil_to_tensor(open_8_bit(path, in_chans))


def decode_exactly(data: bytearray, in_chans: int) -> Tensor | None:
    """Decode a JPEG file to uint8 (C, H, W); None where the pixels might differ from Pillow's."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as header:  # refuses decompression bombs
        check_aspect(*header.size)
        if header.mode not in JPEG_MODES[in_chans]:
            return None
        if "exif" in header.info and header.getexif().get(ORIENTATION, 1) != 1:
            return None  # torchcodec would rotate it
    return decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), in_chans)


@contextlib.contextmanager
def raising_bad_image(path):
    """Turn what decoders raise into a BadImage that names the image."""
    try:
        yield
    except DECODE_ERRORS as error:
        raise BadImage(
            f"Cannot read the image {path} ({describe_error(error)}); repair or remove it "
            "(training with --skip_bad_images skips it)."
        ) from error


def describe_error(error: Exception) -> str:
    """Why an image could not be read, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return f"empty, or none of {', '.join(FORMATS)}"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0].rstrip(".")


def open_bytes(path) -> io.BufferedIOBase:
    """The bytes of an image as an open file."""
    if hasattr(path, "shard"):
        return path.open()
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("not a regular file")  # opening a FIFO would wait for its writer
    return open(path, "rb")


def check_aspect(width: int, height: int) -> None:
    """Raises ValueError for an image so narrow that resizing its short side fills the memory."""
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(
            f"it is {width} x {height} pixels: its sides differ more than {MAX_ASPECT}x"
        )


def is_array(path) -> bool:
    """Whether it is a NumPy array, by its name."""
    return path.is_array if hasattr(path, "shard") else str(path).lower().endswith(".npy")


def convert_mode(img: Image.Image, mode: str) -> Image.Image:
    """The image in this mode; raises ValueError for 32 bits per value, whose range is unknown."""
    if img.mode in ("I", "F"):
        raise ValueError("it has 32 bits per value; store it as a .npy array of float32")
    return img.convert(mode)


def is_16_bit(img: Image.Image) -> bool:
    """Whether it is grayscale with values in 0..65535, which Pillow would clip at 255."""
    return img.mode.startswith("I;16") or (img.mode == "I" and img.format == "PPM")


def gray_to_tensor(array: np.ndarray, in_chans: int) -> Tensor:
    """Grayscale uint16 (H, W) -> float32 (C, H, W) / 65535: one channel, or as RGB or RGBA."""
    gray = to_tensor(array, 1)
    if in_chans == 4:
        return torch.cat([gray, gray, gray, torch.ones_like(gray)])
    return gray.expand(in_chans, -1, -1)


def stack_pages(img: Image.Image) -> np.ndarray:
    """All pages of an image file stacked as channels, (H, W, C); ValueError if they differ in size,
    in type, or have a mode without plain values.
    """
    pages = []
    for page in ImageSequence.Iterator(img):
        if page.mode not in PAGE_MODES:
            raise ValueError(f"its mode {page.mode} has no plain values; store it as .npy")
        pages.append(np.asarray(page).reshape(page.height, page.width, -1))
    types = sorted({str(page.dtype) for page in pages})
    if len(types) > 1:
        raise ValueError(f"its pages hold {' and '.join(types)}; store it as .npy")
    return np.concatenate(pages, axis=2)


def to_tensor(array: np.ndarray, in_chans: int) -> Tensor:
    """(H, W, C) or (H, W) -> float32 (C, H, W): uint8 and uint16 scaled to [0, 1] by the dtype's
    maximum, finite floats unchanged; ValueError for any other array.
    """
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] != in_chans or 0 in array.shape:
        raise ValueError(f"its shape is {array.shape}, --in_chans {in_chans} needs (H, W, C)")
    check_aspect(*array.shape[:2])
    largest = {"u1": 255, "u2": 65535, "f2": 1, "f4": 1, "f8": 1}.get(array.dtype.str[1:])
    if largest is None:
        raise ValueError(f"it holds {array.dtype}; use uint8, uint16 or float32")
    values = np.ascontiguousarray(array.transpose(2, 0, 1), dtype=np.float32) / largest
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    return torch.from_numpy(values)


def is_image_name(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)
