"""Batches: the order of an epoch, each rank's part of it, and the copy to the device.

The order of epoch e depends on the seed and e alone.

Shapes: B images, C channels, H height, W width.
"""

import atexit
import logging
import sys
import traceback
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info

from util.data.transforms import normalize
from util.distributed import get_rank, get_world_size
from util.io.errors import UserError, escape
from util.rng import mix_seeds
from util.run.signals import ignore_signals_in_worker, kill_workers

logger = logging.getLogger(__name__)

# Workers inherit the index of the images. Python 3.14's default would send it to new processes.
START_METHOD = "fork" if sys.platform == "linux" else None
SHOWN_PATHS = 5  # of images that --skip_bad_images replaced


class TrainBatchSampler(Sampler):
    """Batches of (epoch, image index) for one rank, shuffled in every epoch.

    All ranks get the same number of batches; the remainder by ranks and batch size is dropped, and
    differs in every epoch.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int):
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.rank, self.world_size = get_rank(), get_world_size()
        self.epoch = 0
        self.first_batch = 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch, and the batch of it to start with."""
        self.epoch = epoch
        self.first_batch = first_batch

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return self.num_images // self.world_size // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(mix_seeds(self.seed, self.epoch))
        order = torch.randperm(self.num_images, generator=generator)[self.rank :: self.world_size]
        for batch in range(self.first_batch, len(self)):
            indices = order[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()
            yield [(self.epoch, index) for index in indices]


class EvalBatchSampler(Sampler):
    """Batches of (0, image index) in order: every image once, or one rank's part of them."""

    def __init__(self, num_images: int, batch_size: int, rank: int = 0, world_size: int = 1):
        self.indices = range(rank, num_images, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[start : start + self.batch_size]]


class ReturnErrors(Dataset):
    """A dataset whose items are UserErrors where it raises them.

    DataLoader replaces an error raised in a worker by one that has the worker's traceback as its
    message; a returned one arrives unchanged.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, key):
        try:
            return self.dataset[key]
        except UserError as error:
            if get_worker_info() is not None:  # the traceback itself cannot leave the worker
                error.add_note(traceback.format_exc())
            return error


def collate_or_error(items: list):
    """The batch, or the first UserError among its items."""
    errors = [item for item in items if isinstance(item, UserError)]
    return errors[0] if errors else default_collate(items)


class DeviceLoader:
    """Batches (imgs, labels) on the device; uint8 images are normalized there.

    A UserError of the dataset is raised unchanged, also from a DataLoader worker.
    """

    def __init__(self, loader: DataLoader, device: torch.device, mean, std):
        self.loader = loader
        self.device = device
        # its own, so that a copy does not queue behind the steps that are still running
        self.copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.mean, self.std = (
            torch.tensor(x, device=device).view(1, -1, 1, 1) for x in (mean, std)
        )

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def dataset(self) -> Dataset:
        return self.loader.dataset.dataset

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch, and the batch of it to start with."""
        self.loader.batch_sampler.set_epoch(epoch, first_batch)

    def prepare(self, imgs: Tensor) -> Tensor:
        """Images of the dataset (B, C, H, W) as the model takes them, on the device."""
        imgs = self.copy(imgs)
        return normalize(imgs, self.mean, self.std) if imgs.dtype == torch.uint8 else imgs

    def copy(self, x: Tensor) -> Tensor:
        """x on the device, for the current stream."""
        if self.copy_stream is None:
            return x.to(self.device)
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.copy_stream):
            x = x.to(self.device, non_blocking=True)
        current.wait_stream(self.copy_stream)
        x.record_stream(current)  # its memory is not reused before the step has run
        return x

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        replaced = []
        self.num_replaced = 0  # unreadable images of this epoch so far
        for batch in self.loader:
            if isinstance(batch, UserError):
                raise batch
            imgs, labels, *more = batch
            replaced += [index for ids in more for index in ids.tolist() if index >= 0]
            self.num_replaced = len(replaced)
            yield self.prepare(imgs), self.copy(labels)
        if replaced:
            self.report_replaced(replaced)

    def report_replaced(self, indices: list[int]) -> None:
        """Warn at the end of an epoch about the images that --skip_bad_images replaced."""
        paths = [str(self.dataset.samples[index][0]) for index in indices[:SHOWN_PATHS]]
        more = f" and {len(indices) - SHOWN_PATHS} more" if len(indices) > SHOWN_PATHS else ""
        where = f" (rank {get_rank()})" if get_world_size() > 1 else ""
        logger.warning(
            "Epoch: [%d]%s replaced %d unreadable images by others: %s%s",
            *(self.loader.batch_sampler.epoch, where, len(indices), escape(", ".join(paths)), more),
        )


def build_loader(dataset: Dataset, batch_sampler: Sampler, args) -> DeviceLoader:
    """Loader of the given batches; its workers are persistent."""
    loader = DataLoader(
        ReturnErrors(dataset),
        batch_sampler=batch_sampler,
        collate_fn=collate_or_error,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and args.device.type == "cuda",
        persistent_workers=args.num_workers > 0,
        prefetch_factor=args.prefetch if args.num_workers > 0 else None,
        worker_init_fn=ignore_signals_in_worker,
        multiprocessing_context=START_METHOD if args.num_workers > 0 else None,
        generator=torch.Generator(),  # its own: the model's random numbers are not used
    )
    if args.num_workers > 0:  # they ignore SIGTERM, with which Python would end them at its exit
        atexit.register(kill_workers)
    return DeviceLoader(loader, args.device, args.mean, args.std)


def build_train_loader(dataset: Dataset, args) -> DeviceLoader:
    """Loader of shuffled batches; UserError if there are fewer images than a step takes."""
    sampler = TrainBatchSampler(len(dataset), args.batch_size, args.seed)
    if len(sampler) < args.accum_iter:
        remedy = "lower --batch_size" if args.accum_iter == 1 else "lower one of them"
        if args.batch_size == args.accum_iter == 1:
            remedy = "start fewer processes"
        raise UserError(
            f"{len(dataset)} training images give {len(sampler)} batches per epoch (--batch_size "
            f"{args.batch_size} on each of {sampler.world_size} ranks), fewer than --accum_iter "
            f"{args.accum_iter}, so the weights would never change; {remedy}."
        )
    return build_loader(dataset, sampler, args)


def build_eval_loader(dataset: Dataset, args, split: bool) -> DeviceLoader:
    """Loader of every image once, in order; with `split`, of this rank's part of them."""
    part = (get_rank(), get_world_size()) if split else (0, 1)
    return build_loader(dataset, EvalBatchSampler(len(dataset), args.batch_size, *part), args)
