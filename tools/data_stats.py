"""Print what a data set holds, and commands to start training on it.

    python -m tools.data_stats PATH

PATH is a data folder with train/ and val/, a folder of class folders, any folder of images, a text
file that lists images, or shards. Every image is decoded (--limit N: at most N, evenly spaced).
Printed are file formats, sizes, channels, class sizes, unreadable files, and mean and std of each
channel for --mean and --std. In these every image counts the same, whatever its size.
"""

import argparse
import math
import shlex
import statistics
import sys
from collections import Counter
from functools import partial
from pathlib import Path

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run by its path

from util.data.loaders import START_METHOD
from util.data.sources import evenly_spaced, is_folder, list_folder, list_images
from util.data.stats import (
    MODE_16_BIT,
    ImageStats,
    channel_mean_std,
    inspect,
    levels_note,
    with_main_channels,
)
from util.eval.inference import DEFAULT_WORKERS
from util.eval.report import imbalance_note
from util.run.checks import check_ranges
from util.run.flags import FlagParser, add_flag
from util.run.launch import launch

MAX_LISTED_CLASSES = 20
TOLERANCE = 0.02  # a mean or std this close to the default needs no flag
SIZES = [  # (shorter side is below, input size, patch size, model without its prefix)
    (48, 32, 4, "mini_patch4"),
    (80, 64, 8, "mini_patch4"),
    (112, 96, 8, "mini_patch4"),
    (160, 128, 16, "small_patch16"),
    (math.inf, 224, 16, "small_patch16"),
]


def show(name: str, text) -> None:
    print(f"  {name:<12}{text}")


def show_part(place: Path, args) -> tuple[list[ImageStats], Counter, int]:
    """Print one part; returns the readable images, the class sizes and the number of images.

    Raises:
        UserError: the place does not exist, has no image, or its list or shards are invalid.
    """
    images = list_images(place)
    paths = [path for path, _ in images.samples]
    print(f"{place}: {len(paths)} images")
    class_counts = Counter()
    if images.classes:
        if place.is_dir():
            class_counts.update({entry.name: 0 for entry in list_folder(place) if is_folder(entry)})
        class_counts.update(images.classes[label] for _, label in images.samples)
        show_classes(class_counts)
    chosen = evenly_spaced(paths, args.limit or len(paths))
    if len(chosen) < len(paths):
        show("opened", f"{len(chosen)} of them, evenly spaced; all that follows is about these")
    loader = DataLoader(
        chosen,
        batch_size=None,
        collate_fn=inspect,
        num_workers=args.num_workers,
        multiprocessing_context=START_METHOD if args.num_workers else None,
    )
    results = list(tqdm(loader, desc="inspect", unit="image", disable=None))
    stats = [result for result in results if isinstance(result, ImageStats)]
    if stats:
        show_stats(stats)
    show("unreadable", len(results) - len(stats))
    for path, result in zip(chosen, results, strict=True):
        if isinstance(result, str):
            print(f"    {path}: {result}")
    return stats, class_counts, len(paths)


def show_classes(class_counts: Counter) -> None:
    names, sizes = zip(*sorted(class_counts.items()), strict=True)
    median = statistics.median_low(sizes)
    show("classes", f"{len(names)}; images min {min(sizes)}, median {median}, max {max(sizes)}")
    if len(names) <= MAX_LISTED_CLASSES:
        show("", ", ".join(f"{name} {class_counts[name]}" for name in names))
    if note := imbalance_note(sizes, names):
        show("", note)


def show_stats(stats: list[ImageStats]) -> None:
    def counts(values) -> str:
        return ", ".join(f"{value} {count}" for value, count in Counter(values).most_common())

    show("formats", counts(s.format for s in stats))
    for name in ("width", "height"):
        sides = [getattr(s, name) for s in stats]
        show(name, f"min {min(sides)}, median {statistics.median_low(sides)}, max {max(sides)}")
    show("modes", counts(s.mode for s in stats))
    show("channels", counts(len(s.mean) for s in stats))
    main = with_main_channels(stats)
    mean, std = channel_mean_std(main)
    show("mean", " ".join(f"{x:.4f}" for x in mean))
    show("std", " ".join(f"{x:.4f}" for x in std))
    if len(main) < len(stats):
        show("", f"mean and std of the {len(main)} images with {len(mean)} channels")
    if all(s.is_gray for s in stats):
        show("", "every image is gray: --in_chans 1 (with one mean and std) is enough")
    show("values", f"{min(s.low for s in stats):.4f} to {max(s.high for s in stats):.4f}")
    if note := levels_note(stats):
        show("WARNING", note)


def choose_size(stats: list[ImageStats]) -> tuple[list[int], int, str]:
    """(input size, patch size, model without its prefix) for these images.

    The input size is height and width if all images share one elongated shape, else one number.
    """
    side = statistics.median_low([min(s.width, s.height) for s in stats])
    size, patch, model = next(row for below, *row in SIZES if side < below)
    ratios = sorted(s.width / s.height for s in stats)
    ratio = ratios[len(ratios) // 2]
    if 2 / 3 < ratio < 3 / 2 or ratios[0] <= 0.95 * ratio or ratios[-1] >= 1.05 * ratio:
        return [size], patch, model
    longer = round(size * max(ratio, 1 / ratio) / patch) * patch
    return [size, longer] if ratio > 1 else [longer, size], patch, model


def channel_flags(stats: list[ImageStats]) -> list[str]:
    """--in_chans, --mean and --std where they differ from the defaults."""
    mean, std = channel_mean_std(with_main_channels(stats))
    flags = [] if len(mean) == 3 else ["--in_chans", str(len(mean))]
    imagenet = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    defaults = imagenet if len(mean) == 3 else ([0.5] * len(mean),) * 2
    for flag, values, default in zip(("--mean", "--std"), (mean, std), defaults, strict=True):
        if max(abs(a - b) for a, b in zip(values, default, strict=True)) > TOLERANCE:
            values = [max(x, 1e-5) for x in values] if flag == "--std" else values
            texts = [f"{x:.3f}" if abs(x) >= 0.1 else f"{x:.3g}" for x in values]
            flags += [flag, *(texts[:1] if len(set(texts)) == 1 else texts)]
    return flags


def suggest_commands(path: Path, stats, num_train: int, can_finetune: bool) -> list[str]:
    sizes, patch, model = choose_size(stats)
    shared = ["--data_path", str(path), "--input_size", *map(str, sizes)]
    shared += [] if model.endswith(f"patch{patch}") else ["--patch_size", str(patch)]
    shared += channel_flags(stats)
    if num_train < 640:  # at least ten optimizer steps per epoch
        shared += ["--batch_size", str(max(1, num_train // 10))]
    pretrain = ["python", "main_pretrain.py", "--model", f"mae_vit_{model}", *shared]
    pretrain += ["--cross_mae", "--weight_fm", "--use_input", "--norm_pix_loss"]
    if model.startswith("mini"):
        pretrain += "--lr 2e-3 --kept_mask_ratio 0.25 --decoder_depth 4".split()  # docs/recipes.md
    commands = [[*pretrain, "--output_dir", "output/pretrain"]]
    if can_finetune:
        finetune = ["python", "main_finetune.py", "--model", f"vit_{model}", *shared]
        are_tensors = any(s.format == "NPY" or s.mode == MODE_16_BIT for s in stats)
        finetune += ["--aa", ""] if are_tensors or "--in_chans" in shared else []
        finetune += ["--finetune", "output/pretrain/checkpoint.pth"]
        commands.append([*finetune, "--output_dir", "output/finetune"])
    return [shlex.join(command) for command in commands]


def get_args_parser() -> FlagParser:
    parser = FlagParser("python -m tools.data_stats", description=__doc__.splitlines()[0])
    flag = partial(add_flag, parser)
    text = "folder of images or of train/ and val/, list, or shards"
    flag("path", str, None, text, metavar="PATH")
    text = "open at most N images of each part (default: all)"
    flag("--limit", int, None, text, metavar="N")
    flag("--num_workers", int, DEFAULT_WORKERS, "DataLoader workers (default: %(default)s here)")
    return parser


def main(args: argparse.Namespace) -> None:
    check_ranges(args, {"limit": "[1, inf)", "num_workers": "[0, inf)"})
    if "://" in args.path:
        list_images(args.path)  # raises: Path would turn "://" into ":/"
    place = Path(args.path)
    parts = [place / name for name in ("train", "val") if (place / name).is_dir()] or [place]
    shown = [show_part(part, args) for part in parts]
    stats, class_counts, num_train = shown[0]
    differing = set(class_counts) ^ set(shown[-1][1])
    if differing:
        names = ", ".join(sorted(differing)[:3])
        print(f"train/ and val/ have different class folders (such as {names}); fine-tuning needs")
        print("the same in both.")
    if stats:
        can_finetune = len(shown) == 2 and len(class_counts) > 1 and not differing
        data_path = place.parent if place.name == "train" else place
        print("\nTo start training:\n")
        print(*suggest_commands(data_path, stats, num_train, can_finetune), sep="\n")


if __name__ == "__main__":
    launch(main, get_args_parser().parse_args())
