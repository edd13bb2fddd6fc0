"""Features of images from a checkpoint, with nothing masked: cls, mean or patches.

    python -m tools.extract --checkpoint C --data FOLDER --out features.npz

Images go through the checkpoint's evaluation transform. The name of OUT decides the format:

    features.npz    features (N, D), or (N, L, D) for patches, float32; files (N,); which; and,
                    where the folder has class folders, labels (N,) and classes (K,)
    features.npy    features alone, written batch by batch, to be opened with
                    np.load(..., mmap_mode="r"); file names, one a line, in features.txt, where
                    control characters and undecodable bytes are Python escapes

Shapes: N images, L patches, D encoder width, K classes.
"""

import argparse
import logging
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run by its path

from util.data.sources import ImageList, list_images, path_below
from util.eval.inference import (
    add_inference_flags,
    build_inference_loader,
    describe_transform,
    load_for_inference,
    run_features,
)
from util.io.errors import UserError, escape
from util.io.files import atomic_write
from util.run.flags import FlagParser, add_flag
from util.run.launch import launch

logger = logging.getLogger(__name__)

SPLITS = {"train", "val", "test"}  # no class folders


def get_args_parser() -> FlagParser:
    parser = FlagParser("python -m tools.extract", description=__doc__.splitlines()[0])
    flag = partial(add_flag, parser)
    flag("--data", str, None, "folder, list, shards or images", required=True, nargs="+")
    text = "features.npz, or features.npy for large sets"
    flag("--out", Path, None, text, required=True)
    add_inference_flags(parser)
    return parser


def list_images_with_labels(sources: list[str]) -> ImageList:
    """The images, with labels if the source is one folder of class folders only."""
    images = list_images(*sources)
    splits = [name for name in images.classes if name in SPLITS]
    if len(splits) > 1 or (splits and splits == images.classes):
        raise UserError(
            f"{sources[0]} holds {' and '.join(splits)}: name the one you want, "
            f"--data {os.path.join(sources[0], splits[0])}, or several for all without labels."
        )
    return images


def name_images(samples, sources: list[str]) -> list[str]:
    """Names to write: paths, below the folder if it is the only source."""
    if len(sources) == 1 and os.path.isdir(sources[0]):
        return ["/".join(path_below(str(path), sources[0])) for path, _ in samples]
    return [str(path) for path, _ in samples]


def write_npz(
    path: Path, batches, shape: tuple[int, ...], images: ImageList, names: list[str], which: str
) -> None:
    """Collect the batches and write features.npz."""
    with atomic_write(path) as tmp_path:
        features = np.empty(shape, np.float32)
        done = 0
        for batch, _ in batches:
            features[done : done + len(batch)] = batch.cpu().numpy()
            done += len(batch)
        entries = dict(features=features, files=np.array(names), which=np.array(which))
        if images.classes:
            labels = [label for _, label in images.samples]
            entries |= dict(labels=np.array(labels), classes=np.array(images.classes))
        np.savez(tmp_path, **entries)


def write_npy(path: Path, batches, shape: tuple[int, ...], names: list[str]) -> None:
    """Write features.npy batch by batch, in constant memory, and features.txt."""
    header = dict(descr="<f4", fortran_order=False, shape=shape)
    with atomic_write(path) as tmp_path, atomic_write(path.with_suffix(".txt")) as tmp_names:
        tmp_names.write_text("".join(f"{escape(name)}\n" for name in names), encoding="utf-8")
        with open(tmp_path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for batch, _ in batches:
                file.write(np.ascontiguousarray(batch.cpu().numpy(), "<f4").data)


def refuse_overwriting(names: Path, sources: list[str]) -> None:
    """Raises UserError where the file of names would replace a list that was named."""
    if names.exists() and any(Path(x).exists() and names.samefile(x) for x in sources):
        raise UserError(f"--out would write file names over {names}: choose another name.")


def main(args: argparse.Namespace) -> None:
    if args.out.suffix not in (".npz", ".npy"):
        raise UserError(f"--out {args.out} must end in .npz, or in .npy for large sets.")
    refuse_overwriting(args.out.with_suffix(".txt"), args.data)
    images = list_images_with_labels(args.data)
    model, trained, which = load_for_inference(args)
    loader = build_inference_loader(images.samples, images.classes, trained)
    names = name_images(images.samples, args.data)
    shape = (len(names), model.embed_dim)
    if which == "patches":
        shape = (len(names), model.patch_embed.num_patches, model.embed_dim)
    classes = f" of {len(images.classes)} classes" if images.classes else ", no labels"
    logger.info("%d images%s; %s", len(names), classes, describe_transform(trained))
    batches = run_features(model, loader, which, trained.device, trained.amp_dtype, "extract")
    if args.out.suffix == ".npz":
        write_npz(args.out, batches, shape, images, names, which)
    else:
        write_npy(args.out, batches, shape, names)
    logger.info("Wrote %s features %s of %s to %s", which, shape, trained.model, args.out)


if __name__ == "__main__":
    launch(main, get_args_parser().parse_args())
