"""Process group: rank, world size, device, and the collectives that the code needs."""

import contextlib
import datetime
import logging
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from util.io.errors import UserError, one_line

logger = logging.getLogger(__name__)

LOST_PEER = (  # gloo's messages when another rank is gone
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "Broken pipe",
    "Read timeout",
    "Read error",
    "Socket closed",
)


def init_distributed_mode(args) -> None:
    """Read the rank from the launcher's variables and join the process group.

    Looks at torchrun's variables, then (with --dist_on_itp) Open MPI's, then SLURM's. Sets on args:
    distributed, rank, world_size, gpu (local rank), dist_backend, and device, which becomes a
    torch.device: as asked for, else cuda where there is one, else cpu.

    Raises:
        UserError: no such device, SLURM did not set MASTER_ADDR, or the group could not be
            formed.
    """
    args.rank, args.world_size, args.gpu = read_launcher(os.environ, args.dist_on_itp)
    args.distributed = args.world_size > 1 or "TORCHELASTIC_RUN_ID" in os.environ
    args.device = choose_device(args.device, args.gpu)
    if not args.distributed:
        args.dist_backend = None
        return
    args.dist_backend = "nccl" if args.device.type == "cuda" else "gloo"
    where = args.dist_url
    if where == "env://":
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    timeout = datetime.timedelta(seconds=args.dist_timeout)
    try:
        store = connect_attempt(args, timeout)
        dist.init_process_group(
            args.dist_backend,
            init_method=None if store else args.dist_url,
            store=store,
            rank=args.rank,
            world_size=args.world_size,
            timeout=timeout,
            device_id=args.device if args.device.type == "cuda" else None,
        )
        dist.barrier()
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        raise UserError(
            f"Rank {args.rank} of {args.world_size} could not join the process group at {where} "
            f"within {args.dist_timeout} s ({one_line(error)}); check that every rank is "
            "running, that address and port are reachable, and that the port is free "
            "(another --master_port)."
        ) from error


def connect_attempt(args, timeout: datetime.timedelta):
    """A store for this attempt, where torchrun keeps one store over all its restarts; else None.

    That store still holds the addresses of ranks that died, so every attempt gets a prefix of its
    own. Across hosts torchrun does not count attempts alike; there its environment variable
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each attempt a store of its own.
    """
    env = os.environ
    is_shared = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if args.dist_url != "env://" or not is_shared or env.get("GROUP_WORLD_SIZE") != "1":
        return None
    address, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    store = dist.TCPStore(address, port, args.world_size, is_master=False, timeout=timeout)
    return dist.PrefixStore(f"attempt_{env['TORCHELASTIC_RESTART_COUNT']}", store)


def explain_lost_peer(error: Exception) -> str | None:
    """One line for a failed collective; None for any other error."""
    text = str(error).strip()
    if not is_distributed() or not (
        isinstance(error, dist.DistError) or any(words in text for words in LOST_PEER)
    ):
        return None
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return (
        f"Rank {get_rank()} of {get_world_size()} (group at {where}) lost another rank "
        f"({one_line(error)[-160:]}): a process ended, hung for longer than --dist_timeout, "
        "or the network is down; see the other ranks' logs. --resume auto continues from the last "
        "checkpoint."
    )


def read_launcher(env, dist_on_itp: bool) -> tuple[int, int, int]:
    """(rank, world size, local rank) from the environment; (0, 1, 0) for a single process.

    Open MPI's address and port are put into `env`, where they are not set.

    Raises:
        UserError: the launcher's variables are not all there.
    """
    if dist_on_itp:
        if "OMPI_COMM_WORLD_RANK" not in env:
            raise UserError("Not started by mpirun: leave out --dist_on_itp, or use mpirun.")
        rank, size, local = (
            int(env[f"OMPI_COMM_WORLD_{name}"]) for name in ("RANK", "SIZE", "LOCAL_RANK")
        )
        env["MASTER_ADDR"] = env.get("MASTER_ADDR", "localhost")
        env["MASTER_PORT"] = env.get("MASTER_PORT", "29500")
        return rank, size, local
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    if "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
            raise UserError(
                f"SLURM started {env['SLURM_NTASKS']} tasks but MASTER_ADDR and MASTER_PORT are "
                "not set; export the first node's name and a free port, or start through torchrun."
            )
        return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env.get("SLURM_LOCALID", 0))
    return 0, 1, 0


def choose_device(wanted: str | None, local_rank: int) -> torch.device:
    """The device of this rank: `wanted`, or cuda if available, or cpu.

    Raises:
        UserError: `wanted` is not a device of this machine.
    """
    try:
        device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {wanted} is not a device; use cuda or cpu.") from error
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"--device {wanted} is not supported; use cuda or cpu.")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {wanted}: this machine has no usable GPU; use --device cpu.")
        count, index = torch.cuda.device_count(), device.index
        if index is None:
            # with srun --gpus-per-task=1 every task sees only its own GPU, as index 0
            index = 0 if count == 1 and "SLURM_GPUS_PER_TASK" in os.environ else local_rank
        if index >= count:
            raise UserError(
                f"Local rank {local_rank} has no GPU of its own: index {index} was asked for, "
                f"{count} found; start at most one rank per GPU (--nproc_per_node)."
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def is_distributed() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """Rank of this process, 0 without a group."""
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    """Number of ranks, 1 without a group."""
    return dist.get_world_size() if is_distributed() else 1


def is_main_process() -> bool:
    """Whether this is rank 0, which logs and writes."""
    return get_rank() == 0


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over the ranks, in place."""
    if is_distributed():
        dist.all_reduce(x)
    return x


def all_reduce_max(values: list[float], device: torch.device) -> list[float]:
    """Maximum of each value over the ranks."""
    if get_world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def all_gather_objects(own) -> list:
    """The objects of all ranks, by rank."""
    if get_world_size() == 1:
        return [own]
    gathered = [None] * get_world_size()
    dist.all_gather_object(gathered, own)
    return gathered


def all_gather_rows(x: Tensor) -> Tensor:
    """Rows of all ranks, one rank after the other; each may have another number of them."""
    if get_world_size() == 1:
        return x
    counts = all_gather_objects(len(x))
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([rows[:count] for rows, count in zip(gathered, counts, strict=True)])


def all_reduce_mean(x: float) -> float:
    """Mean over the ranks."""
    if get_world_size() == 1:
        return x
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return all_reduce_sum(torch.tensor(x, device=device)).item() / get_world_size()


def broadcast_buffers(model: nn.Module) -> None:
    """Give all ranks rank 0's buffers (BatchNorm statistics), which are the ones saved."""
    if get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def wrap_ddp(model: nn.Module, device: torch.device, find_unused_parameters: bool) -> nn.Module:
    """The model in DistributedDataParallel; the model itself for a world size of 1."""
    if get_world_size() == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        find_unused_parameters=find_unused_parameters,
        gradient_as_bucket_view=True,
    )


def sync_gradients(model: nn.Module, enabled: bool):
    """Context of forward and backward; without `enabled`, DDP does not reduce gradients."""
    if isinstance(model, DistributedDataParallel) and not enabled:
        return model.no_sync()
    return contextlib.nullcontext()


def close() -> None:
    """Leave the process group."""
    if is_distributed():
        dist.destroy_process_group()
