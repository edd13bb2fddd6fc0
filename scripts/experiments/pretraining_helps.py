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
from pathlib import Path
from typing import NamedTuple

import common


class Data(NamedTuple):
    """Images of an experiment."""

    write: str  # command that writes them; a folder is appended
    unlabelled: str  # for pre-training, inside that folder
    labelled: str
    flags: str


DATA = {
    "digits": Data("-m tools.demo_data", ".", ".", "--input_size 32"),
    "photographs": Data(
        "scripts/experiments/photographs.py", "seen", "unseen", "--input_size 64 --patch_size 8"
    ),
}
TASKS = ["fine-tuning", "probe"]
EPOCHS = 20  # of pre-training
ARMS = {
    "crossmae 0.75": f"{common.CROSS} --kept_mask_ratio 0.75 --decoder_depth 4",
    "crossmae 0.25": f"{common.CROSS} --kept_mask_ratio 0.25 --decoder_depth 4",
    "mae": "--decoder_depth 4",
}
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


def label_subset(data: Path, labels: str, seed: int, folder: Path) -> Path:
    """Class folders with only `labels` training images per class.

    They are repeated, as links, until an epoch has at least MIN_STEPS batches of ten.
    """
    if labels == "all":
        return data

    def write(folder: Path) -> None:
        classes = sorted(path for path in (data / "train").iterdir())
        copies = math.ceil(MIN_STEPS * 10 / (int(labels) * len(classes)))
        rng = random.Random(seed)
        for path in classes:
            images = sorted(path.iterdir())
            if len(images) < int(labels):
                sys.exit(f"--labels {labels}: {path} has only {len(images)} images.")
            (folder / "train" / path.name).mkdir(parents=True)
            for image in rng.sample(images, int(labels)):
                for i in range(copies):
                    link = folder / "train" / path.name / f"{image.stem}_{i}{image.suffix}"
                    link.symlink_to(image)
        (folder / "val").symlink_to(data / "val")

    common.make_folder(folder, write)
    return folder


def run(name: str, args) -> None:
    """All arms of one data set."""
    data, out, seeds = DATA[name], args.out / name, range(args.seeds)
    images = common.write_images(data.write, out)
    features = common.Results("pretraining", key=("data", "arm", "seed"))
    accuracies = common.Results("finetuning", key=("data", "task", "arm", "labels", "seed"))

    def folder_of(arm: str, seed: int) -> Path:
        return out / f"{arm} {seed}".replace(" ", "-")

    def run_pretraining(arm: str, seed: int) -> None:
        flags = f"{data.flags} {ARMS[arm]} --epochs {EPOCHS} --seed {seed}"
        folder = folder_of(arm, seed)
        losses, seconds = common.pretrain(flags, images / data.unlabelled, folder)
        if features.find(data=name, arm=arm, seed=seed) is None:
            acc1 = common.knn(folder / "checkpoint.pth", images / data.labelled)
            features.add(data=name, arm=arm, seed=seed, knn=acc1, losses=losses, seconds=seconds)

    def is_missing(task: str, arm: str, labels: str, seed: int) -> bool:
        key = dict(data=name, task=task, arm=arm, labels=labels, seed=seed)
        return task in args.tasks and accuracies.find(**key) is None

    def run_finetuning(task: str, arm: str, labels: str, seed: int) -> None:
        epochs, layer_decay = SCHEDULE["pre-trained" if arm in ARMS else arm]
        flags = f"--epochs {epochs} --layer_decay {layer_decay}"
        flags = f"{common.FINETUNE} {data.flags} {PROBE if task == 'probe' else flags}"
        checkpoint = common.quote(folder_of(arm, seed) / "checkpoint.pth")
        finetune = f"--finetune {checkpoint}" if arm in ARMS else ""
        folder = out / f"{task} {arm} {labels} {seed}".replace(" ", "-").replace(",", "")
        subset = label_subset(images / data.labelled, labels, seed, out / f"labels-{labels}-{seed}")
        _, seconds = common.call(
            f"main_finetune.py {flags} {finetune} --seed {seed} --data_path {common.quote(subset)} "
            f"--output_dir {common.quote(folder)}",
            folder / "output.txt",
        )
        acc1 = common.read_log(folder)[-1]["test_acc1"]
        row = dict(data=name, task=task, arm=arm, labels=labels, seed=seed)
        accuracies.add(**row, acc1=acc1, seconds=round(seconds, 1))
        for checkpoint in folder.glob("*.pth"):
            checkpoint.unlink()

    for seed in seeds:
        for labels in args.labels:
            label_subset(images / data.labelled, labels, seed, out / f"labels-{labels}-{seed}")
        arms = [*ARMS, "scratch", "scratch, long"]
        items = [("fine-tuning", arm, labels, seed) for labels in args.labels for arm in arms]
        items += [("probe", arm, "all", seed) for arm in ARMS]
        items = [item for item in items if is_missing(*item)]
        missing = [  # has no row, or its checkpoint is needed
            arm
            for arm in ARMS
            if features.find(data=name, arm=arm, seed=seed) is None
            or any(item[1] == arm for item in items)
        ]
        common.run_all(args.jobs, run_pretraining, [(arm, seed) for arm in missing])
        common.run_all(args.jobs, run_finetuning, items)


if __name__ == "__main__":
    parser = common.get_args_parser(__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="data sets")
    parser.add_argument(
        "--labels", nargs="+", type=label_count, default=["1", "5", "20", "all"], help="per class"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="what to measure")
    args = parser.parse_args()
    for name in args.data:
        run(name, args)
