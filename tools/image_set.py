"""Sets of small gray images with labels, and Fashion-MNIST as one of them."""

import gzip
from pathlib import Path
from typing import NamedTuple

import numpy as np

from util.io.errors import UserError

FASHION_CLASSES = (  # by label
    "t-shirt_top trouser pullover dress coat sandal shirt sneaker bag ankle_boot".split()
)


class ImageSet(NamedTuple):
    """Gray images with labels; the first `num_train` are for training."""

    images: np.ndarray  # uint8 (N, H, W)
    labels: np.ndarray  # int (N,)
    class_names: list[str]
    num_train: int
    name: str  # of the files, before the index


def load_fashion_mnist(folder: Path) -> ImageSet:
    """The four files in a folder, (70000, 28, 28).

    Raises:
        UserError: a file is missing or damaged.
    """
    images, labels = [], []
    for part, count in (("train", 60000), ("t10k", 10000)):
        images.append(read_idx(folder / f"{part}-images-idx3-ubyte.gz", (count, 28, 28)))
        labels.append(read_idx(folder / f"{part}-labels-idx1-ubyte.gz", (count,)))
    images, labels = np.concatenate(images), np.concatenate(labels).astype(int)
    return ImageSet(images, labels, FASHION_CLASSES, 60000, "fashion")


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A gzipped IDX file of uint8 (http://yann.lecun.com/exdb/mnist); UserError if it is not."""
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise UserError(
            f"Cannot read {path} ({getattr(error, 'strerror', None) or error}); --from must name "
            "the folder of Fashion-MNIST's four .gz files."
        ) from error
    header = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
    values = np.frombuffer(data.removeprefix(header), dtype=np.uint8)
    if not data.startswith(header) or values.size != np.prod(shape):
        raise UserError(
            f"{path} does not hold {' x '.join(map(str, shape))} bytes; fetch it again."
        )
    return values.reshape(shape)


def download_fashion_mnist() -> Path:
    """Folder with the four files, downloaded by torchvision into torch's hub folder."""
    import torch
    from torchvision.datasets import FashionMNIST

    root = Path(torch.hub.get_dir(), "datasets")
    try:
        FashionMNIST(root, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"Could not download Fashion-MNIST ({error}); give its folder with --from."
        ) from error
    return root / "FashionMNIST/raw"
