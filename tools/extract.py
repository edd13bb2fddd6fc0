"""Features of pictures from a checkpoint, with nothing masked: cls, mean or patches.

    python -m tools.extract --checkpoint C --data FOLDER --out features.npz

Pictures are prepared as the checkpoint's own evaluation does it. OUT decides the form:

    features.npz    features (N, D), or (N, L, D) for patches, float32; files (N,); which; and,
                    where the folder has class folders, labels (N,) and classes (K,)
    features.npy    features alone, written batch by batch, to be opened with
                    np.load(..., mmap_mode="r"); the names, one a line, in features.txt

Letters: N images, L patches, D encoder width, K classes.
"""

import argparse
import logging
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from util.build import load_trained
from util.eval.inference import (
    FEATURES,
    add_evaluation_flags,
    build_files_loader,
    default_feature,
    describe_transform,
    list_images,
    run_features,
    set_evaluation,
)
from util.io.errors import UserError
from util.io.files import atomic_write
from util.run.launch import launch

logger = logging.getLogger(__name__)

SPLITS = {"train", "val", "test"}


class Pictures(NamedTuple):
    """What to extract from."""

    paths: list[str]
    names: list[str]  # as they are written: below the folder, if one was named
    labels: list[int]  # class numbers; zeros without classes
    classes: list[str]  # empty without class folders


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tools.extract", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, nargs="+", help="a folder, list or pictures")
    parser.add_argument(
        "--out", required=True, type=Path, help="features.npz, or features.npy for large sets"
    )
    parser.add_argument(
        "--which",
        choices=FEATURES,
        help="class token, mean of the patches, or every patch (default: what the model's head "
        "reads; of a pre-training checkpoint cls)",
    )
    add_evaluation_flags(parser)
    return parser


def find_pictures(sources: list[str]) -> Pictures:
    """The pictures named; with labels if it is one folder that holds class folders only.

    Raises:
        UserError: there are none.
        UserError: the folder is a whole data set, so that train and val would count as classes.
    """
    paths = list_images(sources)
    if len(sources) > 1 or not os.path.isdir(sources[0]):
        return Pictures(paths, paths, [0] * len(paths), [])
    names = [os.path.relpath(path, sources[0]).replace(os.sep, "/") for path in paths]
    tops = [name.split("/")[0] if "/" in name else "" for name in names]
    classes = sorted(set(tops))
    if "" in classes:
        return Pictures(paths, names, [0] * len(paths), [])
    if set(classes) <= SPLITS:
        raise UserError(
            f"{sources[0]} holds {' and '.join(classes)}: name the one you want, "
            f"--data {os.path.join(sources[0], classes[0])}, or several for all without labels."
        )
    numbers = {name: number for number, name in enumerate(classes)}
    return Pictures(paths, names, [numbers[top] for top in tops], classes)


def write_npz(path: Path, batches, shape: tuple[int, ...], pictures: Pictures, which: str) -> None:
    """Collect the batches and write features.npz."""
    with atomic_write(path) as tmp_path:
        features = np.empty(shape, np.float32)
        done = 0
        for batch, _ in batches:
            features[done : done + len(batch)] = batch.cpu().numpy()
            done += len(batch)
        entries = dict(features=features, files=np.array(pictures.names), which=np.array(which))
        if pictures.classes:
            entries |= dict(labels=np.array(pictures.labels), classes=np.array(pictures.classes))
        np.savez(tmp_path, **entries)


def write_npy(path: Path, batches, shape: tuple[int, ...], pictures: Pictures) -> None:
    """Write features.npy batch by batch, so that memory does not grow, and features.txt."""
    header = dict(descr="<f4", fortran_order=False, shape=shape)
    with (
        atomic_write(path) as tmp_path,
        atomic_write(path.with_suffix(".txt")) as tmp_names,
    ):
        tmp_names.write_text("".join(f"{name}\n" for name in pictures.names), encoding="utf-8")
        with open(tmp_path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for batch, _ in batches:
                file.write(np.ascontiguousarray(batch.cpu().numpy(), "<f4").data)


def main(args: argparse.Namespace) -> None:
    """Extract and write.

    Raises:
        UserError: OUT ends in neither .npz nor .npy.
    """
    if args.out.suffix not in (".npz", ".npy"):
        raise UserError(f"--out {args.out} must end in .npz, or in .npy for large sets.")
    pictures = find_pictures(args.data)
    model, trained = load_trained(args.checkpoint, model=args.model)
    set_evaluation(trained, args)
    which = args.which or default_feature(model)
    model.to(trained.device)

    samples = list(zip(pictures.paths, pictures.labels, strict=True))
    loader = build_files_loader(samples, pictures.classes, trained)
    shape = (len(samples), model.embed_dim)
    if which == "patches":
        shape = (len(samples), model.patch_embed.num_patches, model.embed_dim)
    classes = f" of {len(pictures.classes)} classes" if pictures.classes else ", no labels"
    logger.info("%d pictures%s; %s", len(samples), classes, describe_transform(trained))
    batches = run_features(model, loader, which, trained.device, trained.amp, "extract")
    if args.out.suffix == ".npz":
        write_npz(args.out, batches, shape, pictures, which)
    else:
        write_npy(args.out, batches, shape, pictures)
    logger.info("Wrote %s features %s of %s to %s", which, shape, trained.model, args.out)


if __name__ == "__main__":
    launch(main, get_args_parser().parse_args())
