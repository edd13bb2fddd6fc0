"""Write images to try this code on, as class folders of PNG files.

    python -m tools.demo_data OUT_DIR
    python -m tools.demo_data OUT_DIR --set fashion-mnist --from DIR    (or --download)
    python -m tools.demo_data OUT_DIR --set elpv

digits (the default): 1,797 scans of the digits 0-9, 8x8 pixels with 17 gray levels, part of the
scikit-learn package (from the UCI "Optical Recognition of Handwritten Digits" set), so nothing is
downloaded. Each is resized bicubically to a 32x32 RGB image.

fashion-mnist: 60,000 + 10,000 gray photographs of clothes, 28x28 pixels, 10 classes (Zalando,
arXiv 1708.07747, MIT license), from the four .gz files in DIR (in Debian and Ubuntu, the package
dataset-fashion-mnist has them), or downloaded through torchvision.

elpv: 2,624 gray photographs of solar cells, 300x300 pixels, whose classes are four levels of the
defect probability (Buerhop-Lutz et al. 2018, CC BY-NC-SA 4.0), from the package elpv-dataset (pip
install, 91 MB).

The split is fixed:

    OUT_DIR/train/<class>/<name>.png            digits: the first 1297 in scikit-learn's order;
                                                elpv: four fifths, by the hash of the file name
    OUT_DIR/val/<class>/...                     the others
    OUT_DIR/few/train/<class>/...               `--labels_per_class` images of each class of
                                                train, evenly spaced, or a random --draw
    OUT_DIR/few/val/<class>/...                 the same images as OUT_DIR/val

Both OUT_DIR (all labels) and OUT_DIR/few (few labels) are folders for --data_path. A second call
with the same settings writes nothing; a folder with other content is refused.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run by its path

from tools.formats.image_set import (
    ImageSet,
    download_fashion_mnist,
    load_elpv,
    load_fashion_mnist,
    name_files,
)
from util.io.errors import UserError
from util.io.files import link_or_copy
from util.run.checks import check_ranges
from util.run.flags import FlagParser, add_flag
from util.run.launch import launch

IMAGE_SIZE = 32
NUM_TRAIN = 1297
LABELS_PER_CLASS = 10
RECORD = "demo_data.json"  # marks a folder as written by this tool


def load_digits() -> ImageSet:
    """scikit-learn's scans, (1797, 8, 8)."""
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ModuleNotFoundError as error:
        raise UserError(
            f"The demo's images come from scikit-learn, but {error.name!r} is not installed: "
            "run `pip install -r scripts/requirements-demo.txt`."
        ) from error
    digits = sklearn_digits()
    names = name_files("digit", len(digits.target))
    scans = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return ImageSet(scans, digits.target, list("0123456789"), NUM_TRAIN, names)


def choose_few(data: ImageSet, labels_per_class: int, draw: int | None) -> list[int]:
    """Indices of `labels_per_class` training images per class: evenly spaced, or a random draw.

    Raises:
        UserError: a class has fewer.
    """
    few, random = [], np.random.RandomState(draw)
    for label, name in enumerate(data.class_names):
        members = np.flatnonzero(data.labels[: data.num_train] == label)
        if not 1 <= labels_per_class <= len(members):
            raise UserError(
                f"--labels_per_class {labels_per_class} is not possible: class {name} has "
                f"{len(members)} training images."
            )
        if draw is None:
            chosen = members[np.linspace(0, len(members) - 1, labels_per_class).astype(int)]
        else:
            chosen = random.choice(members, labels_per_class, replace=False)
        few += sorted(chosen.tolist())
    return few


def is_complete(out_dir: Path, settings: dict) -> bool:
    """Whether out_dir already holds the images for these settings; refuses other content."""
    if not out_dir.exists():
        return False
    if not out_dir.is_dir():
        raise UserError(f"{out_dir} is a file, not a folder: name another OUT_DIR.")
    record = out_dir / RECORD
    if not record.is_file():
        if any(out_dir.iterdir()):
            raise UserError(
                f"{out_dir} is not empty and not written by this tool (no {RECORD} in it): "
                "name a new folder, or empty this one."
            )
        return False
    try:
        found = json.loads(record.read_text())
    except ValueError as error:
        raise UserError(f"{record} is damaged: delete {out_dir} and start again.") from error
    if found.get("settings") != settings:
        raise UserError(
            f"{out_dir} was written with other settings ({found.get('settings')} instead of "
            f"{settings}): name a new folder, or delete this one."
        )
    return found["complete"] and all(
        sum(1 for _ in (out_dir / folder).glob("*/*.png")) == count
        for folder, count in found["images"].items()
    )


def write_demo_data(
    out_dir: Path,
    labels_per_class: int = LABELS_PER_CLASS,
    load=load_digits,
    image_size: int | None = IMAGE_SIZE,
    draw: int | None = None,
    name: str = "digits",
) -> dict[str, int]:
    """Write the class folders below out_dir, unless they exist; returns {folder: image count}.

    Args:
        load: returns the ImageSet.
        image_size: side to which images are resized, as RGB; None leaves them as they are, gray.
        draw: of the few labels; None: evenly spaced.
        name: of the set, by which a folder with another one is told apart.

    Raises:
        UserError: out_dir has other content, a class is too small, or the images are missing.
    """
    settings = {"image_size": image_size, "labels_per_class": labels_per_class}
    settings |= {} if draw is None else {"draw": draw}
    settings |= {} if name == "digits" else {"set": name}
    record = out_dir / RECORD
    if is_complete(out_dir, settings):
        return json.loads(record.read_text())["images"]

    data = load()
    few = choose_few(data, labels_per_class, draw)
    val = range(data.num_train, len(data.labels))
    split = {"train": range(data.num_train), "val": val, "few/train": few, "few/val": val}
    counts = {folder: len(indices) for folder, indices in split.items()}
    state = {"settings": settings, "images": counts}
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"Cannot make {out_dir} ({error.strerror}); name another OUT_DIR."
        ) from error
    record.write_text(json.dumps(state | {"complete": False}) + "\n")
    for folder, indices in split.items():
        for index in indices:
            name = f"{data.class_names[data.labels[index]]}/{data.names[index]}.png"
            path = out_dir / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if folder.startswith("few"):
                path.unlink(missing_ok=True)
                link_or_copy(out_dir / folder.removeprefix("few/") / name, path)
            else:
                write_image(data.images[index], path, image_size)
    record.write_text(json.dumps(state | {"complete": True}) + "\n")
    return counts


def write_image(pixels: np.ndarray, path: Path, image_size: int | None) -> None:
    """Write gray pixels (H, W), resized to a square RGB image unless image_size is None."""
    img = Image.fromarray(pixels)
    if image_size is not None:
        img = img.resize((image_size, image_size), Image.Resampling.BICUBIC).convert("RGB")
    img.save(path)


def get_args_parser() -> FlagParser:
    text = (
        "Write handwritten digits, Fashion-MNIST or solar cells as PNG class folders: "
        "OUT_DIR/{train,val} with all labels, OUT_DIR/few/{train,val} with few."
    )
    parser = FlagParser("python -m tools.demo_data", description=text)
    flag = partial(add_flag, parser)
    flag("out_dir", Path, None, "folder to write to", metavar="OUT_DIR")
    flag("--set", str, "digits", "which images", choices=["digits", "fashion-mnist", "elpv"])
    text = "fashion-mnist: folder with its four .gz files; elpv: folder with labels.csv"
    flag("--from", Path, None, text, dest="source", metavar="DIR")
    flag("--download", bool, False, "fashion-mnist: download it (31 MB) instead")
    text = "training images per class in OUT_DIR/few"
    flag("--labels_per_class", int, LABELS_PER_CLASS, text)
    text = "seed of a random choice of them (default: evenly spaced)"
    flag("--draw", int, None, text, metavar="SEED")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raises UserError for flags that do not belong together."""
    check_ranges(args, {"draw": "[0, 4294967295]"})
    is_fashion = args.set == "fashion-mnist"
    if is_fashion and (args.source is None) != args.download:
        raise UserError("--set fashion-mnist needs --from DIR or --download, one of them.")
    if args.download and not is_fashion:
        raise UserError("--download is for --set fashion-mnist: add that, or leave it out.")
    if args.source and args.set == "digits":
        raise UserError("--from is for --set fashion-mnist or elpv: add one, or leave it out.")


def main(args: argparse.Namespace) -> None:
    check_args(args)
    options = dict(labels_per_class=args.labels_per_class, draw=args.draw, name=args.set)
    if args.set == "fashion-mnist":
        options["load"] = lambda: load_fashion_mnist(args.source or download_fashion_mnist())
        options["image_size"] = None
    if args.set == "elpv":
        options |= dict(load=lambda: load_elpv(args.source), image_size=None)
    counts = write_demo_data(args.out_dir, **options)
    for folder, count in counts.items():
        print(f"{count:5d} images in {args.out_dir / folder}")


if __name__ == "__main__":
    launch(main, get_args_parser().parse_args())
