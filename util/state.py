"""Where a run is: everything besides the weights that decides its next step, saved and restored."""

import logging
import random

import numpy as np
import torch
import torch.distributed as dist

from util.checkpoint import load_model, save_model
from util.distributed import get_rank, get_world_size, is_distributed, is_main_process

logger = logging.getLogger(__name__)


class RunState:
    """Position, best result and random numbers of a run, and when they are written to disk."""

    def __init__(self, args, model_without_ddp, optimizer, loss_scaler, class_names=()):
        self.args = args
        self.model = model_without_ddp
        self.optimizer = optimizer
        self.loss_scaler = loss_scaler
        self.class_names = list(class_names)
        self.epoch = args.start_epoch
        self.iteration = 0  # next one inside the epoch
        self.meters: dict[str, list[float]] = {}  # of the epoch so far: [total, count]
        self.best = None  # best acc1 so far

    def resume(self) -> None:
        """Load args.resume and take its place; later epochs then equal those of a run never
        stopped.
        """
        checkpoint = load_model(self.args, self.model, self.optimizer, self.loss_scaler)
        self.epoch = self.args.start_epoch
        state = checkpoint.get("state")
        if state is None:
            logger.info("The file holds no random states: the run goes on with fresh ones.")
            return
        self.best = state["best"]
        self.iteration, self.meters = state["iteration"], state["meters"]
        if len(state["random"]) == get_world_size():
            set_random_state(state["random"][get_rank()])

    def load_meters(self, metrics) -> int:
        """Give the meters what the epoch had so far; returns how many steps were skipped in it."""
        for name, (total, count) in self.meters.items():
            if name in metrics.meters and count:
                metrics.meters[name].total, metrics.meters[name].count = total, count
        return int(self.meters.get("skipped", [0])[0])

    def after_update(self, iteration: int, log) -> None:
        """Called after each update of the weights, `iteration` being the next one."""

    def end_epoch(self, epoch: int, acc1: float | None = None) -> None:
        """Write what is due at the end of an epoch.

        Args:
            acc1: accuracy of fine-tuning after this epoch; a best one is kept in a file of its own.
        """
        self.epoch, self.iteration, self.meters = epoch + 1, 0, {}
        args = self.args
        is_best = acc1 is not None and (self.best is None or acc1 >= self.best)
        if is_best:
            self.best = acc1
        if not args.output_dir:
            return
        is_last = epoch + 1 == args.epochs
        keeps = args.keep_every > 0 and acc1 is None and epoch % args.keep_every == 0
        if keeps or is_best or is_last or epoch % args.save_every == 0:
            link = (
                f"checkpoint-{epoch}.pth" if keeps else "checkpoint-best.pth" if is_best else None
            )
            self.save(link)

    def save(self, link: str | None = None) -> None:
        """Write checkpoint.pth on rank 0, with the random states of all ranks."""
        states = [get_random_state()]
        if is_distributed():
            states = [None] * get_world_size()
            dist.all_gather_object(states, get_random_state())
        if not is_main_process():
            return
        extra = {
            "state": {
                "iteration": self.iteration,
                "meters": self.meters,
                "best": self.best,
                "random": states,
            },
            "class_names": self.class_names,
            "versions": {"torch": str(torch.__version__), "numpy": np.__version__},
        }
        save_model(
            self.args,
            self.epoch - 1,
            self.model,
            self.optimizer,
            self.loss_scaler,
            extra,
            link=link,
        )


def get_random_state() -> dict:
    """States of python's, numpy's and torch's generators as tensors and plain values."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, torch.tensor(numbers), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict) -> None:
    """Restore what get_random_state gave."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
