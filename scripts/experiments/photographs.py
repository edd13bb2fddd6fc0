"""Crops of the photographs that scikit-learn and scikit-image carry, split by photograph.

    python scripts/experiments/photographs.py OUT_DIR

Ten photographs are for pre-training; seven others are never seen there. The task on those seven is
to say which one a crop is from: training crops come from its left half, validation crops from its
right half. All are grey, because colour alone would give the answer away.

    OUT_DIR/seen/train/<photograph>/<number>.png     150 crops each, without labels in the task
    OUT_DIR/unseen/train/<photograph>/<number>.png   100 crops each, of the left half
    OUT_DIR/unseen/val/<photograph>/<number>.png     70 crops each, of the right half

The same call writes the same crops. Pictures: see the licences in both packages (scikit-image's
skimage/data/README.txt); nothing of them is kept in this repository.
"""

import argparse
import random
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from util.io.errors import UserError

SIZE = 64
SIDES = (64, 128)  # of a crop, in pixels of the photograph
SKLEARN, SKIMAGE = "sklearn/datasets/images", "skimage/data"
SEEN = {
    SKIMAGE: "astronaut.png brick.png coffee.png coins.png grass.png moon.png "
    "motorcycle_left.png retina.jpg rocket.jpg",
    SKLEARN: "china.jpg",
}
UNSEEN = {
    SKIMAGE: "camera.png chelsea.png gravel.png hubble_deep_field.jpg ihc.png text.png",
    SKLEARN: "flower.jpg",
}


def load_photographs(names: dict[str, str]) -> dict[str, Image.Image]:
    """{name: grey picture}, read from the installed packages without importing them.

    Raises:
        UserError: a package is not installed.
    """
    photographs = {}
    for folder, files in names.items():
        package = find_spec(folder.split("/")[0])
        if package is None:
            raise UserError(
                f"The photographs in {folder} are missing: run "
                "`pip install -r scripts/experiments/requirements.txt`."
            )
        for name in files.split():
            path = Path(package.origin).parents[1] / folder / name
            photographs[path.stem] = Image.open(path).convert("L")
    return photographs


def write_crops(photograph: Image.Image, folder: Path, number: int, draw: random.Random) -> None:
    """Square crops at random places, brought to SIZE; RGB files, as most data is."""
    folder.mkdir(parents=True, exist_ok=True)
    width, height = photograph.size
    for index in range(number):
        side = draw.randint(*SIDES)
        left, top = draw.randint(0, width - side), draw.randint(0, height - side)
        box = (left, top, left + side, top + side)
        crop = photograph.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box)
        crop.convert("RGB").save(folder / f"{index:03}.png")


def main(out: Path) -> None:
    draw = random.Random(0)
    for name, photograph in load_photographs(SEEN).items():
        write_crops(photograph, out / "seen/train" / name, 150, draw)
    for name, photograph in load_photographs(UNSEEN).items():
        width, height = photograph.size
        left = photograph.crop((0, 0, width // 2, height))
        right = photograph.crop((width // 2, 0, width, height))
        write_crops(left, out / "unseen/train" / name, 100, draw)
        write_crops(right, out / "unseen/val" / name, 70, draw)
    print(f"Wrote {len(list(out.rglob('*.png')))} crops to {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path, help="folder to write")
    main(parser.parse_args().out_dir)
