"""Real training processes for the tests: started, killed, starved, and looked at afterwards.

Importing torch and timm takes seconds, so one process imports everything once and then forks a run
whenever it is asked to. A run is a process of its own in every respect: own signals, own output,
own exit status. `warm` is that process; it is started at the first use and ends with the tests.

Run as a script, this file is the process that forks.
"""

import atexit
import contextlib
import dataclasses
import functools
import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START_LIMIT = 180  # seconds for the imports, on a busy machine

MINI = "--input_size 32 --patch_size 16 --num_workers 0 --resume auto --device cpu".split()
PRETRAIN = [
    *("main_pretrain", *MINI, "--model", "mae_vit_mini_patch4", "--cross_mae", "--weight_fm"),
    *("--use_input", "--decoder_depth", "1", "--norm_pix_loss", "--batch_size", "8"),
    *("--epochs", "3", "--warmup_epochs", "1", "--keep_every", "0"),
]
FINETUNE = [
    *("main_finetune", *MINI, "--model", "vit_mini_patch4", "--batch_size", "8"),
    *("--epochs", "3", "--warmup_epochs", "1", "--blr", "1e-2", "--drop_path", "0.1"),
    *("--mixup", "0.8", "--cutmix", "1.0", "--reprob", "0.5"),
]
OFTEN = ["--save_every_minutes", "0.00001"]  # after every update
STEPS = 4  # per epoch, of the pictures below with 8 pictures per step
EPOCHS = 3


@dataclasses.dataclass
class Run:
    """One process of a run."""

    pid: int
    output: Path
    warm: "Warm"

    def wait(self, seconds: float = 60) -> int:
        """Exit status, -N for signal N. Kills the process and fails when time is up."""
        deadline = time.monotonic() + seconds
        while self.pid not in self.warm.ended:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"still running after {seconds} s:\n{self.text()[-3000:]}")
            self.warm.listen(0.05)
        return self.warm.ended[self.pid]

    def is_alive(self) -> bool:
        self.warm.listen(0)
        return self.pid not in self.warm.ended

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to this process alone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill_group(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the process and its loader processes, as launchers and terminals do."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def text(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""


class Warm:
    """The process that forks runs, seen from the tests."""

    def __init__(self):
        self.process = None
        self.ended: dict[int, int] = {}
        self.started: list[int] = []
        self.buffer = b""

    def open(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER_NAMES}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=ROOT,
        )
        atexit.register(self.close)
        self.read_until(lambda: self.started, START_LIMIT)
        self.started.clear()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(10)

    def listen(self, seconds: float) -> None:
        """Take in what the process has to say, waiting at most so long for it."""
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            return
        new = os.read(self.process.stdout.fileno(), 65536)
        if not new:
            raise RuntimeError("the process that forks runs has ended")
        *lines, self.buffer = (self.buffer + new).split(b"\n")
        for line in lines:
            word, pid, code = line.split()
            if word == b"started":
                self.started.append(int(pid))
            else:
                self.ended[int(pid)] = int(code)

    def read_until(self, is_done, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not is_done():
            assert time.monotonic() < deadline, "the process that forks runs does not answer"
            self.listen(0.2)

    def start(
        self,
        command: list[str],
        output: Path,
        env: dict[str, str] | None = None,
        steps: Path | None = None,
        **faults,
    ) -> Run:
        """Start a run.

        Args:
            command: main_pretrain or main_finetune, and its flags.
            output: file that gets what the run prints.
            env: further variables.
            steps: file that gets a line per step: epoch, iteration, loss and norm to the last bit.
            faults: see `arrange`.
        """
        if self.process is None:
            self.open()
        request = {"command": list(map(str, command)), "output": str(output), "env": env or {}}
        request |= {"steps": str(steps) if steps else None, "faults": faults}
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        self.read_until(lambda: self.started, 30)
        return Run(self.started.pop(), output, self)

    def start_group(self, size: int, command, folder: Path, faults=None, env=None, **more):
        """Start `size` processes that know each other; faults: {rank: arguments of `start`}."""
        if size == 1:
            extra = (faults or {}).get(0, {})
            return [self.start(command, folder / "out.0", env, folder / "steps.0", **more, **extra)]
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} | (env or {})
        runs = []
        for rank in range(size):
            own = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
            extra = more | (faults or {}).get(rank, {})
            steps = folder / f"steps.{rank}"
            runs.append(self.start(command, folder / f"out.{rank}", where | own, steps, **extra))
        return runs


class Case:
    """A way to train, and what it gives when nobody disturbs it."""

    def __init__(self, base: list[str], size: int):
        """Train once, without interruption.

        Args:
            base: PRETRAIN or FINETUNE.
            size: number of processes.
        """
        self.base, self.size = base, size
        self.folder = scratch()
        for run in self.start(self.folder):
            assert run.wait(120) == 0, run.text()
        for rank in range(size):
            assert len(read_steps(self.folder / f"steps.{rank}")) == STEPS * EPOCHS

    def command(self, folder: Path, *more) -> list[str]:
        flags = ["--data_path", small_pictures(), "--batch_size", 8 // self.size]
        return [*self.base, *flags, "--output_dir", folder, *more]

    def start(self, folder: Path, *more, faults=None, env=None) -> list[Run]:
        """Start or go on with a run in a folder of its own."""
        command = self.command(folder, *more)
        return warm.start_group(self.size, command, folder, faults=faults, env=env)

    def check(self, folder: Path) -> None:
        """The folder holds what the undisturbed run's holds, to the bit."""
        for rank in range(self.size):
            done, expected = (read_steps(f / f"steps.{rank}") for f in (folder, self.folder))
            assert set(done) == set(expected), f"rank {rank}: losses differ"
        self.check_files(folder)

    def check_files(self, folder: Path) -> None:
        """Log and last checkpoint are those of the undisturbed run."""
        from util.io.checkpoint_file import read_checkpoint

        assert read_log(folder) == read_log(self.folder)
        own, other = (read_checkpoint(f / "checkpoint.pth") for f in (folder, self.folder))
        for entry in ("model", "optimizer", "epoch", "scaler", "state", "class_names"):
            assert not differing(own[entry], other[entry], entry)
        assert not list(folder.glob("*.tmp.*"))


@functools.cache
def undisturbed(script: str, size: int = 1) -> Case:
    """The uninterrupted run of main_pretrain or main_finetune; each is made once."""
    return Case(PRETRAIN if script == "main_pretrain" else FINETUNE, size)


def scratch() -> Path:
    """An empty folder that lives as long as the tests."""
    folder = Path(tempfile.mkdtemp(prefix="runs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def small_pictures() -> Path:
    """{train,val}/{a,b}: 17 and 6 noisy pictures of 32 pixels per class."""
    import numpy as np
    from PIL import Image

    root = scratch()
    random = np.random.RandomState(1)
    for split, count in (("train", 17), ("val", 6)):
        for label in ("a", "b"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.randint(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


LAUNCHER_NAMES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
warm = Warm()


def launch(command: list[str], output: Path, *more) -> subprocess.Popen:
    """Start a script on two processes with torchrun, its own way, in a session of its own.

    Args:
        command: main_pretrain or main_finetune, and its flags.
        more: flags of torchrun.
    """
    script, *flags = command
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    line += [*more, ROOT / f"{script}.py", *flags]
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHER_NAMES}
    with open(output, "wb") as file:
        return subprocess.Popen(
            list(map(str, line)),
            cwd=ROOT,
            env=env | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def read_steps(path: Path) -> list[tuple[int, int, str]]:
    """(epoch, iteration, "loss norm" in hexadecimal) of every step, in the order they were done."""
    if not path.exists():
        return []
    lines = [line.split(" ", 2) for line in path.read_text().splitlines()]
    return [(int(epoch), int(iteration), values) for epoch, iteration, values in lines]


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def wait_until(is_done, seconds: float = 60, every: float = 0.002) -> None:
    deadline = time.monotonic() + seconds
    while not is_done():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(every)


def differing(a, b, where: str = "") -> list[str]:
    """Names of what differs by a bit between two nested containers of tensors and plain values."""
    import torch

    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{where} (keys)"]
        return [name for key in a for name in differing(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return [f"{where} (length)"]
        pairs = enumerate(zip(a, b, strict=True))
        return [name for i, (x, y) in pairs for name in differing(x, y, f"{where}.{i}")]
    return [] if a == b else [where]


# The other side: what follows runs in the process that forks, and in the runs.


def note_steps(path: str) -> None:
    """Write every step's loss down before anything else can happen to it."""
    from util.run.train_log import TrainLog

    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    add = TrainLog.add

    def note_and_add(self, iteration, optimizer, loss, grad_norm):
        norm = "-" if grad_norm is None else grad_norm.item().hex()
        os.write(file, f"{self.epoch} {iteration} {loss.item().hex()} {norm}\n".encode())
        add(self, iteration, optimizer, loss, grad_norm)

    TrainLog.add = note_and_add


def arrange(nan_at=None, file_limit=None, freeze_at=None, die_at=None, delay=0.0) -> None:
    """Prepare a fault of this process.

    Args:
        nan_at: training batches, counted from this process's start, whose pictures are NaN.
        file_limit: largest size in bytes a file may get; writing more fails.
        freeze_at: training batch before which the process stops answering.
        die_at: training batch before which the process is killed.
        delay: seconds that every training batch takes longer.
    """
    if file_limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    from util.data.loaders import DeviceLoader

    iterate = DeviceLoader.__iter__
    count = iter(range(1 << 30))

    def disturbed(self):
        if not hasattr(self.loader.batch_sampler, "set_epoch"):  # evaluation
            yield from iterate(self)
            return
        for imgs, labels in iterate(self):
            number = next(count)
            time.sleep(delay)
            if number == freeze_at:
                os.kill(os.getpid(), signal.SIGSTOP)
            if number == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield (imgs * float("nan") if number in (nan_at or ()) else imgs), labels

    DeviceLoader.__iter__ = disturbed


def serve() -> dict:
    """Fork for every request. Returns the request in the new process; ends with its input."""
    children = set()

    def say(*words):
        os.write(1, (" ".join(map(str, words)) + "\n").encode())

    say("started", 0, 0)
    buffer = b""
    while True:
        ready = select.select([0], [], [], 0.02)[0]
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            children.discard(pid)
            say("ended", pid, os.waitstatus_to_exitcode(status))
        if not ready:
            continue
        new = os.read(0, 65536)
        if not new:
            for pid in children:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            os._exit(0)
        *lines, buffer = (buffer + new).split(b"\n")
        for line in lines:
            pid = os.fork()
            if not pid:
                os.setsid()
                return json.loads(line)
            children.add(pid)
            say("started", pid, 0)


def become(request: dict):
    """Turn this process into the run that was asked for; returns its main module."""
    for number, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY | os.O_APPEND | os.O_CREAT)):
        file = os.open(request["output"] if number else os.devnull, flags)
        os.dup2(file, number)
    os.dup2(1, 2)
    os.environ.update(request["env"])
    name, *flags = request["command"]
    sys.argv = [f"{name}.py", *flags]
    if request["steps"]:
        note_steps(request["steps"])
    if request["faults"]:
        arrange(**request["faults"])
    return sys.modules[name]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import main_finetune  # noqa: F401
    import main_pretrain  # noqa: F401
    from util.run.launch import launch

    main = become(serve())
    launch(main.main, main.get_args_parser().parse_args())
