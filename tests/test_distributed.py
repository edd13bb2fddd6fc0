"""Distributed runs: launcher variables, devices, and equality of one and two ranks."""

import argparse
import re

import pytest
import torch
from processes import (
    fork_server,
    free_port,
    make_temp_dir,
    start_python,
    uninterrupted_run,
)

from util.distributed import choose_device, explain_lost_peer, read_launcher

SLURM = {"SLURM_PROCID": "13", "SLURM_NTASKS": "16", "SLURM_LOCALID": "5", "SLURM_JOB_ID": "1"}
ADDRESS = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


LAUNCHERS = {  # environment, --dist_on_itp, (rank, world size, local rank)
    "single process": ({}, False, (0, 1, 0)),
    "torchrun": ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, False, (3, 4, 1)),
    "srun": (SLURM | ADDRESS, False, (13, 16, 5)),
    "torchrun inside srun": (
        SLURM | ADDRESS | {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2"},
        False,
        (2, 4, 2),
    ),
    "salloc, one task": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, False, (0, 1, 0)),
    "batch script without srun": ({"SLURM_JOB_ID": "1"}, False, (0, 1, 0)),
    "Open MPI": (
        {f"OMPI_COMM_WORLD_{n}": v for n, v in (("RANK", "1"), ("SIZE", "2"), ("LOCAL_RANK", "0"))},
        True,
        (1, 2, 0),
    ),
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_variables(name):
    env, dist_on_itp, expected = LAUNCHERS[name]
    assert read_launcher(dict(env), dist_on_itp) == expected


def test_slurm_without_address_is_refused():
    with pytest.raises(ValueError, match="16 tasks but MASTER_ADDR and MASTER_PORT are not set"):
        read_launcher(dict(SLURM), False)


def test_invalid_device_is_refused():
    assert choose_device("cpu", 3) == torch.device("cpu")
    with pytest.raises(ValueError, match="--device gpu is not a device"):
        choose_device("gpu", 0)
    with pytest.raises(ValueError, match="--device meta is not supported"):
        choose_device("meta", 0)


def test_explain_lost_peer_ignores_errors_without_process_group():
    assert explain_lost_peer(RuntimeError("Connection closed by peer [127.0.0.1]:1")) is None


def test_training_with_srun_variables(tmp_path):
    """Two ranks with only SLURM's variables form a process group."""
    case = uninterrupted_run("main_pretrain", 2)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "SLURM_NTASKS": "2"}
    runs = []
    for rank in ("0", "1"):
        env = shared | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
        out, steps = tmp_path / f"out.{rank}", tmp_path / f"steps.{rank}"
        runs.append(fork_server.start(case.command(tmp_path), out, env, steps))
    assert [run.wait(120) for run in runs] == [0, 0], runs[0].text()
    case.check(tmp_path)


def test_evaluation_is_independent_of_world_size_and_batch_size():
    """12 images on one rank, or 6 on each of two: the same accuracy and loss."""
    case = uninterrupted_run("main_finetune")
    results = set()
    for size, batch in ((1, 8), (1, 5), (2, 4), (2, 8)):
        flags = ["--eval", "--resume", case.folder / "checkpoint.pth", "--dist_eval"]
        folder = make_temp_dir()
        line = case.command(folder, *flags, "--batch_size", batch)
        runs = fork_server.start_group(size, line, folder)
        assert [run.wait() for run in runs] == [0] * size, runs[0].text()
        results.add(re.search(r"\* Acc@1 .*", runs[0].text())[0])
    assert len(results) == 1


# SGD, because AdamW amplifies rounding noise in gradients that are mathematically zero, such as
# those of the key bias.
STEP = """
import argparse, os, sys
import torch
from models_cross import mae_vit_mini_patch4
from util import distributed
from util.optim import NativeScalerWithGradNormCount

args = argparse.Namespace(device="cpu", dist_on_itp=False, dist_url="env://", dist_timeout=60)
distributed.init_distributed_mode(args)
torch.manual_seed(0)
options = dict(img_size=32, patch_size=8, decoder_depth=1, weight_fm=True, use_input=True)
model = mae_vit_mini_patch4(**options)
imgs, noise = torch.randn(3, 8, 3, 32, 32), torch.rand(3, 8, 16)  # 3 steps, batch size 8
shard = slice(args.rank, None, args.world_size)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
scaler = NativeScalerWithGradNormCount(None, "cpu")
wrapped = distributed.wrap_ddp(model, args.device, False)
for step in range(3):
    loss = wrapped(imgs[step, shard], noise=noise[step, shard])
    norm = scaler(loss, optimizer)
    optimizer.zero_grad()
    mean = distributed.all_reduce_sum(loss.detach().clone()) / args.world_size
    if args.rank == 0:
        print(mean.item(), norm.item())
if args.rank == 0:
    torch.save({k: v for k, v in model.state_dict().items()}, sys.argv[1])
distributed.close()
"""


BUFFERS = """
import argparse
from torch import nn
from util import distributed

args = argparse.Namespace(device="cpu", dist_on_itp=False, dist_url="env://", dist_timeout=60)
distributed.init_distributed_mode(args)
norm = nn.BatchNorm1d(2)
norm.running_mean.fill_(5 + args.rank)
distributed.broadcast_buffers(norm)
print(norm.running_mean.tolist())
distributed.close()
"""


def run_ranks(code: str, size: int, *arguments) -> list[str]:
    """Run the code on one rank, or in a process group of several: the output of each."""
    shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(size))
    envs = [shared | {"RANK": str(rank)} if size > 1 else {} for rank in range(size)]
    runs = [start_python("-c", code, *arguments, env=env) for env in envs]
    assert [run.wait(120) for run in runs] == [0] * size, runs[0].text()
    return [run.text() for run in runs]


def test_buffers_are_broadcast_from_rank_0():
    """BatchNorm statistics differ between ranks after a step; those of rank 0 are saved."""
    assert run_ranks(BUFFERS, 2) == ["[5.0, 5.0]\n"] * 2


def test_two_ranks_match_one_with_twice_the_batch(tmp_path):
    """Same images and masks: losses, gradient norms and weights after three optimizer steps."""
    results = {}
    for size in (1, 2):
        path = tmp_path / f"{size}.pth"
        text, *_ = run_ranks(STEP, size, path)
        numbers = torch.tensor([list(map(float, line.split())) for line in text.splitlines()])
        results[size] = numbers, torch.load(path, weights_only=True)
    assert results[1][0].shape == (3, 2)
    torch.testing.assert_close(results[2][0], results[1][0], rtol=2e-5, atol=0)
    for name, value in results[1][1].items():
        torch.testing.assert_close(results[2][1][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_single_process_needs_no_address():
    """`args` has only what init_distributed_mode reads."""
    from util.distributed import init_distributed_mode

    args = argparse.Namespace(device="cpu", dist_on_itp=False, dist_url="env://", dist_timeout=5)
    init_distributed_mode(args)
    assert (args.distributed, args.rank, args.world_size) == (False, 0, 1)


def test_local_rank_without_its_own_gpu_is_refused(monkeypatch):
    """With srun --gpus-per-task=1 each task sees its GPU as index 0; otherwise it is shared."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.delenv("SLURM_GPUS_PER_TASK", raising=False)
    with pytest.raises(ValueError, match="Local rank 3 has no GPU of its own"):
        choose_device(None, 3)
    assert choose_device("cuda:0", 3) == torch.device("cuda:0")
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "1")
    assert choose_device(None, 3) == torch.device("cuda:0")
