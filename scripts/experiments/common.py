"""Shared by the experiments: running the project's commands and storing their results.

Results are in docs/results/NAME.json, a row per measurement. Existing rows are not measured again,
so an interrupted experiment resumes.
"""

import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import statistics
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from subprocess import PIPE, STDOUT, run

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs/results"
sys.path.insert(0, str(ROOT))  # for the project's modules

import main_pretrain  # noqa: E402
from tools.bench.measure import count_flops  # noqa: E402
from util.build import build_pretrain_model  # noqa: E402
from util.data.image_io import read_image  # noqa: E402
from util.eval.knn import list_splits, measure_knn  # noqa: E402
from util.io.files import atomic_write  # noqa: E402
from util.run.flags import FlagParser, add_flag  # noqa: E402

# The encoder of every experiment: see docs/experiments.md.
PRETRAIN = (
    "--model mae_vit_mini_patch4 --mask_ratio 0.75 --decoder_depth 4 --lr 2e-3 --num_workers 0"
)
CROSS = "--cross_mae --weight_fm --use_input"
FLAGS = {
    "out": (lambda path: Path(path).resolve(), ROOT / "output/experiments", "folder of the runs"),
    "jobs": (int, 2, "commands in parallel, each with one thread"),
    "seeds": (int, 5, "seeds 0, 1, ..."),
}


def get_args_parser(doc: str, *flags: str) -> FlagParser:
    """Parser of a script with this docstring and these of FLAGS."""
    parser = FlagParser(description=doc.splitlines()[0])
    for name in flags:
        add_flag(parser, f"--{name}", *FLAGS[name])
    return parser


def read_results(name: str) -> dict:
    """docs/results/NAME.json: machine and rows; without rows if there is no such file."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {"machine": None, "rows": []}


class Results:
    """Rows of docs/results/NAME.json, each found by its `key` columns.

    Exits if the rows were measured on another machine.
    """

    def __init__(self, name: str, *key: str):
        self.path, self.key = RESULTS / f"{name}.json", key
        self.lock = threading.Lock()
        found, self.machine = read_results(name), describe_machine()
        self.rows = found["rows"]
        if self.rows and found["machine"] != self.machine:
            remedy = f"delete it to measure on this one ({self.machine})"
            sys.exit(f"{self.path} was measured on another machine ({found['machine']}); {remedy}.")
        if self.rows:
            print(f"{len(self.rows)} results in {self.path} are not measured again.")

    def find_missing(self, keys: Iterable[tuple]) -> list[tuple]:
        """The keys without a row."""
        known = {tuple(row[column] for column in self.key) for row in self.rows}
        return [key for key in keys if key not in known]

    def measure(self, function: Callable[..., dict], keys: Iterable[tuple], jobs: int = 1) -> None:
        """Add a row with the columns function(*key) for every key without one, `jobs` at a time.

        The first error ends it; rows that are being measured are still added.
        """
        with ThreadPoolExecutor(jobs) as pool:
            missing = self.find_missing(keys)
            futures = [pool.submit(self.add_row, key, function) for key in missing]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def add_row(self, key: tuple, function: Callable[..., dict]) -> None:
        row = dict(zip(self.key, key, strict=True)) | function(*key)
        with self.lock:
            self.rows.append(row)
            self.rows.sort(key=lambda row: [str(row[column]) for column in self.key])
            lines = ",\n".join("  " + json.dumps(row) for row in self.rows)
            machine = json.dumps(self.machine)
            with atomic_write(self.path) as tmp_path:
                tmp_path.write_text(f'{{"machine": {machine}, "rows": [\n{lines}\n]}}\n')
            print(json.dumps(row), flush=True)


def describe_machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()}, {cores} cores, {device}, torch {torch.__version__}"


def call(command: str, log: Path, **flags) -> str:
    """Run `python COMMAND --FLAG=VALUE` with one thread; returns its output, kept in `log` as well.

    Exits if it fails.
    """
    argv = shlex.split(command) + [f"--{name}={value}" for name, value in flags.items()]
    command, env = f"python {shlex.join(argv)}", {**os.environ, "OMP_NUM_THREADS": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    done = run([sys.executable, *argv], cwd=ROOT, env=env, stdout=PIPE, stderr=STDOUT, text=True)
    log.write_text(f"{command}\n{done.stdout}")
    if done.returncode != 0:
        last = (done.stdout.splitlines() or [""])[-1]
        sys.exit(f"`{command}` failed, its output is in {log}: {last}")
    return done.stdout


def name_folder(out: Path, *names) -> Path:
    return out / " ".join(map(str, names)).replace(" ", "-").replace(",", "")


def make_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a folder unless it exists; an incomplete one is written again."""
    if not folder.exists():
        tmp_folder = folder.with_name(f"{folder.name}.tmp")
        shutil.rmtree(tmp_folder, ignore_errors=True)
        tmp_folder.parent.mkdir(parents=True, exist_ok=True)
        write(tmp_folder)
        tmp_folder.rename(folder)


def write_images(command: str, out: Path) -> Path:
    """Let `python COMMAND FOLDER` write the data set out/images; returns that path."""
    images, log = out / "images", out / "images.txt"
    make_folder(images, lambda folder: call(f"{command} {shlex.quote(str(folder))}", log))
    return images


def read_log(folder: Path) -> list[dict]:
    """log.txt of a run, a dictionary per epoch."""
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def pretrain(flags: str, data: Path, folder: Path) -> dict:
    """Pre-train in `folder`, or continue there: loss of every epoch, seconds, and what it costs."""
    command = f"main_pretrain.py {flags} --resume auto --save_every_minutes 3"
    call(command, folder / "output.txt", data_path=data, output_dir=folder)
    args = main_pretrain.get_args_parser().parse_args(command.split()[1:])
    build, ratios = partial(build_pretrain_model, args), (args.mask_ratio, args.kept_mask_ratio)
    gflop, mparams = count_cost(build, args.input_size, ratios, args.in_chans)
    return dict(
        losses=[round(epoch["train_loss"], 4) for epoch in read_log(folder)],
        seconds_per_epoch=round(seconds_per_epoch(folder), 1),
        mflop=round(gflop * 1000, 2),
        mparams=round(mparams, 3),
    )


def seconds_per_epoch(folder: Path) -> float:
    """Median over the run's TensorBoard points, so that an interruption does not count."""
    events = EventAccumulator(str(folder)).Reload()
    points = sorted((x.step / 1000, x.wall_time) for x in events.Scalars("train_loss"))
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(points) if b[0] > a[0]]
    return statistics.median(seconds / epochs for epochs, seconds in steps)


def finetune(flags: str, folder: Path, labeled: Path, test: Path, **paths: Path) -> dict:
    """Fine-tune on labeled/train in `folder`, or continue there; accuracies on test/val in percent,
    of the last weights.
    """
    command, checkpoint = f"main_finetune.py {flags}", folder / "checkpoint.pth"
    paths |= dict(data_path=labeled, output_dir=folder)
    call(f"{command} --resume auto", folder / "output.txt", **paths)
    printed = call(f"{command} --eval", folder / "eval.txt", data_path=test, resume=checkpoint)
    (acc1,), (mean_class,) = (
        re.findall(rf"{name} ([\d.]+)", printed) for name in ("Acc@1", "class accuracy:")
    )
    for path in folder.glob("*.pth"):
        path.unlink()
    return dict(acc1=float(acc1), mean_class=float(mean_class))


def knn(checkpoint: Path, data: Path, which: str = "mean", k: int = 20) -> float:
    """kNN accuracy of a pre-training run in percent."""
    command = f"-m tools.knn --which {which} --k {k} --json --num_workers 0"
    log = checkpoint.parent / f"knn-{checkpoint.stem}-{which}.txt"
    printed = call(command, log, checkpoint=checkpoint, data_path=data)
    return json.loads(printed.splitlines()[-1])["knn"][0]["acc1"]


def pixel_knn(data: Path, k: int = 20) -> float:
    """The same of gray images as they are, each a vector of its pixels."""
    classes, *splits = list_splits(str(data))
    (bank, bank_labels), queries = (
        (
            torch.stack([read_image(path, 1).flatten() / 255 for path, _ in samples]),
            torch.tensor([label for _, label in samples]),
        )
        for samples in splits
    )
    return measure_knn(bank, bank_labels, [queries], [k], 0.07, len(classes))[k][0]


def label_subset(data: Path, labels: str, seed: int, size: int, out: Path) -> Path:
    """Data set in `out` with at most `labels` random training images of each class, each linked
    as often as `size` images need, and once for validation; `data` itself for "all".
    """
    if labels == "all":
        return data

    def write(folder: Path) -> None:
        rng = random.Random(seed)
        chosen = {}
        for path in sorted((data / "train").iterdir()):
            images = sorted(path.iterdir())
            chosen[path.name] = rng.sample(images, min(int(labels), len(images)))
        copies = math.ceil(size / sum(map(len, chosen.values())))
        for name, images in chosen.items():
            for part, times in (("train", copies), ("val", 1)):
                links = folder / part / name
                links.mkdir(parents=True)
                for image, i in product(images, range(times)):
                    (links / f"{image.stem}_{i}{image.suffix}").symlink_to(image)

    subset = out / f"labels-{labels}-{seed}"
    make_folder(subset, write)
    return subset


def count_cost(build: Callable[[], torch.nn.Module], size: int, ratios: tuple, chans=3) -> tuple:
    """(GFLOP of the forward pass of one image, million trainable parameters), on meta."""
    with torch.device("meta"), torch.no_grad():
        model, imgs = build().eval(), torch.empty(1, chans, size, size)
        flops = count_flops(lambda: model(imgs, *ratios))
    return flops / 1e9, sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
