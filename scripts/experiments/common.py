"""Shared by the experiments: running the project's commands and storing their results.

Results are in docs/results/NAME.json, a row per measurement. Existing rows are not measured again,
so an interrupted experiment resumes.
"""

import json
import os
import platform
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE, STDOUT, run

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for the project's modules

from tools.measure import count_flops  # noqa: E402
from util.io.files import atomic_write  # noqa: E402
from util.run.flags import FlagParser, add_flag  # noqa: E402

# The encoder of every experiment, and how long the runs are: see docs/experiments.md.
PRETRAIN = (
    "--model mae_vit_mini_patch4 --norm_pix_loss --mask_ratio 0.75 "
    "--batch_size 32 --warmup_epochs 2 --lr 2e-3 --num_workers 0"
)
CROSS = "--cross_mae --weight_fm --use_input"
FINETUNE = (
    "--model vit_mini_patch4 --batch_size 10 --warmup_epochs 1 --lr 2e-3 "
    "--drop_path 0 --aa '' --reprob 0 --num_workers 0"
)
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
    path = ROOT / f"docs/results/{name}.json"
    return json.loads(path.read_text()) if path.exists() else {"machine": None, "rows": []}


class Results:
    """Rows of docs/results/NAME.json, each found by its `key` columns.

    Exits if the rows were measured on another machine.
    """

    def __init__(self, name: str, *key: str):
        self.path, self.key = ROOT / f"docs/results/{name}.json", key
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


def call(command: str, log: Path, **flags) -> tuple[str, float]:
    """Run `python COMMAND --FLAG=VALUE` with one thread; returns (output, seconds).

    Raises:
        RuntimeError: it failed; its output is in `log`.
    """
    argv = shlex.split(command) + [f"--{name}={value}" for name, value in flags.items()]
    command, env = f"python {shlex.join(argv)}", {**os.environ, "OMP_NUM_THREADS": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    done = run([sys.executable, *argv], cwd=ROOT, env=env, stdout=PIPE, stderr=STDOUT, text=True)
    seconds = time.perf_counter() - start
    log.write_text(f"{command}\n{done.stdout}")
    if done.returncode != 0:
        raise RuntimeError(f"`{command}` failed, its output is in {log}.")
    return done.stdout, seconds


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


def pretrain(flags: str, data: Path, folder: Path) -> tuple[list[float], float]:
    """Pre-train, unless the folder holds the run; returns (loss of every epoch, seconds)."""
    time_file = folder / "seconds.txt"
    if not time_file.exists():
        command = f"main_pretrain.py {PRETRAIN} {flags}"
        _, seconds = call(command, folder / "output.txt", data_path=data, output_dir=folder)
        time_file.write_text(f"{seconds:.1f}\n")
    return [row["train_loss"] for row in read_log(folder)], float(time_file.read_text())


def knn(folder: Path, data: Path) -> float:
    """kNN accuracy of a pre-training run in percent, on the mean patch feature."""
    command, checkpoint = "-m tools.knn --which mean --k 10 --json", folder / "checkpoint.pth"
    printed, _ = call(command, folder / "knn.txt", checkpoint=checkpoint, data_path=data)
    return json.loads(printed.splitlines()[-1])["knn"][0]["acc1"]


def count_cost(build: Callable[[], torch.nn.Module], size: int, ratios: tuple, chans=3) -> tuple:
    """(GFLOP of the forward pass of one image, million trainable parameters), on meta."""
    with torch.device("meta"), torch.no_grad():
        model, imgs = build().eval(), torch.empty(1, chans, size, size)
        flops = count_flops(lambda: model(imgs, *ratios))
    return flops / 1e9, sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
