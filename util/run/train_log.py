"""What one epoch of training logs: losses kept on the device, progress lines, TensorBoard.

A step never waits for the device: losses and gradient norms stay there and are read together every
few iterations. All ranks read at the same iterations, so they also stop at the same one.
"""

import contextlib
import gc
import logging
import math
import time

import torch
from torch import Tensor

from util.distributed import all_gather_objects, all_reduce_sum, get_world_size
from util.io.errors import NonFiniteLoss
from util.metrics import MetricLogger, SmoothedValue
from util.run.setup import append_json, writing

logger = logging.getLogger(__name__)

PRINT_FREQ = 20  # iterations
DATA_WAIT_HINT = 0.3  # fraction of the time spent waiting for data above which a hint is logged


class TrainLog:
    """Log of one epoch; the engine iterates through it and adds the result of each iteration."""

    def __init__(
        self, epoch: int, data_loader, loss_tag: str, writer, loss_scaler, args, state=None
    ):
        """
        Args:
            loss_tag: name of the loss in TensorBoard.
            writer: TensorBoard writer, or None.
            args: accum_iter; optional skip_nonfinite, skip_bad_images, num_workers, compile, seed,
                rank, output_dir.
            state: a RunState, or None to start at the beginning.
        """
        self.epoch = epoch
        self.data_loader = data_loader
        self.loss_tag = loss_tag
        self.writer = writer
        self.loss_scaler = loss_scaler
        self.args = args
        self.max_skipped = getattr(args, "skip_nonfinite", 0)
        self.num_workers = getattr(args, "num_workers", None)
        self.skips_bad_images = getattr(args, "skip_bad_images", False)
        self.first_iteration = state.iteration if state is not None else 0
        self.replay = state.replay if state is not None else None
        self.last_saved = state.last_saved if state is not None else ""
        is_first_epoch = state is not None and state.is_first_epoch
        self.times_first_step = getattr(args, "compile", False) and is_first_epoch
        self.state = state
        self.save_requested = self.stop_requested = False  # by any rank, at the last reads
        self.skipped = 0
        self.in_bad_step = False  # an iteration of the accumulated step was not finite
        self.unread: list[tuple[int, float, Tensor, Tensor | None]] = []
        self.metrics = MetricLogger()
        self.metrics.add_meter("lr", SmoothedValue(1, "{value:.6f}"))
        if state is not None:
            self.skipped = state.restore_meters(self.metrics)

    def iterate(self):
        """Yield (iteration, batch) for the rest of the epoch, and log progress lines."""
        first, header = self.first_iteration, f"Epoch: [{self.epoch}]"
        batches = self.metrics.log_every(self.data_loader, PRINT_FREQ, header, first, self.read)
        with collect_garbage_rarely() as collect:
            for iteration, batch in batches:
                start = time.perf_counter()
                if self.replay:
                    self.replay.before(self.epoch, iteration, batch[0])
                yield iteration, batch
                if self.times_first_step and iteration == first:
                    seconds = time.perf_counter() - start
                    logger.info("First step: %.1f s, most of it for --compile", seconds)
                if (iteration + 1) % PRINT_FREQ == 0:
                    collect()

    def add(self, iteration: int, optimizer, loss: Tensor, grad_norm: Tensor | None) -> None:
        """Note one iteration; grad_norm is given where the optimizer took a step."""
        if self.replay:
            self.replay.after(loss, is_step=grad_norm is not None)
        lr = max(group["lr"] for group in optimizer.param_groups)
        self.unread.append((iteration, lr, loss.detach(), grad_norm))
        if loss.device.type == "cpu" or len(self.unread) == PRINT_FREQ:  # on a CPU it costs nothing
            self.read()

    def read(self) -> None:
        """Read losses and norms from the device into the meters and TensorBoard.

        Raises:
            NonFiniteLoss: on every rank, if too many were not finite.
        """
        if not self.unread:
            return
        values = torch.stack([loss.float() for _, _, loss, _ in self.unread])
        if get_world_size() > 1:
            requests = self.state.requests() if self.state is not None else (False, False)
            own = torch.tensor(requests, dtype=torch.float32).to(values.device, non_blocking=True)
            values = all_reduce_sum(torch.cat([values, own])) / get_world_size()
            *losses, save, stop = values.tolist()
            self.save_requested |= save > 0
            self.stop_requested |= stop > 0
        else:
            losses = values.tolist()
        norms = to_floats([norm for *_, norm in self.unread])
        for (iteration, lr, own, _), loss, norm in zip(self.unread, losses, norms, strict=True):
            self.note_iteration(iteration, lr, loss, norm, own)
        self.unread.clear()

    def take_requests(self) -> tuple[bool, bool]:
        """Whether any rank asked to save, and to stop, at a read since the last call."""
        if get_world_size() == 1:
            return self.state.requests()
        requests = self.save_requested, self.stop_requested
        self.save_requested = self.stop_requested = False
        return requests

    def note_iteration(
        self, iteration: int, lr: float, loss: float, norm, own_loss: Tensor
    ) -> None:
        """Note one iteration: mean loss over the ranks, gradient norm or None, this rank's loss."""
        has_norm = norm is not None and math.isfinite(norm)
        # Under fp16 loss scaling, non-finite gradients are ordinary.
        bad_norm = norm is not None and not has_norm and not self.loss_scaler.scaler.is_enabled()
        is_bad = not math.isfinite(loss) or bad_norm
        if is_bad and not self.in_bad_step:  # one optimizer step counts once
            name, value = ("Gradient norm", norm) if math.isfinite(loss) else ("Loss", loss)
            remedy = self.record_nonfinite(iteration, name, value, own_loss)  # on every rank
            self.count_skipped(iteration, name, value, remedy)
        self.in_bad_step = (is_bad or self.in_bad_step) and norm is None
        if is_bad:
            return
        self.metrics.update(lr=lr, loss=loss)
        if has_norm:
            self.metrics.update(grad_norm=norm)
        if norm is not None:
            scalars = {self.loss_tag: loss, "lr": lr}
            self.write_scalars(iteration, scalars | ({"grad_norm": norm} if has_norm else {}))

    def record_nonfinite(self, iteration: int, name: str, value: float, own_loss: Tensor) -> str:
        """Write what --replay needs to nonfinite.jsonl; returns it in words."""
        losses = [float(x) for x in all_gather_objects(own_loss.item())]
        ranks = [rank for rank, x in enumerate(losses) if not math.isfinite(x)]
        seed = getattr(self.args, "seed", None)
        entry = {"epoch": self.epoch, "iteration": iteration, "seed": seed, "ranks": ranks}
        entry |= {"world_size": len(losses), "value": f"{name} {value}"}
        if getattr(self.args, "output_dir", ""):
            append_json(self.args, entry, "nonfinite.jsonl")
        of_ranks = f" of rank {', '.join(map(str, ranks))}" if ranks else ""
        return (
            f"The {name.lower()}{of_ranks} (seed {seed}) is not finite: "
            f"--replay {self.epoch} {iteration} names the module."
        )

    def count_skipped(self, iteration: int, name: str, value: float, remedy: str) -> None:
        """Count a step that changed nothing; raises NonFiniteLoss above the limit."""
        self.skipped += 1
        where = f"epoch {self.epoch}, iteration {iteration}"
        if self.skipped > self.max_skipped:
            saved = "nothing was saved yet"
            if self.last_saved:
                saved = f"the last checkpoint is {self.last_saved}"
            raise NonFiniteLoss(f"{name} is {value}, stopping training: {where}; {saved}. {remedy}")
        logger.warning(
            "%s is %s at %s: step skipped (%d of at most %d in this epoch). %s",
            *(name, value, where, self.skipped, self.max_skipped, remedy),
        )

    def write_scalars(self, iteration: int, scalars: dict[str, float]) -> None:
        """Scalars of one iteration; the axis is epoch x 1000 at every batch size.

        Raises:
            UserError: TensorBoard's file cannot be written.
        """
        if self.writer is not None:
            epoch_1000x = int((iteration / len(self.data_loader) + self.epoch) * 1000)
            with writing(f"TensorBoard's file in {self.writer.log_dir}"):
                for tag, value in scalars.items():
                    self.writer.add_scalar(tag, value, epoch_1000x)

    def finish(self) -> dict[str, float]:
        """Read the rest, log the epoch's lines, return the mean of every meter."""
        self.read()
        metrics = self.metrics
        data_wait, speed = metrics.data_wait, metrics.images_per_second
        logger.info("Averaged stats: %s", metrics)
        logger.info(
            "Epoch: [%d] %.1f img/s, waited for data %.0f %% of the time",
            *(self.epoch, speed, 100 * data_wait),
        )
        if data_wait > DATA_WAIT_HINT and self.num_workers is not None:
            logger.info("Training waits for images: raise --num_workers (now %d)", self.num_workers)
        scalars = {"img_per_s": speed, "data_wait": data_wait}
        if self.loss_scaler.scaler.is_enabled():
            scalars["loss_scale"] = self.loss_scaler.loss_scale
        last = len(self.data_loader) - 1  # the next step is what a resumed run purges
        self.write_scalars(last, scalars)
        return metrics.averages() | self.count_replaced()

    def count_replaced(self) -> dict[str, int]:
        """Images that --skip_bad_images replaced in this epoch, over all ranks."""
        if not self.skips_bad_images:
            return {}
        count = torch.tensor(float(self.data_loader.num_replaced), device=self.data_loader.device)
        return {"replaced": int(all_reduce_sum(count))}


@contextlib.contextmanager
def collect_garbage_rarely():
    """Yield a function that collects garbage; Python itself does not while the context lasts.

    It would do so at different steps on each rank, and all would wait for each of them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield gc.collect
    finally:
        if was_enabled:
            gc.enable()


def to_floats(values: list[Tensor | None]) -> list[float | None]:
    """The values of tensors, in one transfer; None stays None."""
    present = [value for value in values if value is not None]
    numbers = iter(torch.stack(present).tolist() if present else [])
    return [None if value is None else next(numbers) for value in values]
