"""What one epoch of training reports: losses that wait on the device, progress lines, TensorBoard.

A step never waits for the device: losses and gradient norms stay there and are fetched together
every few iterations. All processes fetch at the same iterations, so they also stop at the same one.
"""

import logging
import time

import torch
from torch import Tensor

from util.distributed import all_reduce_sum, get_world_size
from util.io.errors import NonFiniteLoss, UserError
from util.metrics import MetricLogger, SmoothedValue

logger = logging.getLogger(__name__)

PRINT_FREQ = 20  # iterations
DATA_SHARE_HINT = 0.3  # share of the time spent waiting for batches above which a hint is printed


class TrainLog:
    """Reports one epoch; the engine iterates through it and adds what each iteration gave."""

    def __init__(
        self, epoch: int, data_loader, loss_tag: str, writer, loss_scaler, args, state=None
    ):
        """
        Args:
            loss_tag: name of the loss in TensorBoard.
            writer: TensorBoard writer, or None.
            args: accum_iter; optional skip_nonfinite, skip_bad_images, num_workers, compile.
            state: a RunState, or None: start at the beginning, save nothing on the way.
        """
        self.epoch = epoch
        self.data_loader = data_loader
        self.loss_tag = loss_tag
        self.writer = writer
        self.loss_scaler = loss_scaler
        self.max_skipped = getattr(args, "skip_nonfinite", 0)
        self.num_workers = getattr(args, "num_workers", None)
        self.skips_bad_images = getattr(args, "skip_bad_images", False)
        self.compiles = getattr(args, "compile", False) and state is not None and state.is_first
        self.state = state
        self.skipped = 0
        self.in_bad_update = False  # an iteration of the update that is being added up was bad
        self.waiting: list[tuple[int, float, Tensor, Tensor | None]] = []
        self.metrics = MetricLogger()
        self.metrics.add_meter("lr", SmoothedValue(1, "{value:.6f}"))
        self.metrics.add_meter("loss", SmoothedValue())
        if state is not None:
            self.skipped = state.load_meters(self.metrics)

    def iterate(self):
        """Yield (iteration, batch) for what is left of the epoch, printing on the way."""
        first = self.state.iteration if self.state is not None else 0
        header = f"Epoch: [{self.epoch}]"
        batches = self.metrics.log_every(self.data_loader, PRINT_FREQ, header, first, self.read)
        for iteration, batch in batches:
            start = time.perf_counter()
            yield iteration, batch
            if self.compiles and iteration == first:
                seconds = time.perf_counter() - start
                logger.info("First step: %.1f s, most of it for --compile", seconds)

    def add(self, iteration: int, optimizer, loss: Tensor, grad_norm: Tensor | None) -> None:
        """Note one iteration; grad_norm is given where the weights were updated."""
        lr = max(group["lr"] for group in optimizer.param_groups)
        self.waiting.append((iteration, lr, loss.detach(), grad_norm))
        if loss.device.type == "cpu" or len(self.waiting) == PRINT_FREQ:  # on a CPU reading is free
            self.read()
        if self.state is not None and grad_norm is not None:
            self.state.after_update(iteration + 1, self)

    def read(self) -> None:
        """Fetch what waits; feed the meters and TensorBoard.

        Raises:
            NonFiniteLoss: on every process, if any of them had too many.
        """
        if not self.waiting:
            return
        losses = torch.stack([loss.float() for _, _, loss, _ in self.waiting])
        losses = (all_reduce_sum(losses) / get_world_size()).tolist()
        norms = fetch([norm for *_, norm in self.waiting])
        for (iteration, lr, _, _), loss, norm in zip(self.waiting, losses, norms, strict=True):
            has_norm = norm is not None and not self.is_bad(norm)
            bad_norm = norm is not None and not has_norm and not self.is_scaled
            is_bad = self.is_bad(loss) or bad_norm
            if is_bad and not self.in_bad_update:  # one update is one step, of many iterations
                self.skip(iteration, "Loss" if self.is_bad(loss) else "Gradient norm", loss, norm)
            self.in_bad_update = (is_bad or self.in_bad_update) and norm is None
            if is_bad:
                continue
            self.metrics.update(lr=lr, loss=loss)
            if has_norm:
                self.metrics.update(grad_norm=norm)
            if norm is not None:
                scalars = {self.loss_tag: loss, "lr": lr}
                self.write(iteration, scalars | ({"grad_norm": norm} if has_norm else {}))
        self.waiting.clear()

    @property
    def is_scaled(self) -> bool:
        """fp16 loss scaling is on, under which non-finite gradients are ordinary."""
        return self.loss_scaler.scaler.is_enabled()

    @staticmethod
    def is_bad(x: float) -> bool:
        return x - x != 0

    def skip(self, iteration: int, what: str, loss: float, norm: float | None) -> None:
        """Count a step that changed nothing, or stop."""
        value = loss if what == "Loss" else norm
        self.skipped += 1
        where = f"epoch {self.epoch}, iteration {iteration}"
        if self.skipped > self.max_skipped:
            saved = getattr(self.state, "last_saved", "")
            raise NonFiniteLoss(
                f"{what} is {value}, stopping training: {where}; "
                + (f"the last good checkpoint is {saved}." if saved else "nothing was saved yet.")
            )
        logger.warning(
            "%s is %s at %s: step skipped (%d of at most %d in this epoch)",
            *(what, value, where, self.skipped, self.max_skipped),
        )

    def write(self, iteration: int, scalars: dict[str, float]) -> None:
        """Scalars of one iteration; the axis is epoch x 1000, whatever the batch size."""
        if self.writer is not None:
            x = int((iteration / len(self.data_loader) + self.epoch) * 1000)
            try:
                for tag, value in scalars.items():
                    self.writer.add_scalar(tag, value, x)
            except OSError as error:  # its thread's, handed on
                raise UserError(
                    f"Cannot write TensorBoard's file in {self.writer.log_dir} "
                    f"({error.strerror}); the checkpoint before is as it was."
                ) from error

    def finish(self) -> dict[str, float]:
        """Read the rest, print the epoch's lines, return the mean of every meter."""
        self.read()
        metrics = self.metrics
        share, speed = metrics.data_share, metrics.images_per_second
        logger.info("Averaged stats: %s", metrics)
        logger.info(
            "Epoch: [%d] %.1f img/s, waited for data %.0f %% of the time",
            *(self.epoch, speed, 100 * share),
        )
        if share > DATA_SHARE_HINT and self.num_workers is not None:
            logger.info(
                "The model waits for images: raise --num_workers (now %d)", self.num_workers
            )
        scalars = {
            "img_per_s": speed,
            "data_wait": share,
            "loss_scale": self.loss_scaler.loss_scale,
        }
        last = len(self.data_loader) - 1  # the next step is where a resumed run takes back
        self.write(last, scalars)
        return metrics.averages() | self.count_replaced()

    def count_replaced(self) -> dict[str, int]:
        """Pictures that --skip_bad_images replaced in this epoch, on all processes together."""
        if not self.skips_bad_images:
            return {}
        count = torch.tensor(float(self.data_loader.num_replaced), device=self.data_loader.device)
        return {"replaced": int(all_reduce_sum(count))}


def fetch(values: list[Tensor | None]) -> list[float | None]:
    """The numbers behind the tensors, in one transfer."""
    present = [value for value in values if value is not None]
    numbers = iter(torch.stack(present).tolist() if present else [])
    return [None if value is None else next(numbers) for value in values]
