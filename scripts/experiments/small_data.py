"""Many images, few labels: CrossMAE, MAE and scratch on Fashion-MNIST and on solar cells.

    python scripts/experiments/small_data.py --data fashion-mnist --from DIR
    python scripts/experiments/small_data.py --data elpv

DIR holds the four .gz files of Fashion-MNIST; solar cells come from the package elpv-dataset. An
interrupted run continues with the same command. --stages chooses parts: sweep (one setting at a
time, on a sixth of the images), pretrain (with kNN on the way), few, total (scratch for as long as
pre-training and fine-tuning take together) and all (all labels, and the linear probe).
"""

import json
import math
import random
import statistics
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

import common
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_finetune
import main_pretrain
from util.build import build_classifier, build_pretrain_model
from util.run.flags import add_flag

STAGES = ["sweep", "pretrain", "few", "total", "all"]
PRETRAIN = "--norm_pix_loss --mask_ratio 0.75 --decoder_depth 4 --num_workers 0"
FINETUNE = "--drop_path 0 --aa '' --reprob 0 --num_workers 0 --warmup_epochs 1"
ARMS = {
    "crossmae 0.25": f"{common.CROSS} --kept_mask_ratio 0.25",
    "crossmae 0.75": f"{common.CROSS} --kept_mask_ratio 0.75",
    "mae": "",
}
PROBE = "--linear_probe --global_pool --warmup_epochs 1 --lr 6.4 --num_workers 0"


class Data(NamedTuple):
    write: str  # command that writes the images; a folder is appended
    flags: str  # of both scripts
    pretrain: str
    epochs: int  # of pre-training
    every: int  # epochs from one kNN to the next
    finetune: str
    few: tuple[int, int]  # epochs with few labels, and batches per epoch, in which images repeat
    full: int  # epochs with all labels
    labels: list[int]  # per class
    total: list[int]  # labels per class with which scratch gets the total compute, in one draw


DATA = {
    "fashion-mnist": Data(
        write="-m tools.demo_data --set fashion-mnist --labels_per_class 1000 --draw 0",
        flags="--input_size 32 --in_chans 1 --mean 0.286 --std 0.353",
        pretrain="--model mae_vit_mini_patch4 --batch_size 128 --warmup_epochs 1 --lr 2e-3",
        epochs=10,
        every=2,
        finetune="--model vit_mini_patch4 --batch_size 32 --lr 1e-3",
        few=(3, 100),
        full=5,
        labels=[1, 5, 20, 100],
        total=[5, 20],
    ),
    "elpv": Data(
        write="-m tools.demo_data --set elpv",
        flags="--input_size 128 --patch_size 16 --in_chans 1 --mean 0.597 --std 0.161",
        pretrain="--model mae_vit_mini_patch4 --batch_size 64 --warmup_epochs 5 --lr 2e-3",
        epochs=60,
        every=20,
        finetune="--model vit_mini_patch4 --batch_size 32 --lr 1e-3 --class_weights balanced "
        "--crop_scale 0.8 1",
        few=(10, 30),
        full=10,
        labels=[5, 20, 100],
        total=[20],
    ),
}
SWEEP_EPOCHS = 8
SWEEP = {  # what changes against DATA["fashion-mnist"] and crossmae 0.25
    "base": "",
    "lr 5e-4": "--lr 5e-4",
    "lr 8e-3": "--lr 8e-3",
    "crop 0.5": "--crop_scale 0.5 1",
    "crop 0.8": "--crop_scale 0.8 1",
    "batch 32": "--batch_size 32",
    "pixels": "",  # without --norm_pix_loss
    "mask 0.5": "--mask_ratio 0.5 --kept_mask_ratio 0.17",
    "decoder 1": "--decoder_depth 1",
    "patch 8": "--patch_size 8",
    "mask 0.9": "--mask_ratio 0.9 --kept_mask_ratio 0.3",
}


def label_subset(images: Path, labels: int, draw: int, size: int, out: Path) -> Path:
    """Data set in `out` with at most `labels` random training images of each class, each linked
    as often as `size` images need.
    """

    def write(folder: Path) -> None:
        rng = random.Random(draw)
        chosen = {}
        for path in sorted((images / "train").iterdir()):
            files = sorted(path.iterdir())
            chosen[path.name] = rng.sample(files, min(labels, len(files)))
        copies = math.ceil(size / sum(map(len, chosen.values())))
        for name, files in chosen.items():
            links = folder / "train" / name
            links.mkdir(parents=True)
            for image, i in product(files, range(copies)):
                (links / f"{image.stem}_{i}{image.suffix}").symlink_to(image)
        (folder / "val").symlink_to(images / "val")

    subset = out / f"labels-{labels}-{draw}"
    common.make_folder(subset, write)
    return subset


def pretrain(flags: str, images: Path, folder: Path) -> dict:
    """Pre-train, or continue; loss of every epoch, seconds of an epoch, MFLOP and parameters."""
    record = folder / "measured.json"
    if not record.exists():
        paths = dict(data_path=images, output_dir=folder)
        command = f"main_pretrain.py {flags} --resume auto --save_every_minutes 3"
        common.call(command, folder / "output.txt", **paths)
        args = main_pretrain.get_args_parser().parse_args(command.split()[1:])
        ratios = (args.mask_ratio, args.kept_mask_ratio)
        build = partial(build_pretrain_model, args)
        gflop, mparams = common.count_cost(build, args.input_size, ratios, args.in_chans)
        row = dict(
            losses=[round(epoch["train_loss"], 4) for epoch in common.read_log(folder)],
            seconds_per_epoch=round(seconds_per_epoch(folder), 1),
            mflop=round(gflop * 1000, 2),
            mparams=round(mparams, 3),
        )
        record.write_text(json.dumps(row))
    return json.loads(record.read_text())


def seconds_per_epoch(folder: Path) -> float:
    """Median over the run's TensorBoard points, so that an interruption does not count."""
    events = EventAccumulator(str(folder))
    events.Reload()
    points = [(x.step / 1000, x.wall_time) for x in events.Scalars("train_loss")]
    pairs = [(b, a) for a, b in pairwise(sorted(points)) if b[0] > a[0]]
    return statistics.median((b[1] - a[1]) / (b[0] - a[0]) for b, a in pairs)


def knn(checkpoint: Path, images: Path, log: Path, which: str = "mean") -> float:
    """kNN accuracy in percent, k = 20."""
    command = f"-m tools.knn --which {which} --k 20 --json --num_workers 0"
    printed, _ = common.call(command, log, checkpoint=checkpoint, data_path=images)
    return json.loads(printed.splitlines()[-1])["knn"][0]["acc1"]


class Experiment:
    """The stages of one data set; a method each."""

    def __init__(self, name: str, args):
        self.name, self.data, self.args = name, DATA[name], args
        self.out = args.out / name
        source = f" --from {args.source}" if args.source else ""
        self.images = common.write_images(f"{self.data.write}{source}", self.out)
        self.draws = range(args.draws)

    def flags(self, arm: str) -> str:
        return f"{self.data.pretrain} {PRETRAIN} {self.data.flags} {ARMS[arm]} --seed 0"

    def folder(self, *names) -> Path:
        return common.name_folder(self.out, *names)

    def sweep(self) -> None:
        """kNN of the mean patch feature, between the images that train and the validation set."""

        def measure(run: str) -> dict:
            flags = f"{self.flags('crossmae 0.25')} --epochs {SWEEP_EPOCHS} {SWEEP[run]}"
            if run == "pixels":
                flags = flags.replace("--norm_pix_loss", "")
            folder, subset = self.folder("sweep", run), self.images / "few"
            row = pretrain(flags, subset / "train", folder)
            found = knn(folder / "checkpoint.pth", subset, folder / "knn.txt")
            return row | dict(knn=found)

        if self.name == "fashion-mnist":
            common.Results("sweep", "run").measure(
                measure, [(run,) for run in SWEEP], self.args.jobs
            )

    def pretrain(self) -> None:
        data = self.data
        subset = self.images / "few" if self.name == "fashion-mnist" else self.images

        def measure(_, arm: str) -> dict:
            folder = self.folder(arm)
            flags = f"{self.flags(arm)} --epochs {data.epochs} --keep_every {data.every}"
            row = pretrain(flags, self.images / "train", folder)
            files = {n: f"checkpoint-{n}.pth" for n in range(0, data.epochs, data.every)}
            files[data.epochs - 1] = "checkpoint.pth"
            curve = {
                epoch: knn(folder / file, subset, folder / f"knn-{epoch}.txt")
                for epoch, file in files.items()
            }
            whole = {
                which: knn(
                    folder / "checkpoint.pth", self.images, folder / f"knn-{which}.txt", which
                )
                for which in ("mean", "cls", "patches")
            }
            return row | dict(knn=whole, curve=curve)

        results = common.Results("small_pretraining", "data", "arm")
        results.measure(measure, [(self.name, arm) for arm in self.args.arms], self.args.jobs)

    def finetune(self, task: str, arm: str, labels: int | str, draw: int) -> dict:
        """One fine-tuning run or linear probe; accuracies after its last epoch."""
        data, folder = self.data, self.folder(task, arm, labels, draw)
        epochs, images = data.full, self.images
        if labels != "all":
            epochs, steps = data.few
            size = steps * self.batch_size()
            images = label_subset(self.images, labels, draw, size, self.out)
        flags = f"{FINETUNE} {data.finetune} --layer_decay {0.65 if arm in ARMS else 1}"
        if task == "probe":
            flags = f"{PROBE} --model vit_mini_patch4 --batch_size 256"
        if arm == "scratch, total":
            epochs += self.extra_epochs(images)
        command = f"main_finetune.py {flags} {data.flags} --epochs {epochs} --seed {draw}"
        paths = dict(data_path=images, output_dir=folder, resume="auto")
        if arm in ARMS:
            paths["finetune"] = self.folder(arm) / "checkpoint.pth"
        common.call(command, folder / "output.txt", **paths)
        last = common.read_log(folder)[-1]
        for checkpoint in folder.glob("*.pth"):
            checkpoint.unlink()
        return dict(acc1=last["test_acc1"], mean_class=last["test_mean_class"], epochs=epochs)

    def batch_size(self) -> int:
        return int(self.data.finetune.split("--batch_size ")[1].split()[0])

    def extra_epochs(self, images: Path) -> int:
        """Epochs of fine-tuning that cost as many FLOPs as pre-training with kept ratio 0.25."""
        cost = json.loads((self.folder("crossmae 0.25") / "measured.json").read_text())["mflop"]
        trained = self.data.epochs * self.count(self.images)
        flags = f"{self.data.finetune} {self.data.flags} --nb_classes 10 --data_path {images}"
        args = main_finetune.parse_args(flags.split())
        build = partial(build_classifier, args)
        gflop, _ = common.count_cost(build, args.input_size, (), args.in_chans)
        return round(trained * cost / (1000 * gflop) / self.count(images))

    @staticmethod
    def count(images: Path) -> int:
        return sum(1 for _ in (images / "train").rglob("*.png"))

    def measure(self, task: str, runs: list[tuple[str, int | str, int]]) -> None:
        results = common.Results("small_finetuning", "data", "task", "arm", "labels", "draw")
        for _, labels, draw in runs:  # before runs share it in parallel
            if labels != "all":
                size = self.data.few[1] * self.batch_size()
                label_subset(self.images, labels, draw, size, self.out)
        keys = [(self.name, task, *run) for run in runs]
        results.measure(lambda _, *key: self.finetune(*key), keys, self.args.jobs)

    def few(self) -> None:
        arms, labels = [*self.args.arms, "scratch"], self.data.labels
        runs = [(arm, n, draw) for draw in self.draws for n in labels for arm in arms]
        self.measure("fine-tuning", runs)

    def total(self) -> None:
        self.measure("fine-tuning", [("scratch, total", n, 0) for n in self.data.total])

    def all(self) -> None:
        self.measure("probe", [(arm, "all", 0) for arm in self.args.arms])
        arms = [*self.args.arms, "scratch", "scratch, total"]
        self.measure("fine-tuning", [(arm, "all", 0) for arm in arms])


if __name__ == "__main__":
    parser = common.get_args_parser(__doc__, "out", "jobs")
    flag = partial(add_flag, parser)
    flag("--data", str, [*DATA], "data sets", choices=[*DATA], nargs="+")
    flag("--from", str, "", "folder of the data's files", dest="source", metavar="DIR")
    flag("--stages", str, STAGES, "what to measure, in this order", choices=STAGES, nargs="+")
    flag("--arms", str, [*ARMS], "pre-training runs", choices=[*ARMS], nargs="+")
    flag("--draws", int, 3, "draws of few labels")
    args = parser.parse_args()
    for name in args.data:
        experiment = Experiment(name, args)
        for stage in args.stages:
            getattr(experiment, stage)()
