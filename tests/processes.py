"""Real training processes for the tests, with injected faults, and comparison of their results.

Importing torch and timm takes seconds, so a fork server imports everything once and forks a process
for each run. A run has its own session, output and exit status. `fork_server` starts the server at
first use and stops it when the tests end.

Run as a script, this file is the fork server.
"""

import atexit
import contextlib
import dataclasses
import functools
import gc
import json
import os
import resource
import runpy
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
START_TIMEOUT = 180  # seconds for the imports, on a busy machine

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
SAVE_EVERY_STEP = ["--save_every_minutes", "0.00001"]  # after every optimizer step
STEPS = 4  # per epoch of small_images() at a total batch size of 8
EPOCHS = 3


@dataclasses.dataclass
class Run:
    """A training process: one rank of a run."""

    pid: int
    output: Path
    server: "ForkServer"

    def wait(self, seconds: float = 60) -> int:
        """Exit status, -N for signal N. Kills the process and fails after `seconds`."""
        deadline = time.monotonic() + seconds
        while self.pid not in self.server.ended:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"still running after {seconds} s:\n{self.text()[-3000:]}")
            self.server.listen(0.05)
        return self.server.ended[self.pid]

    def is_alive(self) -> bool:
        self.server.listen(0)
        return self.pid not in self.server.ended

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Send a signal to this process only."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signum)

    def kill_group(self, signum: int = signal.SIGKILL) -> None:
        """Send a signal to the process and its workers, as launchers and terminals do."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signum)

    def text(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""


class ForkServer:
    """The fork server, as seen by the tests."""

    def __init__(self):
        self.process = None
        self.ended: dict[int, int] = {}
        self.started: list[int] = []
        self.buffer = b""

    def open(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment["PYTHONPATH"] = path
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=ROOT,
        )
        atexit.register(self.close)
        self.read_until(lambda: self.started, START_TIMEOUT)
        self.started.clear()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(10)

    def listen(self, seconds: float) -> None:
        """Read the messages of the server, waiting at most `seconds` for the first one."""
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            return
        new = os.read(self.process.stdout.fileno(), 65536)
        if not new:
            raise RuntimeError("the fork server has ended")
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
            assert time.monotonic() < deadline, "the fork server does not answer"
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
            output: file for the output of the run.
            env: additional environment variables.
            steps: file for a line per step: epoch, iteration, exact loss and gradient norm.
            faults: arguments of `inject_faults`.
        """
        return self.fork(output, command, env, steps=steps and str(steps), faults=faults)

    def fork(self, output: Path, command: list, env: dict[str, str] | None, **request) -> Run:
        """Send a request: see `set_up_process` and what follows it at the end of this file."""
        if self.process is None:
            self.open()
        request |= {"output": str(output), "command": list(map(str, command)), "env": env or {}}
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        self.read_until(lambda: self.started, 30)
        return Run(self.started.pop(), output, self)

    def start_group(self, size: int, command, folder: Path, faults=None, env=None, **more):
        """Start a process group of `size` ranks; faults: {rank: arguments of `start`}."""
        if size == 1:
            extra = (faults or {}).get(0, {})
            return [self.start(command, folder / "out.0", env, folder / "steps.0", **more, **extra)]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} | (env or {})
        runs = []
        for rank in range(size):
            rank_env = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
            extra = more | (faults or {}).get(rank, {})
            steps = folder / f"steps.{rank}"
            output = folder / f"out.{rank}"
            runs.append(self.start(command, output, shared | rank_env, steps, **extra))
        return runs


class Case:
    """A training command and the results of its uninterrupted run."""

    def __init__(self, base: list[str], size: int):
        """Train once, without interruption.

        Args:
            base: PRETRAIN or FINETUNE.
            size: number of ranks.
        """
        self.base, self.size = base, size
        self.folder = make_temp_dir()
        for run in self.start(self.folder):
            assert run.wait(120) == 0, run.text()
        for rank in range(size):
            assert len(read_steps(self.folder / f"steps.{rank}")) == STEPS * EPOCHS

    def command(self, folder: Path, *more) -> list[str]:
        flags = ["--data_path", small_images(), "--batch_size", 8 // self.size]
        return [*self.base, *flags, "--output_dir", folder, *more]

    def start(self, folder: Path, *more, faults=None, env=None) -> list[Run]:
        """Start or resume a run in `folder`."""
        command = self.command(folder, *more)
        return fork_server.start_group(self.size, command, folder, faults=faults, env=env)

    def check(self, folder: Path) -> None:
        """Assert that steps, log and checkpoint equal the uninterrupted run's bit for bit."""
        for rank in range(self.size):
            done, expected = (read_steps(f / f"steps.{rank}") for f in (folder, self.folder))
            assert set(done) == set(expected), f"rank {rank}: losses differ"
        self.check_files(folder)

    def check_files(self, folder: Path) -> None:
        """Assert that the log and the last checkpoint equal the uninterrupted run's."""
        from util.io.checkpoint_file import read_checkpoint

        assert read_log(folder) == read_log(self.folder)
        actual, expected = (read_checkpoint(f / "checkpoint.pth") for f in (folder, self.folder))
        for entry in ("model", "optimizer", "epoch", "scaler", "state", "class_names"):
            assert not find_differences(actual[entry], expected[entry], entry)
        assert not list(folder.glob("*.tmp.*"))


@functools.cache
def uninterrupted_run(script: str, size: int = 1) -> Case:
    """The uninterrupted run of main_pretrain or main_finetune, cached."""
    return Case(PRETRAIN if script == "main_pretrain" else FINETUNE, size)


def make_temp_dir() -> Path:
    """An empty folder that is deleted when the tests end."""
    folder = Path(tempfile.mkdtemp(prefix="runs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def small_images() -> Path:
    """{train,val}/{a,b}: 17 and 6 random 32x32 images per class."""
    import numpy as np
    from PIL import Image

    root = make_temp_dir()
    rng = np.random.RandomState(1)
    for split, count in (("train", 17), ("val", 6)):
        for label in ("a", "b"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.randint(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def run_python(*words, cwd: Path = ROOT, env=None) -> subprocess.CompletedProcess:
    """`python WORDS` as a user runs it: -m MODULE, -c CODE or a file, and what follows.

    The process starts with PyTorch and the scripts imported; use `subprocess` where that matters.
    """
    run = start_python(*words, cwd=cwd, env=env)
    code, errors = run.wait(120), run.output.with_name("errors").read_text()
    return subprocess.CompletedProcess(words, code, run.text(), errors)


def start_python(*words, cwd: Path = ROOT, env=None) -> Run:
    """The same, without waiting for its end; standard error goes into the file `errors`."""
    folder = make_temp_dir()
    more = dict(python=True, errors=str(folder / "errors"), cwd=str(cwd))
    return fork_server.fork(folder / "output", words, env, **more)


LAUNCHER_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
fork_server = ForkServer()


def start_torchrun(command: list[str], output: Path, *more) -> subprocess.Popen:
    """Start a script on two ranks with torchrun, in a new session.

    Args:
        command: main_pretrain or main_finetune, and its flags.
        more: torchrun flags.
    """
    script, *flags = command
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    line += [*more, ROOT / f"{script}.py", *flags]
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES}
    with open(output, "wb") as file:
        return subprocess.Popen(
            list(map(str, line)),
            cwd=ROOT,
            env=env,
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
    """(epoch, iteration, "loss norm" in hexadecimal) of every step, in the order executed."""
    if not path.exists():
        return []
    lines = [line.split(" ", 2) for line in path.read_text().splitlines()]
    return [(int(epoch), int(iteration), values) for epoch, iteration, values in lines]


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def wait_until(is_done, seconds: float = 60, every: float = 0.002) -> None:
    deadline = time.monotonic() + seconds
    while not is_done():
        assert time.monotonic() < deadline, f"condition not met within {seconds} s"
        time.sleep(every)


def find_differences(a, b, path: str = "") -> list[str]:
    """Paths of the entries that differ between two nested containers of tensors and values."""
    import torch

    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{path} (keys)"]
        return [name for key in a for name in find_differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return [f"{path} (length)"]
        pairs = enumerate(zip(a, b, strict=True))
        return [name for i, (x, y) in pairs for name in find_differences(x, y, f"{path}.{i}")]
    return [] if a == b else [path]


# Server side: what follows runs in the fork server and in the runs.


def record_steps(path: str) -> None:
    """Write the exact loss and gradient norm of every step to a file before TrainLog sees them."""
    from util.run.train_log import TrainLog

    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    add = TrainLog.add

    def record_and_add(self, iteration, optimizer, loss, grad_norm):
        norm = "-" if grad_norm is None else grad_norm.item().hex()
        os.write(file, f"{self.epoch} {iteration} {loss.item().hex()} {norm}\n".encode())
        add(self, iteration, optimizer, loss, grad_norm)

    TrainLog.add = record_and_add


def inject_faults(nan_at=None, max_file_size=None, freeze_at=None, kill_at=None, delay=0.0) -> None:
    """Inject faults into this process. Training batches are counted from its start.

    Args:
        nan_at: indices of training batches whose images become NaN.
        max_file_size: file size limit in bytes; writing more fails.
        freeze_at: index of the training batch before which the process is stopped (SIGSTOP).
        kill_at: index of the training batch before which the process is killed.
        delay: additional seconds per training batch.
    """
    if max_file_size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_size, max_file_size))
    from util.data.loaders import DeviceLoader

    iterate = DeviceLoader.__iter__
    count = iter(range(1 << 30))

    def iterate_with_faults(self):
        if not hasattr(self.loader.batch_sampler, "set_epoch"):  # evaluation
            yield from iterate(self)
            return
        for imgs, labels in iterate(self):
            index = next(count)
            time.sleep(delay)
            if index == freeze_at:
                os.kill(os.getpid(), signal.SIGSTOP)
            if index == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield (imgs * float("nan") if index in (nan_at or ()) else imgs), labels

    DeviceLoader.__iter__ = iterate_with_faults


def serve() -> dict:
    """Fork for every request. Returns the request in the child; exits at the end of its input."""
    children = set()

    def report(*words):
        os.write(1, (" ".join(map(str, words)) + "\n").encode())

    report("started", 0, 0)
    buffer = b""
    while True:
        ready = select.select([0], [], [], 0.02)[0]
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            children.discard(pid)
            report("ended", pid, os.waitstatus_to_exitcode(status))
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
            report("started", pid, 0)


def set_up_process(request: dict) -> None:
    """Redirect input and output, set the environment, and let Ctrl-C interrupt."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    output, append = request["output"], os.O_WRONLY | os.O_APPEND | os.O_CREAT
    files = [(os.devnull, os.O_RDONLY), (output, append), (request.get("errors", output), append)]
    for descriptor, (path, flags) in enumerate(files):
        os.dup2(os.open(path, flags), descriptor)
    os.environ.update(request["env"])


def run_script(name: str, *flags: str, steps: str | None, faults: dict) -> None:
    """Run main_pretrain or main_finetune; for the other arguments see `ForkServer.start`."""
    sys.argv = [f"{name}.py", *flags]
    if steps:
        record_steps(steps)
    if faults:
        inject_faults(**faults)
    main = sys.modules[name]
    launch(main.main, main.get_args_parser().parse_args())


def run_as_python(first: str, *words: str, cwd: str) -> None:
    """What `python FIRST WORDS` does."""
    os.chdir(cwd)
    sys.path[0] = cwd
    sys.argv = [first, *words[1:]] if first in ("-m", "-c") else [first, *words]
    if first == "-m":
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        exec(compile(words[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path[0] = str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import main_finetune  # noqa: F401
    import main_pretrain  # noqa: F401
    from util.run.launch import launch

    gc.freeze()  # the processes share what is imported, and end sooner
    request = serve()
    set_up_process(request)
    if request.get("python"):
        run_as_python(*request["command"], cwd=request["cwd"])
    else:
        run_script(*request["command"], steps=request["steps"], faults=request["faults"])
