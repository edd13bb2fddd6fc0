"""Batches: the order of an epoch, its share for each process, and the way to the device.

The order of epoch e depends on the seed and e alone, in every way of starting.

Letters: B images, C channels, H height, W width.
"""

import logging
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from util.data.image_io import normalize
from util.distributed import get_rank, get_world_size
from util.io.errors import UserError
from util.run.signals import ignore_signals_in_worker

logger = logging.getLogger(__name__)

SHOWN_PATHS = 5  # of pictures that --skip_bad_images passed over


class TrainBatches(Sampler):
    """Batches of (epoch, picture number) for one process; every epoch in another order.

    All processes get equally many batches; what is left over by processes and batch size is
    dropped, and is another handful in every epoch.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int):
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.rank, self.world_size = get_rank(), get_world_size()
        self.epoch = 0
        self.first = 0

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Choose the epoch, and the batch of it to begin with."""
        self.epoch = epoch
        self.first = first

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return self.num_images // self.world_size // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_images, generator=generator)[self.rank :: self.world_size]
        for batch in range(self.first, len(self)):
            numbers = order[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()
            yield [(self.epoch, number) for number in numbers]


class EvalBatches(Sampler):
    """Every picture once, in order; with several parts, each its own share and no picture twice."""

    def __init__(self, num_images: int, batch_size: int, part: int = 0, num_parts: int = 1):
        self.numbers = range(part, num_images, num_parts)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.numbers) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, len(self.numbers), self.batch_size):
            yield [(0, number) for number in self.numbers[start : start + self.batch_size]]


class DeviceLoader:
    """Batches (imgs, labels) on the device; uint8 pictures are normalised there."""

    def __init__(self, loader: DataLoader, device: torch.device, mean, std):
        self.loader = loader
        self.device = device
        self.mean, self.std = (
            torch.tensor(x, device=device).view(1, -1, 1, 1) for x in (mean, std)
        )

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def dataset(self) -> Dataset:
        return self.loader.dataset

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Choose the epoch, and the batch of it to begin with."""
        self.loader.batch_sampler.set_epoch(epoch, first)

    def prepare(self, imgs: Tensor) -> Tensor:
        """Pictures of the data set (B, C, H, W) as the model takes them, on the device."""
        imgs = imgs.to(self.device, non_blocking=True)
        return normalize(imgs, self.mean, self.std) if imgs.dtype == torch.uint8 else imgs

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        replaced = []
        self.num_replaced = 0  # unreadable pictures of this epoch so far
        for imgs, labels, *more in self.loader:
            replaced += [number for numbers in more for number in numbers.tolist() if number >= 0]
            self.num_replaced = len(replaced)
            yield self.prepare(imgs), labels.to(self.device, non_blocking=True)
        if replaced:
            self.report_replaced(replaced)

    def report_replaced(self, numbers: list[int]) -> None:
        """Warn at the end of an epoch about the pictures that --skip_bad_images passed over."""
        paths = [str(self.dataset.samples[number][0]) for number in numbers[:SHOWN_PATHS]]
        more = f" and {len(numbers) - SHOWN_PATHS} more" if len(numbers) > SHOWN_PATHS else ""
        where = f" (process {get_rank()})" if get_world_size() > 1 else ""
        logger.warning(
            "Epoch: [%d]%s replaced %d unreadable images by others: %s%s",
            *(self.loader.batch_sampler.epoch, where, len(numbers), ", ".join(paths), more),
        )


def build_loader(dataset: Dataset, batches: Sampler, args) -> DeviceLoader:
    """Loader over the given batches; its processes live as long as the run."""
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and args.device.type == "cuda",
        persistent_workers=args.num_workers > 0,
        prefetch_factor=args.prefetch if args.num_workers > 0 else None,
        worker_init_fn=ignore_signals_in_worker,
        generator=torch.Generator(),  # of its own: the model's random numbers stay the model's
    )
    return DeviceLoader(loader, args.device, args.mean, args.std)


def build_train_loader(dataset: Dataset, args) -> DeviceLoader:
    """Loader of shuffled batches.

    Raises:
        UserError: there are fewer pictures than one update takes.
    """
    batches = TrainBatches(len(dataset), args.batch_size, args.seed)
    if len(batches) < args.accum_iter:
        remedy = "lower --batch_size" if args.accum_iter == 1 else "lower one of them"
        if args.batch_size == args.accum_iter == 1:
            remedy = "start fewer processes"
        raise UserError(
            f"{len(dataset)} training images give {len(batches)} batches per epoch (--batch_size "
            f"{args.batch_size} on each of {batches.world_size} ranks), fewer than --accum_iter "
            f"{args.accum_iter}, so the weights would never change; {remedy}."
        )
    return build_loader(dataset, batches, args)


def build_eval_loader(dataset: Dataset, args, split: bool) -> DeviceLoader:
    """Loader of every picture once, or with `split` of this process's share."""
    share = (get_rank(), get_world_size()) if split else (0, 1)
    return build_loader(dataset, EvalBatches(len(dataset), args.batch_size, *share), args)
