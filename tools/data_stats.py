"""What is in a folder of pictures, and how to start training on it.

    python -m tools.data_stats PATH

PATH is a data folder with train/ and val/, a folder of class folders, any folder of pictures, or
what else pre-training takes: a text file that lists pictures, or shards.
Every picture is opened and decoded (--limit N: N of them, evenly spread): kinds of file, sizes,
channels, unreadable files by name, class sizes, and mean and deviation of every channel for --mean
and --std. In these every picture counts the same, whatever its size.

Letters: C channels, H height, W width.
"""

import argparse
import logging
import shlex
import statistics
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from util.data.image_io import (
    PIL_MODES,
    describe_error,
    is_array,
    open_bytes,
    raising_bad_image,
    read_image,
    stack_pages,
    to_tensor,
)
from util.data.shards import find_shards, is_shards
from util.data.sources import is_folder, list_folder, list_images, list_pretrain_images
from util.eval.inference import DEFAULT_WORKERS
from util.eval.report import imbalance_note
from util.io.errors import BadImage, UserError
from util.run import launch as run
from util.run.flags import IMAGENET_MEAN, IMAGENET_STD

logger = logging.getLogger(__name__)

GREY = ("1", "L", "I", "F")  # modes with one channel begin so
SHOWN_CLASSES = 20
SAME = 0.02  # difference from the default mean or deviation that is not worth a flag


class Facts(NamedTuple):
    """What one picture is; `problem` says why it cannot be read, and then the rest is empty."""

    path: str
    problem: str = ""
    format: str = ""
    mode: str = ""
    width: int = 0
    height: int = 0
    mean: tuple[float, ...] = ()  # of each channel, of values in 0..1
    square: tuple[float, ...] = ()  # mean of the squares
    is_grey: bool = False  # all channels equal


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m tools.data_stats", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "path", metavar="PATH", help="folder of pictures or of train/ and val/, list, or shards"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="open at most N pictures of each part (default: all)"
    )
    parser.add_argument(
        "--num_workers",
        type=int,
        default=DEFAULT_WORKERS,
        help="reading processes (default: %(default)s here)",
    )
    return parser


def examine(path) -> Facts:
    """Open and decode one picture as training does; `path` may be a member of a shard."""
    try:
        if is_array(path):
            with raising_bad_image(path), open_bytes(path) as file:
                array = np.lib.format.read_array(file)
                pixels = to_tensor(array, array.shape[2] if array.ndim == 3 else 1)
            header = "NPY", str(array.dtype), *reversed(array.shape[:2])
        else:
            with raising_bad_image(path), open_bytes(path) as file, Image.open(file) as picture:
                header = picture.format, mode_of(picture), *picture.size
                channels = channels_of(picture)
                if channels not in PIL_MODES:
                    pixels = to_tensor(stack_pages(picture), channels)
            if channels in PIL_MODES:
                pixels = read_image(path, channels)
    except BadImage as error:
        return Facts(str(path), problem=describe_error(error.__cause__))
    is_grey = len(pixels) > 1 and bool((pixels[:3] == pixels[:1]).all())
    return Facts("", "", *header, *moments(pixels), is_grey)


def mode_of(picture: Image.Image) -> str:
    """Pillow's mode; with the number of pages, if there are several."""
    pages = count_pages(picture)
    return f"{pages} pages {picture.mode}" if pages > 1 else picture.mode


def count_pages(picture: Image.Image) -> int:
    return getattr(picture, "n_frames", 1) if picture.format == "TIFF" else 1


def channels_of(picture: Image.Image) -> int:
    """Channels that this picture should be read with."""
    if count_pages(picture) > 1:
        return sum(len(page.getbands()) for page in ImageSequence.Iterator(picture))
    mode = picture.mode
    return 1 if mode.startswith(GREY) else 4 if mode == "RGBA" else 3


def moments(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean, and mean of the squares, of each channel (C, H, W); uint8 as 0..1."""
    if pixels.dtype != torch.uint8:
        values = pixels.flatten(1).double()
        return tuple(values.mean(dim=1).tolist()), tuple(values.square().mean(dim=1).tolist())
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in pixels])
    shares = counts / counts.sum(dim=1, keepdim=True, dtype=torch.float64)  # (C, 256)
    return tuple((shares @ levels).tolist()), tuple((shares @ levels.square()).tolist())


class Examination(Dataset):
    """Facts of every picture; for loader processes."""

    def __init__(self, paths: list):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Facts:
        return examine(self.paths[index])


def as_it_is(item):
    return item


def examine_all(paths: list, num_workers: int) -> list[Facts]:
    """Facts of every picture, in order."""
    loader = DataLoader(
        Examination(paths), batch_size=None, num_workers=num_workers, collate_fn=as_it_is
    )
    return list(tqdm(loader, desc="examine", unit="picture", disable=None))


def spread_evenly(paths: list, limit: int | None) -> list:
    """At most `limit` of them, from all parts of the list."""
    if limit is None or limit >= len(paths):
        return paths
    return [paths[i * len(paths) // limit] for i in range(limit)]


def count_classes(folder: Path, paths: list[str]) -> Counter:
    """Pictures of each class folder; empty when pictures lie in the folder itself."""
    tops = [Path(path).relative_to(folder).parts for path in paths]
    if any(len(parts) == 1 for parts in tops):
        return Counter()
    counts = Counter({e.name: 0 for e in list_folder(folder) if is_folder(e)})
    counts.update(parts[0] for parts in tops)
    return counts


def channel_statistics(facts: list[Facts]) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel over pictures of equal channels, all counting the same."""
    mean, square = (
        torch.tensor([getattr(f, name) for f in facts], dtype=torch.float64).mean(dim=0)
        for name in ("mean", "square")
    )
    return mean.tolist(), (square - mean.square()).clamp(min=0).sqrt().tolist()


def with_main_channels(facts: list[Facts]) -> list[Facts]:
    """The pictures that have the most frequent number of channels."""
    (channels, _), *_ = Counter(len(f.mean) for f in facts).most_common(1)
    return [f for f in facts if len(f.mean) == channels]


def show(name: str, text) -> None:
    print(f"  {name:<12}{text}")


def show_classes(counts: Counter) -> None:
    """Class sizes, and a sentence where they differ much."""
    names = sorted(counts)
    sizes = [counts[name] for name in names]
    middle = statistics.median_low(sizes)
    show("classes", f"{len(names)}; pictures min {min(sizes)}, median {middle}, max {max(sizes)}")
    if len(names) <= SHOWN_CLASSES:
        show("", ", ".join(f"{name} {counts[name]}" for name in names))
    note = imbalance_note(sizes, names)
    if note:
        show("", note)


def show_facts(facts: list[Facts]) -> None:
    """Formats, sizes, modes, mean and deviation of readable pictures."""

    def listed(values) -> str:
        return ", ".join(f"{value} {count}" for value, count in Counter(values).most_common())

    show("formats", listed(f.format for f in facts))
    for name in ("width", "height"):
        values = [getattr(f, name) for f in facts]
        middle = statistics.median_low(values)
        show(name, f"min {min(values)}, median {middle}, max {max(values)}")
    show("modes", listed(f.mode for f in facts))
    main = with_main_channels(facts)
    mean, std = channel_statistics(main)
    show("channels", listed(len(f.mean) for f in facts))
    show("mean", " ".join(f"{x:.4f}" for x in mean))
    show("std", " ".join(f"{x:.4f}" for x in std))
    if len(main) < len(facts):
        show("", f"mean and std of the {len(main)} pictures with {len(mean)} channels")
    if all(f.is_grey for f in facts):
        show("", "every picture is grey: --in_chans 1 (with one mean and std) would do")
    if any(f.mode.startswith("I;16") for f in facts):
        show("", "of 16-bit grey the upper 8 bits are used; as .npy arrays all of them would be")


def choose_size(facts: list[Facts]) -> tuple[list[int], int, str]:
    """(input size, patch size, model without its prefix) for pictures like these.

    Height and width only where all pictures are of one oblong shape.
    """
    side = statistics.median_low([min(f.width, f.height) for f in facts])
    if side < 48:
        size, patch, model = 32, 4, "mini_patch4"
    elif side < 112:
        size, patch, model = (64 if side < 80 else 96), 8, "mini_patch4"
    else:
        size, patch, model = (128 if side < 160 else 224), 16, "small_patch16"
    ratios = sorted(f.width / f.height for f in facts)
    ratio = ratios[len(ratios) // 2]
    sizes = [size]
    if ratios[-1] < 1.05 * ratio and ratios[0] > 0.95 * ratio and not 2 / 3 < ratio < 3 / 2:
        longer = round(size * max(ratio, 1 / ratio) / patch) * patch
        sizes = [size, longer] if ratio > 1 else [longer, size]
    return sizes, patch, model


def flags_of_channels(facts: list[Facts]) -> list[str]:
    """--in_chans, --mean and --std where they differ from the defaults."""
    main = with_main_channels(facts)
    mean, std = channel_statistics(main)
    flags = [] if len(mean) == 3 else ["--in_chans", str(len(mean))]
    defaults = (IMAGENET_MEAN, IMAGENET_STD) if len(mean) == 3 else ([0.5] * len(mean),) * 2
    for flag, values, default in zip(("--mean", "--std"), (mean, std), defaults, strict=True):
        if max(abs(a - b) for a, b in zip(values, default, strict=True)) > SAME:
            texts = [f"{max(x, 0.001):.3f}" for x in values]
            flags += [flag, *(texts[:1] if len(set(texts)) == 1 else texts)]
    return flags


def suggest(path: Path, facts: list[Facts], num_train: int, can_finetune: bool) -> list[str]:
    """Command lines to begin with."""
    sizes, patch, model = choose_size(facts)
    shared = ["--data_path", str(path), "--input_size", *map(str, sizes)]
    shared += [] if model.endswith(f"patch{patch}") else ["--patch_size", str(patch)]
    shared += flags_of_channels(facts)
    if num_train < 640:  # at least ten updates per epoch
        shared += ["--batch_size", str(max(1, num_train // 10))]
    pretrain = ["python", "main_pretrain.py", "--model", f"mae_vit_{model}", *shared]
    pretrain += ["--cross_mae", "--weight_fm", "--use_input", "--norm_pix_loss"]
    commands = [[*pretrain, "--output_dir", "output/pretrain"]]
    if can_finetune:
        finetune = ["python", "main_finetune.py", "--model", f"vit_{model}", *shared]
        has_arrays = any(f.format == "NPY" for f in facts)
        finetune += ["--aa", ""] if has_arrays or "--in_chans" in shared else []
        finetune += ["--finetune", "output/pretrain/checkpoint.pth"]
        commands.append([*finetune, "--output_dir", "output/finetune"])
    return [shlex.join(command) for command in commands]


def list_part(place: Path) -> tuple[list, Counter]:
    """Pictures of a folder, list or shards, and the sizes of its classes, if it has any.

    Raises:
        UserError: there is no such place, or no picture in it.
        UserError: the list or the shards cannot be used.
    """
    if place.is_dir() and not is_shards(str(place)):
        paths = [path for path, _ in list_images(place).samples]
        return paths, count_classes(place, paths)
    samples = list_pretrain_images(str(place)).samples
    return [path for path, _ in samples], Counter()


def show_part(place: Path, args) -> tuple[list[Facts], Counter, int]:
    """Print what one place holds; returns its readable pictures, class sizes, number of pictures.

    Raises:
        UserError: as list_part.
    """
    paths, counts = list_part(place)
    chosen = spread_evenly(paths, args.limit)
    print(f"{place}: {len(paths)} pictures")
    if counts:
        show_classes(counts)
    if len(chosen) < len(paths):
        show("opened", f"{len(chosen)} of them, evenly spread; what follows is about these")
    facts = examine_all(chosen, args.num_workers)
    good = [f for f in facts if not f.problem]
    if good:
        show_facts(good)
    show("unreadable", len(facts) - len(good))
    for fact in facts:
        if fact.problem:
            print(f"    {fact.path}: {fact.problem}")
    return good, counts, len(paths)


def main(args: argparse.Namespace) -> None:
    """Examine and print.

    Raises:
        UserError: a flag is out of its range; else as list_part.
    """
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is {args.limit}; it must be at least 1.")
    if args.num_workers < 0:
        raise UserError(f"--num_workers is {args.num_workers}; it must not be negative.")
    if "://" in args.path:
        find_shards(args.path)  # says that it is not on a disk
    place = Path(args.path)
    parts = [place / name for name in ("train", "val") if (place / name).is_dir()] or [place]
    found = [show_part(part, args) for part in parts]
    facts, counts, num_train = found[0]
    if len(found) == 2 and set(counts) != set(found[1][1]):
        odd = ", ".join(sorted(set(counts) ^ set(found[1][1]))[:3])
        print(f"train/ and val/ have different class folders (such as {odd}); fine-tuning needs")
        print("the same in both.")
    if facts:
        can_finetune = len(found) == 2 and len(counts) > 1 and set(counts) == set(found[1][1])
        print("\nTo begin with:\n")
        data_path = place.parent if place.name == "train" else place
        for command in suggest(data_path, facts, num_train, can_finetune):
            print(command)


if __name__ == "__main__":
    run.run(main, get_args_parser().parse_args())
