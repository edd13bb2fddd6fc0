"""Does pre-training help where labels are few? kNN and fine-tuning, against the same from scratch.

    python scripts/experiments/pretraining_helps.py [--seeds 5] [--labels 1 5 20 all]

The seed decides the pre-training, which pictures keep their labels, and the fine-tuning; arms with
the same seed have the same labels, so their difference is a paired one.
"""

import math
import random
from pathlib import Path

import common

EPOCHS = 20  # of pre-training
ARMS = {
    "crossmae 0.75": f"{common.CROSS} --kept_mask_ratio 0.75 --decoder_depth 4",
    "crossmae 0.25": f"{common.CROSS} --kept_mask_ratio 0.25 --decoder_depth 4",
    "mae": "--decoder_depth 4",
}
UPDATES = 50  # of fine-tuning per epoch, or a few more: few pictures are shown several times in it
# (epochs, layer decay); the long one gets what pre-training and fine-tuning take together.
SCHEDULE = {"pre-trained": (4, 0.65), "scratch": (4, 1.0), "scratch, long": (16, 1.0)}


def label(data: Path, labels: str, seed: int, folder: Path) -> Path:
    """Class folders in which only `labels` pictures of each class are left for training.

    Few pictures are there several times, as links: an epoch has UPDATES batches of ten or more.
    """
    if labels == "all":
        return data
    if not folder.exists():
        classes = sorted(path for path in (data / "train").iterdir())
        copies = math.ceil(UPDATES * 10 / (int(labels) * len(classes)))
        draw = random.Random(seed)
        for path in classes:
            (folder / "train" / path.name).mkdir(parents=True)
            for picture in draw.sample(sorted(path.iterdir()), int(labels)):
                for i in range(copies):
                    link = folder / "train" / path.name / f"{picture.stem}_{i}{picture.suffix}"
                    link.symlink_to(picture)
        (folder / "val").symlink_to(data / "val")
    return folder


def main(args) -> None:
    data, seeds = args.out / "digits", range(args.seeds)
    common.call(f"-m util.demo_data {data}", args.out / "digits.txt")
    features = common.Results("pretraining", key=("arm", "seed"))
    accuracies = common.Results("finetuning", key=("arm", "labels", "seed"))

    def run_pretraining(arm: str, seed: int) -> None:
        if features.find(arm=arm, seed=seed) is None:
            folder = args.out / f"{arm} {seed}".replace(" ", "-")
            flags = f"{ARMS[arm]} --epochs {EPOCHS} --seed {seed}"
            losses, seconds = common.pretrain(flags, data, folder)
            accuracy = common.knn(folder / "checkpoint.pth", data)
            features.add(arm=arm, seed=seed, knn=accuracy, losses=losses, seconds=seconds)

    def run_finetuning(arm: str, labels: str, seed: int) -> None:
        if accuracies.find(arm=arm, labels=labels, seed=seed) is not None:
            return
        epochs, layer_decay = SCHEDULE["pre-trained" if arm in ARMS else arm]
        start = args.out / f"{arm} {seed}".replace(" ", "-") / "checkpoint.pth"
        folder = args.out / f"ft {arm} {labels} {seed}".replace(" ", "-").replace(",", "")
        some = label(data, labels, seed, args.out / f"labels-{labels}-{seed}")
        printed, seconds = common.call(
            f"main_finetune.py {common.FINETUNE} --epochs {epochs} --layer_decay {layer_decay} "
            f"--seed {seed} --data_path {some} --output_dir {folder} "
            + (f"--finetune {start}" if arm in ARMS else ""),
            folder / "output.txt",
        )
        accuracy = common.read_log(folder)[-1]["test_acc1"]
        accuracies.add(arm=arm, labels=labels, seed=seed, acc1=accuracy, seconds=seconds)
        for checkpoint in folder.glob("*.pth"):
            checkpoint.unlink()

    for seed in seeds:
        common.run_all(args.jobs, run_pretraining, [(arm, seed) for arm in ARMS])
        for labels in args.labels:
            label(data, labels, seed, args.out / f"labels-{labels}-{seed}")
        arms = [*ARMS, "scratch", "scratch, long"]
        items = [(arm, labels, seed) for labels in args.labels for arm in arms]
        common.run_all(args.jobs, run_finetuning, items)


if __name__ == "__main__":
    parser = common.get_args_parser(__doc__.splitlines()[0])
    parser.add_argument("--labels", nargs="+", default=["1", "5", "20", "all"], help="per class")
    main(parser.parse_args())
