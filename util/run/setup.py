"""What a run sets up before its epochs, and the files it logs to."""

import contextlib
import datetime
import json
import logging
import sys
import threading
import time
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from util import distributed
from util.io.checkpoint_file import plain_args
from util.io.errors import UserError
from util.rng import seed_all
from util.run.launch import start_logging
from util.run.startup import effective_batch_size
from util.run.wandb_log import WandbWriter

logger = logging.getLogger(__name__)


def start_run(args) -> None:
    """Join the process group, choose the device and seed this rank."""
    wanted = args.device
    distributed.init_distributed_mode(args)
    start_logging(args.rank)
    if not args.distributed:
        logger.info("Not using distributed mode")
    if wanted is None and args.device.type == "cpu":
        logger.info("No GPU found: running on the CPU")
    seed_all(args.seed + args.rank)
    if args.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


def set_lr(args, scale: float = 1.0, scale_text: str = "") -> str:
    """Set the peak learning rate unless --lr gives it; returns the formula for the log.

    lr = blr x effective batch size / 256 x scale (arXiv 1706.02677, with the scale of CrossMAE).
    """
    if args.lr is not None:
        return "--lr"
    effective = effective_batch_size(args)
    args.lr = args.blr * effective / 256 * scale
    return f"{args.blr:g} × {effective}/256{scale_text}"


@contextlib.contextmanager
def tensorboard_writer(args, state, num_iterations: int):
    """TensorBoard writer on rank 0, with --wandb one for both; None elsewhere, or without a folder.

    Points that an interrupted run wrote after the position of `state` are purged.

    Args:
        num_iterations: of one epoch.
    """
    if args.rank or not args.log_dir:
        yield None
        return
    threading.excepthook = ignore_full_disk
    step = int((state.epoch + state.iteration / num_iterations) * 1000)
    writer = SummaryWriter(args.log_dir, purge_step=step or None)
    if not step:
        flags = plain_args(args).items()
        flags = {name: v if isinstance(v, int | float) else str(v) for name, v in flags}
        for summary in hparams(flags, {"train_loss": 0.0})[:2]:
            writer.file_writer.add_summary(summary)
    if args.wandb:
        writer = WandbWriter(writer, args, is_resumed=bool(step))
    try:
        yield writer
    finally:
        with contextlib.suppress(OSError):  # a full disk was reported when it began to matter
            writer.close()


def ignore_full_disk(failure) -> None:
    """Thread hook: TensorBoard's next write raises the error of its thread again."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


@contextlib.contextmanager
def writing(what: str | Path):
    """Raises UserError where `what` cannot be written."""
    try:
        yield
    except OSError as error:
        text = f"Cannot write {what} ({error.strerror}); the last checkpoint is intact."
        raise UserError(text) from error


@contextlib.contextmanager
def training_time(args, state):
    """Log when training starts and how long it took."""
    if state.epoch >= args.epochs:
        logger.info(
            "Nothing to do: %s has finished epoch %d of --epochs %d (they count from 0)",
            *(args.resume or "--start_epoch", state.epoch - 1, args.epochs),
        )
    else:
        logger.info("Start training for %d epochs", args.epochs)
    start = time.time()
    yield
    logger.info("Training time %s", datetime.timedelta(seconds=int(time.time() - start)))


def describe_fallbacks() -> str:
    """Why torch.compile left code of this process uncompiled, in words; empty if it did not."""
    if "torch._dynamo" not in sys.modules:  # imported by the first compilation
        return ""
    counters = torch._dynamo.utils.counters
    reasons = [*counters["unimplemented"], *counters["graph_break"]]
    return "; ".join(dict.fromkeys(reason.splitlines()[0] for reason in reasons))


def append_json(args, entry: dict, name: str) -> None:
    """Append one JSON line to a file of the output folder, on rank 0.

    Raises:
        UserError: it cannot be written.
    """
    if args.rank == 0 and args.output_dir:
        path = Path(args.output_dir, name)
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def log_epoch(args, stats: dict) -> None:
    """Append an epoch to log.txt, on rank 0; warn if compiled code fell back.

    Raises:
        UserError: it cannot be written.
    """
    if fallbacks := describe_fallbacks():
        logger.warning("--compile: parts of the model run uncompiled: %s", fallbacks)
    append_json(args, stats, "log.txt")
