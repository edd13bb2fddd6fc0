"""Meters and the progress line.

Lines keep the format that users of the MAE family search their logs for; we only add to it.
"""

import datetime
import logging
import resource
import statistics
import time
from collections import deque

import torch

from util.distributed import get_world_size

logger = logging.getLogger(__name__)

LATE_METERS = ("grad_norm",)  # come after the parts of a line that searches expect


class SmoothedValue:
    """Recent values of a series, and the mean of the whole series."""

    def __init__(self, window_size: int = 20, fmt: str = "{median:.4f} ({global_avg:.4f})"):
        self.recent = deque(maxlen=window_size)
        self.total = 0.0
        self.count = 0
        self.fmt = fmt

    def update(self, value: float, n: int = 1) -> None:
        """Add a value that stands for n samples."""
        self.recent.append(value)
        self.total += value * n
        self.count += n

    @property
    def median(self) -> float:
        return statistics.median_low(self.recent)

    @property
    def avg(self) -> float:
        return sum(self.recent) / len(self.recent)

    @property
    def global_avg(self) -> float:
        return self.total / self.count

    @property
    def value(self) -> float:
        return self.recent[-1]

    def __str__(self) -> str:
        if not self.recent:
            return "-"
        return self.fmt.format(
            median=self.median, avg=self.avg, global_avg=self.global_avg, value=self.value
        )


class MetricLogger:
    """Meters by name, and a loop over batches that prints them."""

    def __init__(self, delimiter: str = "  "):
        self.meters: dict[str, SmoothedValue] = {}
        self.delimiter = delimiter

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        """Add a meter with a format of its own."""
        self.meters[name] = meter

    def update(self, **values: float) -> None:
        """Add one value to each named meter."""
        for name, value in values.items():
            self.meters.setdefault(name, SmoothedValue()).update(float(value))

    def restore(self, name: str, total: float, count: int) -> None:
        """Start a meter from the sum and count of an interrupted epoch."""
        meter = self.meters.setdefault(name, SmoothedValue())
        meter.total, meter.count = total, count

    def averages(self) -> dict[str, float]:
        """Mean of every meter that has a value."""
        return {name: meter.global_avg for name, meter in self.meters.items() if meter.count}

    def __str__(self) -> str:
        return self.join(self.meters)

    def join(self, names) -> str:
        """The named meters as text."""
        return self.delimiter.join(f"{name}: {self.meters[name]}" for name in names)

    def log_every(self, batches, print_freq: int, header: str, first: int = 0, before_print=None):
        """Yield (iteration, batch); print a line every print_freq iterations and after the last.

        Args:
            batches: its length is that of the whole epoch; yields the rest of it.
            first: index of the first iteration it yields.
            before_print: called before a line is logged, to read values from the device.
        """
        num_iterations = len(batches)
        width = len(str(num_iterations))
        step_time, data_time = SmoothedValue(), SmoothedValue()
        images = 0
        start = end = time.perf_counter()
        for i, batch in enumerate(batches, first):
            data_time.update(time.perf_counter() - end)
            yield i, batch
            images += len(batch[0])
            is_last = i == num_iterations - 1
            if i % print_freq == 0 or is_last:
                if before_print:
                    before_print()
            step_time.update(time.perf_counter() - end)
            if i % print_freq == 0 or is_last:
                eta = datetime.timedelta(
                    seconds=int(step_time.global_avg * (num_iterations - 1 - i))
                )
                speed = get_world_size() * len(batch[0]) / step_time.avg
                parts = [
                    header,
                    f"[{i:{width}d}/{num_iterations}]",
                    f"eta: {eta}",
                    self.join(n for n in self.meters if n not in LATE_METERS),
                    f"time: {step_time.avg:.4f}",
                    f"data: {data_time.avg:.4f}",
                    f"max mem: {peak_memory_mib():.0f} MiB",
                    f"img/s: {speed:.1f}",
                    f"wait: {100 * data_time.avg / step_time.avg:.0f}%",
                ]
                parts += [self.join([n]) for n in LATE_METERS if n in self.meters]
                logger.info(self.delimiter.join(parts))
            end = time.perf_counter()
        seconds = end - start
        self.images_per_second = get_world_size() * images / seconds if seconds else 0.0
        self.data_wait = data_time.total / seconds if seconds else 0.0
        logger.info(
            "%s Total time: %s (%.4f s / it)",
            header,
            datetime.timedelta(seconds=int(seconds)),
            seconds / max(num_iterations - first, 1),
        )


def peak_memory_mib() -> float:
    """Peak memory of this process in MiB: of the GPU where one is used, else resident."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
