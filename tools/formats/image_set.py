"""Sets of gray images with labels: Fashion-MNIST, and the solar cells of elpv-dataset."""

import gzip
import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from util.io.errors import UserError

FASHION_CLASSES = (  # by label
    "t-shirt_top trouser pullover dress coat sandal shirt sneaker bag ankle_boot".split()
)


ELPV_CLASSES = {  # by the defect probability in labels.csv
    "0.0": "defect_000",
    "0.3333333333333333": "defect_033",
    "0.6666666666666666": "defect_067",
    "1.0": "defect_100",
}


class ImageSet(NamedTuple):
    """Gray images with labels; the first `num_train` are for training."""

    images: np.ndarray  # uint8 (N, H, W)
    labels: np.ndarray  # int (N,)
    class_names: list[str]
    num_train: int
    names: list[str]  # of the N files, without suffix


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
    names = name_files("fashion", len(labels))
    return ImageSet(images, labels, FASHION_CLASSES, 60000, names)


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


def load_elpv(folder: Path | None = None) -> ImageSet:
    """The photographs of elpv-dataset, (2624, 300, 300), and their defect probability as classes.

    About a fifth are for validation: those whose file name has a SHA-256 that 5 divides, so the
    split does not depend on the order of the list.

    Args:
        folder: that holds labels.csv and images/; None: in the installed package.

    Raises:
        UserError: the package or one of its files is missing.
    """
    if folder is None:
        package = find_spec("elpv_dataset")
        if package is None:
            raise UserError("--set elpv needs a package: pip install elpv-dataset (91 MB).")
        folder = Path(package.origin).parent / "data"
    try:
        lines = (folder / "labels.csv").read_text(encoding="utf-8").splitlines()
        rows = [line.split() for line in lines if line.strip()]  # path, probability, cell type
        rows.sort(key=lambda row: (is_held_out(Path(row[0]).name), row[0]))
        images = [np.asarray(Image.open(folder / path).convert("L")) for path, *_ in rows]
        labels = [list(ELPV_CLASSES).index(probability) for _, probability, _ in rows]
        images = np.stack(images)
    except (OSError, ValueError) as error:
        raise UserError(
            f"Cannot read the solar cells in {folder} ({error}); --from must name the folder of "
            "elpv-dataset that holds labels.csv and images/."
        ) from error
    num_train = sum(not is_held_out(Path(path).name) for path, *_ in rows)
    names = [Path(path).stem for path, *_ in rows]
    return ImageSet(images, np.array(labels), [*ELPV_CLASSES.values()], num_train, names)


def is_held_out(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 5 == 0


def name_files(prefix: str, count: int) -> list[str]:
    return [f"{prefix}_{index:04d}" for index in range(count)]


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
