"""Write the demo's images: scikit-learn's bundled handwritten digits as PNG class folders.

    python -m tools.demo_data OUT_DIR

1,797 scans of the digits 0-9, 8x8 pixels with 17 gray levels, are part of the scikit-learn package
(from the UCI "Optical Recognition of Handwritten Digits" set), so nothing is downloaded. Each is
resized bicubically to a 32x32 RGB image. The split is fixed:

    OUT_DIR/train/<digit>/digit_<index>.png     indices 0-1296 in scikit-learn's order
    OUT_DIR/val/<digit>/...                     indices 1297-1796, 500 images
    OUT_DIR/few/train/<digit>/...               `--labels_per_class` images of each class of
                                                train, evenly spaced
    OUT_DIR/few/val/<digit>/...                 the same images as OUT_DIR/val

Both OUT_DIR (all labels) and OUT_DIR/few (few labels) are folders for --data_path. A second call
with the same settings writes nothing; a folder with other content is refused.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run by its path

from util.io.errors import UserError
from util.run.flags import FlagParser, add_flag
from util.run.launch import launch

IMAGE_SIZE = 32
NUM_TRAIN = 1297
LABELS_PER_CLASS = 10
RECORD = "demo_data.json"  # marks a folder as written by this tool


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """The scans, uint8 (1797, 8, 8), and their labels, int (1797,)."""
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ModuleNotFoundError as error:
        raise UserError(
            f"The demo's images come from scikit-learn, but {error.name!r} is not installed: "
            "run `pip install -r scripts/requirements-demo.txt`."
        ) from error
    digits = sklearn_digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target


def split_indices(labels: np.ndarray, labels_per_class: int) -> dict[str, list[int]]:
    """{folder: indices of its scans}; see the module's docstring."""
    train, val = range(NUM_TRAIN), range(NUM_TRAIN, len(labels))
    few = []
    for digit in np.unique(labels):
        members = np.flatnonzero(labels[:NUM_TRAIN] == digit)
        if not 1 <= labels_per_class <= len(members):
            raise UserError(
                f"--labels_per_class {labels_per_class} is not possible: class {digit} has "
                f"{len(members)} training images."
            )
        few += members[np.linspace(0, len(members) - 1, labels_per_class).astype(int)].tolist()
    return {"train": list(train), "val": list(val), "few/train": few, "few/val": list(val)}


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
    found = json.loads(record.read_text())
    if found.get("settings") != settings:
        raise UserError(
            f"{out_dir} was written with other settings ({found.get('settings')} instead of "
            f"{settings}): name a new folder, or delete this one."
        )
    return found["complete"] and all(
        sum(1 for _ in (out_dir / folder).glob("*/*.png")) == count
        for folder, count in found["images"].items()
    )


def write_demo_data(out_dir: Path, labels_per_class: int = LABELS_PER_CLASS) -> dict[str, int]:
    """Write the class folders below out_dir, unless they exist; returns {folder: image count}.

    Raises:
        UserError: out_dir has other content, a class is too small, or scikit-learn is missing.
    """
    settings = {"image_size": IMAGE_SIZE, "labels_per_class": labels_per_class}
    record = out_dir / RECORD
    if is_complete(out_dir, settings):
        return json.loads(record.read_text())["images"]

    scans, labels = load_digits()
    split = split_indices(labels, labels_per_class)
    counts = {folder: len(indices) for folder, indices in split.items()}
    state = {"settings": settings, "images": counts}
    out_dir.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(state | {"complete": False}) + "\n")
    for folder, indices in split.items():
        for index in indices:
            path = out_dir / folder / str(labels[index]) / f"digit_{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            img = Image.fromarray(scans[index])
            img = img.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
            img.convert("RGB").save(path)
    record.write_text(json.dumps(state | {"complete": True}) + "\n")
    return counts


def get_args_parser() -> FlagParser:
    text = (
        "Write scikit-learn's handwritten digits as 32x32 PNG class folders: OUT_DIR/{train,val} "
        "with all labels, OUT_DIR/few/{train,val} with few."
    )
    parser = FlagParser("python -m tools.demo_data", description=text)
    add_flag(parser, "out_dir", Path, None, "folder to write to", metavar="OUT_DIR")
    text = "training images per class in OUT_DIR/few"
    add_flag(parser, "--labels_per_class", int, LABELS_PER_CLASS, text)
    return parser


def main(args: argparse.Namespace) -> None:
    counts = write_demo_data(args.out_dir, args.labels_per_class)
    for folder, count in counts.items():
        print(f"{count:5d} images in {args.out_dir / folder}")


if __name__ == "__main__":
    launch(main, get_args_parser().parse_args())
