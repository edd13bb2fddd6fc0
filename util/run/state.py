"""The state of a run besides its weights: saved, restored, and written when it is due.

A run that is killed and resumed takes the same steps as one that never stopped: bit for bit on a
CPU, up to the order of the GPU's own sums on a GPU.
"""

import logging
import time
from pathlib import Path

import numpy as np
import torch

from util.checkpoint import load_model, save_model
from util.distributed import (
    all_gather_objects,
    all_reduce_max,
    get_rank,
    is_main_process,
)
from util.io.errors import CheckpointError, UserError
from util.rng import get_random_state, set_random_state
from util.run import signals
from util.run.ema import restore_ema
from util.run.output_dir import remove_old_checkpoints
from util.run.setup import writing

logger = logging.getLogger(__name__)

ORDER_FLAGS = ("world_size", "batch_size", "accum_iter", "seed")  # decide the order of images
STATE_KEYS = {*ORDER_FLAGS, "iteration", "meters", "best", "random"}


class RunState:
    """Position, best result and random states of a run; saves and stops where that is due."""

    def __init__(self, args, model_without_ddp, optimizer, loss_scaler, ema=None):
        """
        Args:
            ema: timm's ModelEmaV3 of the model, updated after every optimizer step, or None.
        """
        self.args = args
        self.model = model_without_ddp
        self.optimizer = optimizer
        self.loss_scaler = loss_scaler
        self.ema = ema
        self.class_names: list[str] = []
        self.num_images: int | None = None  # of the training data
        self.epoch = args.start_epoch
        self.iteration = 0  # the next one inside the epoch
        self.is_first_epoch = True  # of this process
        self.meters: dict[str, list[float]] = {}  # of the epoch so far: [total, count]
        self.best: float | None = None  # best validation accuracy so far, by --best_by
        self.last_save = time.monotonic()
        self.last_saved = ""  # file and position of this run's last checkpoint, for messages
        self.writer = None  # TensorBoard's, flushed before a save
        self.replay = None  # a StepWatch, for --replay

    def resume(self, checkpoint: dict | None = None) -> None:
        """Restore the run from args.resume, if it names a checkpoint.

        Args:
            checkpoint: content of that file, where resolve_resume has read it.

        Raises:
            CheckpointError: the file cannot be read, or belongs to another model.
        """
        if self.args.resume:
            checkpoint = load_model(
                self.args, self.model, self.optimizer, self.loss_scaler, checkpoint
            )
            self.epoch = self.args.start_epoch
            restore_ema(self.ema, self.model, checkpoint, self.args.resume)
            if "optimizer" in checkpoint:
                self.restore_position(checkpoint.get("state"))
            else:
                logger.warning(
                    "%s has no optimizer state: only its weights are used, from epoch %d on",
                    *(self.args.resume, self.epoch),
                )
            self.last_saved = self.describe(self.args.resume)
        self.check_agreement()

    def describe(self, path: str | Path) -> str:
        """A checkpoint of the current position, in words."""
        return f"{path} (resumes at epoch {self.epoch}, iteration {self.iteration})"

    def check_agreement(self) -> None:
        """Raises CheckpointError, on every rank, unless all ranks are at the same position."""
        position = [self.epoch, self.iteration]
        bounds = all_reduce_max(position + [-x for x in position], self.args.device)
        if bounds[:2] != [-x for x in bounds[2:]]:
            raise CheckpointError(
                f"The ranks found different checkpoints: rank {get_rank()} would resume from "
                f"{self.last_saved or 'none'}; --output_dir must be a folder that all hosts share."
            )

    def restore_position(self, state: dict | None) -> None:
        """Continue inside the epoch, if images come in the same order as in the saved run."""
        if not isinstance(state, dict) or not STATE_KEYS <= state.keys():
            logger.info("No position or random states in the file: resuming at the next epoch")
            return
        best_by = state.get("best_by", "acc1")
        if state["best"] is not None and best_by != self.args.best_by:
            raise UserError(
                f"--best_by is {self.args.best_by}, but {self.args.resume} keeps the best by "
                f"{best_by}; use that."
            )
        self.best = state["best"]
        self.num_images = state.get("num_images")
        changed = [
            f"{name} {state[name]} -> {getattr(self.args, name)}"
            for name in ORDER_FLAGS
            if state[name] != getattr(self.args, name)
        ]
        if not changed:
            self.iteration, self.meters = state["iteration"], state["meters"]
            if len(state["random"]) != self.args.world_size:
                raise CheckpointError(
                    f"{self.args.resume} is not a valid checkpoint: state.random has "
                    f"{len(state['random'])} entries for {self.args.world_size} ranks; use another "
                    "copy."
                )
            set_random_state(state["random"][get_rank()])
            where = f", iteration {self.iteration}" if self.iteration else ""
            logger.info("Resuming at epoch %d%s, exactly where it stopped", self.epoch, where)
        elif state["iteration"]:
            logger.warning(
                "%s: the interrupted epoch %d starts over with another order of images",
                *(", ".join(changed), self.epoch),
            )
        else:
            logger.warning("%s: the order of images changes from here on", ", ".join(changed))

    def register_dataset(self, dataset, num_iterations: int) -> None:
        """Note the training data; a position inside an epoch is dropped if the data changed.

        Args:
            num_iterations: of one epoch.

        Raises:
            CheckpointError: the position lies beyond the epoch's end.
        """
        self.class_names = dataset.classes
        if self.iteration and self.num_images not in (None, len(dataset)):
            logger.warning(
                "The data set has %d images and had %d: the interrupted epoch %d starts over",
                *(len(dataset), self.num_images, self.epoch),
            )
            self.iteration, self.meters = 0, {}
        if self.iteration > num_iterations:
            raise CheckpointError(
                f"{self.args.resume} is not a valid checkpoint: state.iteration is "
                f"{self.iteration}, an epoch has {num_iterations}; use another copy."
            )
        self.num_images = len(dataset)

    def restore_meters(self, metrics) -> int:
        """Fill the meters with the epoch so far; returns how many of its steps were skipped."""
        for name, (total, count) in self.meters.items():
            if name != "skipped":
                metrics.restore(name, total, count)
        return int(self.meters.get("skipped", [0, 0])[0])

    def after_step(self, iteration: int, log) -> None:
        """After an optimizer step: save inside the epoch if due, and stop if a signal came.

        Args:
            iteration: the next one of this epoch.
            log: the epoch's TrainLog.

        Raises:
            Interrupted: on every rank, after saving, when any rank got a stop signal.
        """
        args = self.args
        self.writer = log.writer
        if self.ema is not None:
            self.ema.update(self.model)
        is_due, is_stopping = log.take_requests()
        if not (is_due or is_stopping):
            return
        log.read()  # no step is saved whose loss was not checked
        self.iteration = iteration
        self.meters = {name: [m.total, m.count] for name, m in log.metrics.meters.items()}
        self.meters["skipped"] = [log.skipped, 1]
        if args.output_dir:
            self.save()
            logger.info("Saved at epoch %d, iteration %d", self.epoch, iteration)
        if is_stopping:
            self.stop()

    def requests(self) -> tuple[bool, bool]:
        """Whether this rank wants the run saved (--save_every_minutes), and stopped (signals)."""
        minutes = (time.monotonic() - self.last_save) / 60
        is_due = is_main_process() and 0 < self.args.save_every_minutes <= minutes
        return is_due, signals.stop_requested()

    def end_epoch(self, accuracy: float | None = None) -> None:
        """Advance to the next epoch, and write what is due.

        Args:
            accuracy: of the validation after this epoch of fine-tuning; checkpoint-best.pth holds
                the best.

        Raises:
            Interrupted: on every rank, after saving, when any rank got a stop signal.
        """
        args, epoch = self.args, self.epoch
        self.epoch, self.iteration, self.meters = epoch + 1, 0, {}
        self.is_first_epoch = False
        is_best = accuracy is not None and (self.best is None or accuracy >= self.best)
        if is_best:
            self.best = accuracy
        is_kept = args.keep_every > 0 and epoch % args.keep_every == 0
        is_last = self.epoch == args.epochs
        (is_stopping,) = all_reduce_max([signals.stop_requested()], args.device)
        is_due = is_kept or is_best or is_last or is_stopping or epoch % args.save_every == 0
        if args.output_dir and is_due:
            links = [f"checkpoint-{epoch}.pth"] * is_kept + ["checkpoint-best.pth"] * is_best
            self.save(links)
            if is_kept and is_main_process():
                remove_old_checkpoints(Path(args.output_dir), args.keep_last, epoch)
        if is_stopping and not is_last:
            self.stop()

    def stop(self) -> None:
        """Raises Interrupted, after logging how to resume."""
        if self.args.output_dir:
            logger.info("Stopped by a signal; --resume auto continues from here")
        else:
            logger.info("Stopped by a signal; without --output_dir nothing was saved")
        raise signals.Interrupted

    def save(self, links: list[str] = ()) -> None:
        """Write checkpoint.pth on rank 0, with the random states of all ranks.

        Args:
            links: further names for the same file.

        Raises:
            UserError: on every rank, if rank 0 could not write.
        """
        random_states = all_gather_objects(get_random_state(self.args.device))
        problem = None
        if is_main_process():
            state = {name: getattr(self.args, name) for name in ORDER_FLAGS}
            state |= {"iteration": self.iteration, "meters": self.meters, "best": self.best}
            state |= {"num_images": self.num_images, "random": random_states}
            state["best_by"] = getattr(self.args, "best_by", None)
            extra = {
                "state": state,
                "class_names": self.class_names,
                **({"model_ema": self.ema.module.state_dict()} if self.ema is not None else {}),
                "versions": {"torch": str(torch.__version__), "numpy": np.__version__},
            }
            parts = (self.model, self.optimizer, self.loss_scaler, extra)
            try:
                if self.writer is not None:  # so that a resumed curve has no gap
                    with writing(f"TensorBoard's file in {self.writer.log_dir}"):
                        self.writer.flush()
                save_model(self.args, self.epoch - 1, *parts, links=links)
            except UserError as error:
                problem = error
        (failed,) = all_reduce_max([problem is not None], self.args.device)
        if failed:
            raise problem or UserError("Rank 0 could not write the checkpoint; see its message.")
        self.last_save = time.monotonic()
        self.last_saved = self.describe(Path(self.args.output_dir, "checkpoint.pth"))
