"""Shared by the experiments: running the project's commands and storing their results.

Every script here takes --out (folder of the runs) and --jobs (commands in parallel, each with one
thread), and keeps its results in docs/results/NAME.json, a row per measurement. Existing rows are
not measured again, so an interrupted experiment resumes.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for the project's modules

from tools.measure import count_flops  # noqa: E402
from util.io.files import atomic_write  # noqa: E402

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


def get_args_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--out",
        type=lambda path: Path(path).resolve(),
        default=ROOT / "output/experiments",
        help="folder of the runs",
    )
    parser.add_argument("--jobs", type=int, default=2, help="commands in parallel (default: 2)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0, 1, ... (default: 5)")
    return parser


def read_results(name: str) -> dict:
    """docs/results/NAME.json: machine and rows; without rows if there is no such file."""
    path = ROOT / f"docs/results/{name}.json"
    return json.loads(path.read_text()) if path.exists() else {"machine": None, "rows": []}


class Results:
    """Rows of docs/results/NAME.json, each found by its `key` columns; safe between threads.

    Exits if the rows were measured on another machine.
    """

    def __init__(self, name: str, key: tuple[str, ...]):
        self.path, self.key = ROOT / f"docs/results/{name}.json", key
        self.lock = threading.Lock()
        found = read_results(name)
        self.rows = found["rows"]
        if self.rows and found["machine"] != describe_machine():
            sys.exit(
                f"{self.path} was measured on another machine ({found['machine']}); delete it to "
                f"measure on this one ({describe_machine()})."
            )
        if self.rows:
            print(f"{len(self.rows)} results in {self.path} are not measured again.")

    def find(self, **key) -> dict | None:
        """The row with these key columns, or None."""
        return next((row for row in self.rows if all(row[k] == key[k] for k in self.key)), None)

    def add(self, **row) -> None:
        with self.lock:
            self.rows.append(row)
            self.rows.sort(key=lambda row: [str(row[k]) for k in self.key])
            lines = ",\n".join("  " + json.dumps(row) for row in self.rows)
            machine = json.dumps(describe_machine())
            with atomic_write(self.path) as tmp_path:
                tmp_path.write_text(f'{{"machine": {machine}, "rows": [\n{lines}\n]}}\n')
            print(json.dumps(row), flush=True)


def describe_machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()}, {cores} cores, {device}, torch {torch.__version__}"


def quote(path: Path) -> str:
    """A path quoted for a command line."""
    return shlex.quote(str(path))


def call(command: str, log: Path) -> tuple[str, float]:
    """Run `python COMMAND` in the repository with one thread; returns (output, seconds).

    Raises:
        RuntimeError: it failed; its output is in `log`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *shlex.split(command)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log.write_text(f"python {command}\n{done.stdout}")
    if done.returncode != 0:
        raise RuntimeError(f"`python {command}` failed, its output is in {log}.")
    return done.stdout, time.perf_counter() - start


def make_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a folder unless it exists; an incomplete one is written again."""
    if not folder.exists():
        tmp_folder = folder.with_name(f"{folder.name}.tmp")
        shutil.rmtree(tmp_folder, ignore_errors=True)
        tmp_folder.parent.mkdir(parents=True, exist_ok=True)
        write(tmp_folder)
        tmp_folder.rename(folder)


def write_images(command: str, folder: Path) -> Path:
    """Let `python COMMAND FOLDER` write the data set folder/images; returns that path."""
    make_folder(
        folder / "images",
        lambda path: call(f"{command} {quote(path)}", folder / "images.txt"),
    )
    return folder / "images"


def run_all(jobs: int, function: Callable, items: Iterable) -> list:
    """function(*item) for all items, `jobs` at a time; the first error ends the script."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(function, *item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def read_log(folder: Path) -> list[dict]:
    """log.txt of a run, a dictionary per epoch."""
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def pretrain(flags: str, data: Path, folder: Path) -> tuple[list[float], float]:
    """Pre-train, unless the folder holds the run; returns (loss of every epoch, seconds)."""
    time_file = folder / "seconds.txt"
    if not time_file.exists():
        _, seconds = call(
            f"main_pretrain.py {PRETRAIN} {flags} --data_path {quote(data)} "
            f"--output_dir {quote(folder)}",
            folder / "output.txt",
        )
        time_file.write_text(f"{seconds:.1f}\n")
    return [row["train_loss"] for row in read_log(folder)], float(time_file.read_text())


def knn(checkpoint: Path, data: Path, k: int = 10) -> float:
    """kNN accuracy in percent, on the mean patch feature."""
    command = (
        f"-m tools.knn --checkpoint {quote(checkpoint)} --data_path {quote(data)} --which mean "
        f"--k {k} --json"
    )
    printed, _ = call(command, checkpoint.parent / "knn.txt")
    return json.loads(printed.splitlines()[-1])["knn"][0]["acc1"]


def count_cost(model: torch.nn.Module, size: int, ratios: tuple) -> tuple[float, float]:
    """(GFLOP of the forward pass of one image, million trainable parameters), on meta."""
    imgs = torch.empty(1, 3, size, size, device="meta")
    with torch.no_grad():
        flops = count_flops(lambda: model.eval()(imgs, *ratios))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return flops / 1e9, trained / 1e6
