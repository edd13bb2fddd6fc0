"""tools.submit: what is submitted, and a job of submitit's local executor that is preempted."""

import importlib.util
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tools import submit
from util.io.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "--model mae_vit_mini_patch4 --decoder_depth 1 --input_size 16 --batch_size 2 --device cpu"
FLAGS = f"{FLAGS} --num_workers 0 --warmup_epochs 0".split()


def parse(*words):
    return submit.get_args_parser().parse_args(list(map(str, words)))


def test_command_of_a_process(tmp_path):
    """Its own output folder and resume win; everything after the script's name is the script's."""
    start = ["--job_dir", tmp_path, "--nodes", 2]
    command = submit.build_command(parse(*start, "main_pretrain.py", *FLAGS, "--data_path", "x"))
    assert command[:3] == [sys.executable, "-u", str(ROOT / "main_pretrain.py")]
    assert command[3:] == [
        *FLAGS,
        *("--data_path", "x", "--output_dir", str(tmp_path), "--resume", "auto"),
    ]
    separated = submit.build_command(parse(*start, "main_pretrain.py", "--", *FLAGS))
    assert separated[3 : 3 + len(FLAGS)] == FLAGS
    own = ["--output_dir", "out", "--resume", "c.pth"]
    assert submit.build_command(parse(*start, "main_finetune.py", *own))[3:] == own


def test_output_and_resume_of_a_config_stay(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("output_dir: /shared/run\nresume: /shared/old.pth\n")
    flags = ["--config", str(file)]
    args = parse("--job_dir", tmp_path, "main_pretrain.py", *flags)
    assert submit.build_command(args)[3:] == flags


def test_mistakes_are_named(tmp_path, capsys, monkeypatch):
    for words, text in (
        (["main.py"], "invalid choice: 'main.py'"),
        (["main_pretrain.py"], "the following arguments are required: --job_dir"),
        (["--ngpu", "x", "main_pretrain.py"], "argument --ngpus: invalid int value"),
    ):
        with pytest.raises(SystemExit):
            parse(*([] if "--job_dir" in text else ["--job_dir", tmp_path]), *words)
        assert text in capsys.readouterr().err
    with pytest.raises(UserError, match="--nodes is 0; it must be in"):
        submit.main(parse("--job_dir", tmp_path, "--nodes", 0, "main_pretrain.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs an optional package: pip install submitit"):
        submit.main(parse("--job_dir", tmp_path, "main_pretrain.py"))


@pytest.mark.parametrize("ngpus, tasks, gpus", [(8, 8, 8), (0, 1, None)])
def test_job_of_slurm(ngpus, tasks, gpus, tmp_path, monkeypatch):
    """What submitit is asked for: a task and a GPU per process, or one task on the CPU."""

    class Executor:
        def __init__(self, folder, cluster, **options):
            asked.update(folder=folder, cluster=cluster, **options)

        def update_parameters(self, **parameters):
            asked.update(parameters)

        def submit(self, training):
            return SimpleNamespace(job_id="7")

    asked = {}
    stub = ModuleType("submitit")
    stub.__spec__ = importlib.util.spec_from_loader("submitit", None)
    stub.AutoExecutor = Executor
    monkeypatch.setitem(sys.modules, "submitit", stub)
    monkeypatch.setenv("PYTHONPATH", "")
    words = ["--nodes", 2, "--ngpus", ngpus, "--timeout", 90, "--partition", "gpu"]
    submit.main(parse(*words, "--job_dir", tmp_path, "main_pretrain.py", *FLAGS))
    assert asked == {
        **{"folder": tmp_path / "%j", "cluster": "slurm", "slurm_max_num_timeout": 100},
        **{"name": "crossmae", "nodes": 2, "tasks_per_node": tasks, "gpus_per_node": gpus},
        **{"cpus_per_task": 10, "timeout_min": 90, "slurm_partition": "gpu"},
        "slurm_signal_delay_s": 120,
    }


def test_wrong_flags_end_before_the_queue(tmp_path, capsys):
    pytest.importorskip("submitit")
    with pytest.raises(SystemExit):
        submit.main(parse("--job_dir", tmp_path, "--cluster", "local", "main_pretrain.py", "--x"))
    assert "unrecognized arguments: --x" in capsys.readouterr().err


def descendants(pid: int) -> list[int]:
    found = [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*found, *(each for child in found for each in descendants(child))]


@pytest.mark.slow  # two processes import torch, twice
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_local_job_is_preempted_and_continues(image_folder, tmp_path, monkeypatch):
    """All processes of the job get the signal, as SLURM sends it; two of them train. They save,
    the job is queued again, and goes on exactly where it stopped.
    """
    pytest.importorskip("submitit")
    flags = [*FLAGS, "--data_path", image_folder, "--epochs", 10000]
    local = ["--cluster", "local", "--ngpus", 2, "--timeout", 5]
    job = submit.main(parse(*local, "--job_dir", tmp_path, "main_pretrain.py", *flags))

    def output(suffix: str = "_0_log.out") -> str:
        return "".join(p.read_text() for p in (tmp_path / job.job_id).glob(f"*{suffix}"))

    def wait_for(text: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while text not in output():
            assert time.monotonic() < end and not job.done(), output() + output("log.err")
            time.sleep(0.1)

    try:
        wait_for("Epoch: [3]")
        for pid in descendants(job._process.pid):
            os.kill(pid, signal.SIGUSR2)
        wait_for("exactly where it stopped")
        before, _ = output().split("exactly where it stopped", 1)
        assert "Stopped by a signal; --resume auto continues from here" in before
        last = int(before.rpartition("Epoch: [")[2].split("]")[0])
        position = int(before.rpartition("Resuming at epoch ")[2].split(",")[0])
        assert position in (last, last + 1)
        assert "world_size" not in before.rpartition("Resume checkpoint")[2]
        assert "effective batch size: 4" in before  # two ranks
    finally:
        for pid in [*descendants(job._process.pid), job._process.pid]:
            os.kill(pid, signal.SIGKILL)
        job._process.wait()
