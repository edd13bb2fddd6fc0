"""What every run does around its epochs: start, log, end in one sentence."""

import contextlib
import datetime
import gc
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from util import distributed
from util.io.errors import UserError
from util.rng import seed_all
from util.run import signals
from util.run.state import clean_output_dir

logger = logging.getLogger(__name__)


class ClockFormatter(logging.Formatter):
    """`[HH:MM:SS.ffffff] message`, the form users of the MAE family know."""

    def format(self, record: logging.LogRecord) -> str:
        clock = datetime.datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")
        return f"[{clock}] {record.getMessage()}"


def start_logging(rank: int = 0) -> None:
    """Messages to standard output; of ranks other than 0, warnings only."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(ClockFormatter())
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING, handlers=[handler], force=True
    )


def read_rank() -> int:
    """Rank by the environment, before the processes know each other."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


def start_run(args) -> None:
    """Join the other processes and seed this one."""
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
    """Peak learning rate by the linear rule, unless --lr gives it; returns the formula in words.

    lr = blr x effective batch / 256 x scale (arXiv 1706.02677, with the scale of the CrossMAE
    code).
    """
    if args.lr is not None:
        return f"lr = {args.lr:.2e} (--lr)"
    effective = args.batch_size * args.accum_iter * args.world_size
    args.lr = args.blr * effective / 256 * scale
    return f"lr = {args.blr:g} × {effective}/256{scale_text} = {args.lr:.2e}"


def make_writer(args, step: int) -> SummaryWriter | None:
    """TensorBoard writer of rank 0; None elsewhere or without a log folder.

    Args:
        step: first of this run; what an interrupted run wrote from there on is taken back.
    """
    if args.rank or not args.log_dir:
        return None
    threading.excepthook = report_thread
    writer = SummaryWriter(args.log_dir, purge_step=step or None)
    if not step:
        flags = {k: v if isinstance(v, int | float) else str(v) for k, v in vars(args).items()}
        for summary in hparams(flags, {"train_loss": 0.0})[:2]:
            writer.file_writer.add_summary(summary)
    return writer


def report_thread(failure) -> None:
    """Leave a full disk to the next write, where TensorBoard's thread hands its error on."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


def log_epoch(args, stats: dict) -> None:
    """Append one JSON line to log.txt, on rank 0."""
    if args.rank == 0 and args.output_dir:
        path = Path(args.output_dir, "log.txt")
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(stats) + "\n")
        except OSError as error:
            raise UserError(
                f"Cannot write {path} ({error.strerror}); the checkpoint before is as it was."
            ) from error


@contextlib.contextmanager
def recording(args, state, num_iterations: int):
    """TensorBoard writer (or None) during training; says when it starts and how long it took."""
    signals.watch()
    if args.rank == 0 and args.output_dir:
        clean_output_dir(args, state.epoch)
    writer = make_writer(args, int((state.epoch + state.iteration / num_iterations) * 1000))
    if state.epoch >= args.epochs:
        logger.info(
            "Nothing to do: %s has finished epoch %d of --epochs %d (they count from 0)",
            *(args.resume or "--start_epoch", state.epoch - 1, args.epochs),
        )
    else:
        logger.info("Start training for %d epochs", args.epochs)
    start = time.time()
    try:
        yield writer
    finally:
        if writer is not None:
            with contextlib.suppress(OSError):  # a full disk was reported where it began to matter
                writer.close()
    logger.info("Training time %s", datetime.timedelta(seconds=int(time.time() - start)))


def run(main, args) -> None:
    """main(args); what a user can cause ends in one sentence and exit status 1.

    Set CROSSMAE_TRACEBACK=1 to see where it came from.
    """
    start_logging(read_rank())
    try:
        main(args)
    except KeyboardInterrupt:
        logger.error("Error: interrupted")
        sys.exit(128 + signal.SIGINT)
    except UserError as error:
        if os.environ.get("CROSSMAE_TRACEBACK"):
            raise
        # The error of a loader process brings its traceback along; the sentence is the last line.
        text = str(error).strip() or type(error).__qualname__
        sentence = text.splitlines()[-1].split(f"{type(error).__qualname__}: ")[-1]
        logger.error("Error: %s", sentence)
        sys.exit(1)
    except RuntimeError as error:
        sentence = distributed.explain_lost_peer(error)
        if os.environ.get("CROSSMAE_TRACEBACK") or sentence is None:
            raise
        logger.error("Error: %s", sentence)
        sys.exit(1)
    finally:
        signals.kill_workers()
        free_frames(sys.exc_info()[1])
        distributed.close()
        signals.unwatch()  # last: the other ranks' signals may come while this one ends


def free_frames(error: BaseException | None) -> None:
    """Let go of what the frames of an error hold, the model in DDP among it.

    Left to the end of the interpreter, the threads of its process group were seen to hang there
    (PyTorch 2.11, one exit in five).
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    gc.collect()
