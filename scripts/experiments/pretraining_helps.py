"""Does pre-training help with few labels? kNN, linear probe and fine-tuning, against scratch.

    python scripts/experiments/pretraining_helps.py [--data digits photographs] [--seeds 5]
        [--labels 1 5 20 all] [--tasks fine-tuning probe]

A seed determines the pre-training, which images are labelled, and the fine-tuning; arms with the
same seed use the same labels, so their differences are paired.
"""

import argparse
import math
import random
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import common

from util.run.flags import add_flag


class Data(NamedTuple):
    write: str  # command that writes them; a folder is appended
    unlabelled: str  # for pre-training, inside that folder
    labelled: str
    flags: str


PHOTOGRAPHS = "scripts/experiments/photographs.py"
DATA = {
    "digits": Data("-m tools.demo_data", ".", ".", "--input_size 32"),
    "photographs": Data(PHOTOGRAPHS, "seen", "unseen", "--input_size 64 --patch_size 8"),
}
TASKS = ["fine-tuning", "probe"]
EPOCHS = 20  # of pre-training
ARMS = {
    "crossmae 0.75": f"{common.CROSS} --kept_mask_ratio 0.75 --decoder_depth 4",
    "crossmae 0.25": f"{common.CROSS} --kept_mask_ratio 0.25 --decoder_depth 4",
    "mae": "--decoder_depth 4",
}
ALL_ARMS = [*ARMS, "scratch", "scratch, long"]
MIN_STEPS = 50  # optimizer steps per fine-tuning epoch, in which few images are repeated
# (epochs, layer decay); the long one takes as long as pre-training and fine-tuning together.
SCHEDULE = {"pre-trained": (4, 0.65), "scratch": (4, 1.0), "scratch, long": (16, 1.0)}
# The published recipe (LARS, BatchNorm before the head) with lr and epochs for few images.
PROBE = "--linear_probe --global_pool --epochs 30 --warmup_epochs 3 --batch_size 64 --lr 6.4"


def label_count(text: str) -> str:
    """--labels: a positive integer, or all."""
    if text != "all" and not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a positive integer nor all")
    return text


def label_subset(data: Path, labels: str, seed: int, out: Path) -> Path:
    """Data set in `out` with only `labels` training images per class, or `data` for all.

    They are repeated, as links, until an epoch has at least MIN_STEPS batches of ten.
    """
    if labels == "all":
        return data
    subset = out / f"labels-{labels}-{seed}"

    def write(folder: Path) -> None:
        classes = sorted((data / "train").iterdir())
        copies = math.ceil(MIN_STEPS * 10 / (int(labels) * len(classes)))
        rng = random.Random(seed)
        for path in classes:
            images = sorted(path.iterdir())
            if len(images) < int(labels):
                sys.exit(f"--labels {labels}: {path} has only {len(images)} images.")
            links = folder / "train" / path.name
            links.mkdir(parents=True)
            for image, i in product(rng.sample(images, int(labels)), range(copies)):
                (links / f"{image.stem}_{i}{image.suffix}").symlink_to(image)
        (folder / "val").symlink_to(data / "val")

    common.make_folder(subset, write)
    return subset


def measure(name: str, args) -> None:
    """All arms of one data set."""
    data, out = DATA[name], args.out / name
    images = common.write_images(data.write, out)
    labelled = images / data.labelled
    features = common.Results("pretraining", "data", "arm", "seed")
    accuracies = common.Results("finetuning", "data", "task", "arm", "labels", "seed")

    def pretrain(arm: str, seed: int) -> tuple[list[float], float]:
        flags = f"{data.flags} {ARMS[arm]} --epochs {EPOCHS} --seed {seed}"
        folder = common.name_folder(out, arm, seed)
        return common.pretrain(flags, images / data.unlabelled, folder)

    def measure_features(_, arm: str, seed: int) -> dict:
        losses, seconds = pretrain(arm, seed)
        knn = common.knn(common.name_folder(out, arm, seed), labelled)
        return dict(knn=knn, losses=losses, seconds=seconds)

    def finetune(_, task: str, arm: str, labels: str, seed: int) -> dict:
        epochs, layer_decay = SCHEDULE["pre-trained" if arm in ARMS else arm]
        flags = PROBE if task == "probe" else f"--epochs {epochs} --layer_decay {layer_decay}"
        command = f"main_finetune.py {common.FINETUNE} {data.flags} {flags} --seed {seed}"
        folder = common.name_folder(out, task, arm, labels, seed)
        paths = dict(data_path=label_subset(labelled, labels, seed, out), output_dir=folder)
        if arm in ARMS:
            paths["finetune"] = common.name_folder(out, arm, seed) / "checkpoint.pth"
        _, seconds = common.call(command, folder / "output.txt", **paths)
        for checkpoint in folder.glob("*.pth"):
            checkpoint.unlink()
        return dict(acc1=common.read_log(folder)[-1]["test_acc1"], seconds=round(seconds, 1))

    for seed in range(args.seeds):
        for labels in args.labels:
            label_subset(labelled, labels, seed, out)  # before the arms, in parallel, share it
        runs = [(name, "fine-tuning", arm, n, seed) for n in args.labels for arm in ALL_ARMS]
        runs += [(name, "probe", arm, "all", seed) for arm in ARMS]
        runs = [run for run in runs if run[1] in args.tasks]
        features.measure(measure_features, [(name, arm, seed) for arm in ARMS], args.jobs)
        for _, _, arm, _, _ in accuracies.find_missing(runs):
            if arm in ARMS:
                pretrain(arm, seed)  # again if its folder was deleted
        accuracies.measure(finetune, runs, args.jobs)


if __name__ == "__main__":
    parser = common.get_args_parser(__doc__, "out", "jobs", "seeds")
    flag = partial(add_flag, parser, nargs="+")
    flag("--data", str, list(DATA), "data sets", choices=DATA)
    flag("--labels", label_count, ["1", "5", "20", "all"], "per class")
    flag("--tasks", str, TASKS, "what to measure", choices=TASKS)
    args = parser.parse_args()
    for name in args.data:
        measure(name, args)
