"""Running a trained model over pictures: flags, files, batches, features. For scripts and tools.

Letters: B images, C channels, H height, W width, D encoder width, L patches.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from util.data.image_io import find_images, open_image
from util.data.loaders import DeviceLoader, build_eval_loader
from util.data.transforms import build_transform
from util.datasets import ImageDataset, Reader, read_list
from util.distributed import choose_device, is_main_process
from util.io.errors import UserError
from util.optim import AMP_TYPES, autocast, choose_amp_dtype

DEFAULT_WORKERS = min(8, os.cpu_count() or 1)
FEATURES = ("cls", "mean", "patches")


def add_evaluation_flags(parser, batch_size: int = 64) -> None:
    """Flags of a tool that runs a checkpoint over pictures."""
    parser.add_argument(
        "--checkpoint", required=True, help="of main_pretrain.py or main_finetune.py: file or URL"
    )
    parser.add_argument(
        "--model", help="name of the model, needed only where the checkpoint does not say it"
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        default=batch_size,
        help="images per forward pass (default: %(default)s)",
    )
    parser.add_argument(
        "--num_workers",
        type=int,
        default=DEFAULT_WORKERS,
        help="loader processes (default: %(default)s here)",
    )
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument(
        "--amp",
        choices=["auto", *AMP_TYPES],
        default="off",
        help="autocast type; off is float32, the same numbers on every machine (default: off)",
    )


def set_evaluation(args, flags) -> None:
    """Put into the arguments of a checkpoint how this tool runs; what the pictures are stays.

    Raises:
        UserError: a flag is out of its range, or there is no such device.
    """
    if flags.batch_size < 1:
        raise UserError(f"--batch_size is {flags.batch_size}; it must be at least 1.")
    if flags.num_workers < 0:
        raise UserError(f"--num_workers is {flags.num_workers}; it must not be negative.")
    args.device = choose_device(flags.device, local_rank=0)
    args.batch_size, args.num_workers = flags.batch_size, flags.num_workers
    args.amp, args.pin_mem, args.prefetch, args.seed = flags.amp, True, 2, 0


def describe_transform(args) -> str:
    """The evaluation transform in words."""
    chain = build_transform(False, args).transforms
    resize, crop = chain[0], chain[1]
    side = getattr(resize, "size", None)
    resize_text = f"short side {side}" if side else f"cover {resize.height} x {resize.width}"
    mean, std = (" ".join(f"{x:.3g}" for x in values) for values in (args.mean, args.std))
    return (
        f"evaluation transform: {resize_text}, centre crop {crop.size[0]} x {crop.size[1]}, "
        f"mean {mean}, std {std}; no augmentation"
    )


def list_images(sources: Iterable[str]) -> list[str]:
    """Picture files: those named, those in the lists (.txt) named, and all below the folders named,
    in a fixed order.

    Raises:
        UserError: something named is not there, or a folder holds no picture.
    """
    files = []
    for source in sources:
        if os.path.isdir(source):
            found = list(find_images(source))
            if not found:
                raise UserError(f"There is no picture in {source}; name another folder.")
            files += found
        elif os.path.exists(source) and str(source).endswith(".txt"):
            files += [path for path, _ in read_list(Path(source))]
        elif os.path.exists(source):
            files.append(str(source))
        else:
            raise UserError(f"There is no file or folder {source}; check the path.")
    return files


def build_files_loader(samples, classes: list[str], args) -> DeviceLoader:
    """Loader of (path, class number) pictures in order, prepared as in evaluation."""
    reader = Reader(open_image, args.in_chans)
    dataset = ImageDataset(samples, classes, build_transform(False, args), reader)
    return build_eval_loader(dataset, args, split=False)


@torch.inference_mode()
def run_batches(
    function: Callable[[Tensor], Tensor], loader, device, amp: str = "off", title: str = ""
) -> Iterator[tuple[Tensor, Tensor]]:
    """function(imgs) in float32 and labels (B,), batch by batch, on the device.

    Shows a bar on a terminal and nothing in a pipe.
    """
    amp_dtype = choose_amp_dtype(amp, device)
    hidden = None if is_main_process() else True  # None: hidden unless on a terminal
    for imgs, labels in tqdm(loader, desc=title, unit="batch", disable=hidden):
        with autocast(device, amp_dtype):
            outputs = function(imgs.to(device, non_blocking=True))
        yield outputs.float(), labels.to(device, non_blocking=True)


def run_features(
    model: nn.Module, loader, which: str, device, amp: str = "off", title: str = ""
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features of whole pictures and labels (B,), batch by batch.

    Args:
        which: "cls" or "mean" (B, D), or "patches" (B, L, D) in raster order.
    """
    model.eval()
    return run_batches(
        lambda imgs: getattr(model.forward_features(imgs), which), loader, device, amp, title
    )


def default_feature(model: nn.Module) -> str:
    """What the model's own head reads; of a pre-training model the class token."""
    return "mean" if getattr(model, "global_pool", False) else "cls"
