"""Does pre-training help? kNN, linear probe and fine-tuning with few labels, against scratch.

    python scripts/experiments/pretraining_helps.py --data fashion-mnist --from DIR
    python scripts/experiments/pretraining_helps.py --data elpv digits photographs
        [--arms "crossmae 0.25" mae scratch] [--tasks kNN probe fine-tuning] [--labels 1 all]

DIR holds the four .gz files of Fashion-MNIST; elpv is solar cells. A seed chooses the labeled
images and seeds the fine-tuning; arms with the same seed use the same labels, so their differences
are paired. An interrupted run continues with the same command.
"""

import argparse
import shlex
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import common

from util.run.flags import add_flag


class Data(NamedTuple):
    write: str  # command that writes the images; a folder is appended
    flags: str  # of both scripts
    pretrain: str
    epochs: int  # of pre-training
    finetune: str
    probe: str
    few: tuple[int, int]  # epochs with few labels; images per epoch, by repetition
    full: int  # epochs with all labels
    long: tuple[int, int]  # the two, for scratch with the FLOPs of pre-training (digits: its time)
    labels: tuple[str, ...]  # per class
    seeds: int
    each_pretrains: bool = False  # each seed its own model; otherwise all take that of seed 0
    full_flags: str = ""  # of fine-tuning with all labels
    k: int = 20  # of kNN
    features: tuple[str, ...] = ("mean", "cls", "patches")
    every: int = 0  # epochs from one kNN to the next, during pre-training
    curve: str = "."  # its images, inside all of them
    unlabeled: str = "."  # images of pre-training
    labeled: str = "."


DIGITS = Data(
    write="-m tools.demo_data",
    flags="--input_size 32",
    pretrain="--batch_size 32 --warmup_epochs 2",
    epochs=20,
    finetune="--batch_size 10 --lr 2e-3",
    probe="--epochs 30 --warmup_epochs 3 --batch_size 64",
    few=(4, 500),
    full=4,
    long=(16, 16),
    labels=("1", "5", "20", "all"),
    seeds=5,
    each_pretrains=True,
    k=10,
    features=("mean",),
)
DATA = {
    "digits": DIGITS,
    "photographs": DIGITS._replace(
        write="scripts/experiments/photographs.py",
        flags="--input_size 64 --patch_size 8",
        unlabeled="seen",
        labeled="unseen",
    ),
    "fashion-mnist": Data(
        write="-m tools.demo_data --set fashion-mnist --labels_per_class 1000 --draw 0",
        flags="--input_size 32 --in_chans 1 --mean 0.286 --std 0.353",
        pretrain="--batch_size 128 --warmup_epochs 1",
        epochs=10,
        finetune="--batch_size 32 --lr 1e-3",
        probe="--epochs 5 --warmup_epochs 1 --batch_size 256",
        few=(3, 3200),
        full=5,
        long=(58, 8),
        labels=("1", "5", "20", "100", "all"),
        seeds=3,
        full_flags="--crop_scale 0.8 1",
        features=("mean", "patches"),
        every=2,
        curve="few",
    ),
    "elpv": Data(
        write="-m tools.demo_data --set elpv",
        flags="--input_size 128 --patch_size 16 --in_chans 1 --mean 0.597 --std 0.161",
        pretrain="--batch_size 64 --warmup_epochs 5",
        epochs=60,
        finetune="--batch_size 32 --lr 1e-3 --class_weights balanced --crop_scale 0.8 1",
        probe="--epochs 10 --warmup_epochs 1 --batch_size 256",
        few=(10, 960),
        full=10,
        long=(49, 28),
        labels=("5", "20", "100", "all"),
        seeds=3,
        every=20,
    ),
}
ARMS = {
    "crossmae 0.75": f"--norm_pix_loss {common.CROSS} --kept_mask_ratio 0.75",
    "crossmae 0.25": f"--norm_pix_loss {common.CROSS} --kept_mask_ratio 0.25",
    "mae": "--norm_pix_loss",
}
PIXELS = "raw pixels"
ALL_ARMS = [*ARMS, "scratch", "scratch, long"]
TASKS = ["kNN", "probe", "fine-tuning"]
FINETUNE = (
    "--model vit_mini_patch4 --warmup_epochs 1 --drop_path 0 --aa '' --reprob 0 --num_workers 0"
)
PROBE = "--linear_probe --global_pool --lr 6.4"  # LARS, BatchNorm before the head, as published


class Experiment:
    """All runs of one data set."""

    def __init__(self, name: str, args):
        self.name, self.data, self.args = name, DATA[name], args
        self.out = args.out / name
        source = f" --from {shlex.quote(args.source)}" if args.source else ""
        self.images = common.write_images(f"{self.data.write}{source}", self.out)
        self.labeled = self.images / self.data.labeled

    def checkpoint(self, arm: str, seed: int) -> Path:
        """Of the pre-training run from which this seed starts."""
        seed = seed if self.data.each_pretrains else 0
        return common.name_folder(self.out, arm, seed) / "checkpoint.pth"

    def is_trained(self, arm: str, seed: int) -> bool:
        checkpoint = self.checkpoint(arm, seed)
        return checkpoint.exists() and len(common.read_log(checkpoint.parent)) == self.data.epochs

    def pretrain(self, arm: str, seed: int) -> dict:
        """Pre-train, unless it is done; what is known of the run, and kNN on the way."""
        data, checkpoint = self.data, self.checkpoint(arm, seed)
        if arm == PIXELS:
            return dict(knn=dict(patches=common.pixel_knn(self.labeled)))
        flags = f"{common.PRETRAIN} {data.pretrain} {data.flags} {ARMS[arm]} --epochs {data.epochs}"
        flags += f" --seed {seed} --keep_every {data.every}"
        row = common.pretrain(flags, self.images / data.unlabeled, checkpoint.parent)
        if data.every:
            files = {n: f"checkpoint-{n}.pth" for n in range(0, data.epochs, data.every)}
            files[data.epochs - 1] = checkpoint.name
            images, folder = self.images / data.curve, checkpoint.parent
            row["curve"] = {n: common.knn(folder / file, images) for n, file in files.items()}
        knn = {w: common.knn(checkpoint, self.labeled, w, data.k) for w in data.features}
        return row | dict(knn=knn)

    def finetune(self, task: str, arm: str, labels: str, seed: int) -> dict:
        """One fine-tuning run or linear probe."""
        data = self.data
        pretrained = dict(finetune=self.checkpoint(arm, seed)) if arm in ARMS else {}
        flags = f"{FINETUNE} {data.flags} --seed {seed}"
        if task == "probe":
            flags += f" {PROBE} {data.probe}"
        else:
            schedule = data.long if arm == "scratch, long" else (data.few[0], data.full)
            flags += f" {data.finetune} --epochs {schedule[labels == 'all']}"
            flags += f" {data.full_flags}" if labels == "all" else ""
            flags += f" --layer_decay {0.65 if arm in ARMS else 1}"
        folder = common.name_folder(self.out, task, arm, labels, seed)
        return common.finetune(flags, folder, self.subset(labels, seed), self.labeled, **pretrained)

    def subset(self, labels: str, seed: int) -> Path:
        return common.label_subset(self.labeled, labels, seed, self.data.few[1], self.out)

    def run(self) -> None:
        """Everything that was asked for and is not in docs/results."""
        args, data = self.args, self.data
        pretrained = [arm for arm in (PIXELS, *ARMS) if arm in args.arms]
        seeds = range(args.seeds or data.seeds)
        own = seeds if data.each_pretrains else [0]  # the others differ in few labels only
        runs = [
            ("fine-tuning", arm, n, seed)
            for n in args.labels or data.labels
            for seed in (own if n == "all" else seeds)
            for arm in ALL_ARMS
        ]
        runs += [("probe", arm, "all", seed) for seed in own for arm in ARMS]
        runs = [run for run in runs if run[0] in args.tasks and run[1] in args.arms]
        features = common.Results(f"pretraining-{self.name}", "arm", "seed")
        accuracies = common.Results(f"finetuning-{self.name}", "task", "arm", "labels", "seed")

        if "kNN" in args.tasks:
            features.measure(self.pretrain, product(pretrained, own), args.jobs)
        for _, arm, n, seed in accuracies.find_missing(runs):
            self.subset(n, seed)  # before runs in parallel share it
            if arm in ARMS and not self.is_trained(arm, seed):
                self.pretrain(arm, seed)
        accuracies.measure(self.finetune, runs, args.jobs)


def label_count(text: str) -> str:
    """--labels: a positive integer, or all."""
    if text != "all" and not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a positive integer nor all")
    return text


if __name__ == "__main__":
    parser = common.get_args_parser(__doc__, "out", "jobs")
    flag = partial(add_flag, parser)
    flag("--data", str, list(DATA), "data sets", choices=list(DATA), nargs="+")
    flag("--from", str, "", "folder of Fashion-MNIST's files", dest="source", metavar="DIR")
    arms = [PIXELS, *ALL_ARMS]
    flag("--arms", str, arms, "what is compared", choices=arms, nargs="+")
    flag("--tasks", str, TASKS, "what is measured", choices=TASKS, nargs="+")
    flag("--labels", label_count, None, "per class (default: the data's)", nargs="+")
    flag("--seeds", int, None, "seeds 0, 1, ... (default: the data's)")
    args = parser.parse_args()
    for name in args.data:
        Experiment(name, args).run()
