"""Write crops of the photographs in scikit-learn and scikit-image, split by photograph.

    python scripts/experiments/photographs.py OUT_DIR

Ten photographs are for pre-training, seven others for the task: classify which of the seven a crop
is from. Training crops come from the left half of a photograph, validation crops from the right
half. All are gray, because color alone would identify the photograph. Every call writes the same
crops, OUT_DIR/{seen/train,unseen/train,unseen/val}/<photograph>/<index>.png: 150, 100 and 70 of
each photograph. For the licences of the photographs see both packages
(skimage/data/README.txt); none is part of this repository.
"""

import argparse
import random
import sys
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

SIZE = 64
SIDES = (64, 128)  # of a crop, in pixels of the photograph
SEEN = (
    "astronaut.png brick.png coffee.png coins.png grass.png moon.png motorcycle_left.png "
    "retina.jpg rocket.jpg china.jpg"
)
UNSEEN = "camera.png chelsea.png gravel.png hubble_deep_field.jpg ihc.png text.png flower.jpg"
SKLEARN = ("china.jpg", "flower.jpg")  # the others are part of scikit-image


def load_photograph(name: str) -> Image.Image:
    """Gray image, read from the installed package without importing it.

    Exits if the package is not installed.
    """
    folder = "sklearn/datasets/images" if name in SKLEARN else "skimage/data"
    package = find_spec(folder.split("/")[0])
    if package is None:
        remedy = "run `pip install -r scripts/experiments/requirements.txt`"
        sys.exit(f"The photographs in {folder} are missing: {remedy}.")
    return Image.open(Path(package.origin).parents[1] / folder / name).convert("L")


def write_crops(photograph: Image.Image, folder: Path, count: int, rng: random.Random) -> None:
    """Write random square crops, resized to SIZE, as RGB files."""
    folder.mkdir(parents=True, exist_ok=True)
    width, height = photograph.size
    for index in range(count):
        side = rng.randint(*SIDES)
        left, top = rng.randint(0, width - side), rng.randint(0, height - side)
        box = (left, top, left + side, top + side)
        crop = photograph.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box)
        crop.convert("RGB").save(folder / f"{index:03}.png")


def main(out: Path) -> None:
    rng = random.Random(0)
    for name in SEEN.split():
        write_crops(load_photograph(name), out / "seen/train" / Path(name).stem, 150, rng)
    for name in UNSEEN.split():
        photograph = load_photograph(name)
        width, height = photograph.size
        left = photograph.crop((0, 0, width // 2, height))
        right = photograph.crop((width // 2, 0, width, height))
        write_crops(left, out / "unseen/train" / Path(name).stem, 100, rng)
        write_crops(right, out / "unseen/val" / Path(name).stem, 70, rng)
    print(f"Wrote {len(list(out.rglob('*.png')))} crops to {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path, help="folder to write")
    main(parser.parse_args().out_dir)
