"""A run: its model, optimizer and position, saved when that is due, and restored.

A run that is killed and resumed takes the same steps as one that never stopped: bit for bit on a
CPU, up to the order of the GPU's own sums on a GPU.
"""

import logging
import time
from pathlib import Path

import numpy as np
import torch

from util.checkpoint import load_model, save_model
from util.distributed import all_gather_objects, all_reduce_max, is_main_process
from util.io.errors import UserError
from util.rng import get_random_state
from util.run import signals
from util.run.ema import restore_ema
from util.run.output_dir import remove_old_checkpoints
from util.run.position import Position
from util.run.setup import writing

logger = logging.getLogger(__name__)


class RunState(Position):
    """Model, optimizer and position of a run; saves and stops where that is due."""

    def __init__(self, args, model_without_ddp, optimizer, loss_scaler, ema=None):
        """
        Args:
            ema: timm's ModelEmaV3 of the model, updated after every optimizer step, or None.
        """
        super().__init__(args)
        self.model = model_without_ddp
        self.optimizer = optimizer
        self.loss_scaler = loss_scaler
        self.ema = ema
        self.is_first_epoch = True  # of this process
        self.last_save = time.monotonic()
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
            extra = {
                "state": self.content(random_states),
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
