"""Running a trained model over images: flags, batches, features.

Shapes: B images, C channels, H height, W width, D encoder width, L patches.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from util.build import load_trained
from util.data.image_io import open_image
from util.data.loaders import DeviceLoader, build_eval_loader
from util.data.transforms import build_transform
from util.datasets import ImageDataset
from util.distributed import choose_device, is_main_process
from util.optim import AMP_TYPES, autocast, choose_amp_dtype
from util.run.checks import check_ranges
from util.run.flags import add_flag

DEFAULT_WORKERS = min(8, os.cpu_count() or 1)
FEATURES = ("cls", "mean", "patches")


def add_inference_flags(parser, batch_size: int = 64) -> None:
    """Flags of a tool that takes features of images from a checkpoint."""
    flag = partial(add_flag, parser)
    text = (
        "class token, mean of the patches, or all patches (default: what the model's head reads; "
        "of a pre-training checkpoint cls)"
    )
    flag("--which", str, None, text, choices=FEATURES)
    text = "of main_pretrain.py or main_finetune.py: file or URL"
    flag("--checkpoint", str, None, text, required=True)
    flag("--model", str, None, "name of the model, needed only if the checkpoint does not hold it")
    flag("--model_ema", bool, False, "use the average that main_finetune.py --model_ema kept")
    flag("--batch_size", int, batch_size, "images per forward pass")
    flag("--num_workers", int, DEFAULT_WORKERS, "DataLoader workers (default: %(default)s here)")
    flag("--device", str, None, "cuda or cpu (default: cuda if available)")
    text = "autocast dtype; off is float32 without TF32, for reproducible outputs"
    flag("--amp", str, "off", text, choices=["auto", *AMP_TYPES])


def set_inference_flags(args, flags) -> None:
    """Set how a tool runs in the arguments of a checkpoint, whose image settings stay.

    Raises:
        UserError: a flag is out of range, or the device does not exist.
    """
    check_ranges(flags, dict(batch_size="[1, inf)", num_workers="[0, inf)"))
    args.device = choose_device(flags.device, local_rank=0)
    args.batch_size, args.num_workers = flags.batch_size, flags.num_workers
    args.amp_dtype = choose_amp_dtype(flags.amp, args.device)
    if args.amp_dtype is None:
        torch.backends.cudnn.allow_tf32 = False
    args.pin_mem, args.prefetch, args.seed = True, 2, 0


def load_for_inference(flags) -> tuple[nn.Module, argparse.Namespace, str]:
    """(model on its device, its arguments, the feature to take) for add_inference_flags.

    Raises:
        UserError: the checkpoint cannot be used, or a flag is out of range.
    """
    model, args = load_trained(flags.checkpoint, model=flags.model, model_ema=flags.model_ema)
    set_inference_flags(args, flags)
    return model.to(args.device), args, flags.which or default_feature(model)


def describe_transform(args) -> str:
    """The evaluation transform in words."""
    resize, crop = build_transform(False, args).transforms[:2]
    side = getattr(resize, "size", None)
    resize_text = f"short side {side}" if side else f"cover {resize.height} x {resize.width}"
    mean, std = (" ".join(f"{x:.3g}" for x in values) for values in (args.mean, args.std))
    return (
        f"evaluation transform: {resize_text}, center crop {crop.size[0]} x {crop.size[1]}, "
        f"mean {mean}, std {std}; no augmentation"
    )


def build_inference_loader(samples, classes: list[str], args, split=False) -> DeviceLoader:
    """Loader of (path, class index) samples in order, with the evaluation transform; with `split`,
    of this rank's part of them.
    """
    read = partial(open_image, in_chans=args.in_chans)
    dataset = ImageDataset(samples, classes, build_transform(False, args), read)
    return build_eval_loader(dataset, args, split)


@torch.inference_mode()
def run_batches(
    function: Callable[[Tensor], Tensor], loader, device, amp_dtype=None, title: str = ""
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield function(imgs) as float32 and labels (B,) for a DeviceLoader's batches.

    amp_dtype is the autocast dtype, None for float32.

    Shows a progress bar, on a terminal only.
    """
    hidden = None if is_main_process() else True  # None: hidden unless on a terminal
    for imgs, labels in tqdm(loader, desc=title, unit="batch", disable=hidden):
        with autocast(device, amp_dtype):
            outputs = function(imgs)
        yield outputs.float(), labels


def run_features(
    model: nn.Module, loader, which: str, device, amp_dtype=None, title: str = ""
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features of unmasked images and labels (B,), batch by batch: "cls" or "mean" (B, D), or
    "patches" (B, L, D) in raster order.
    """
    model.eval()
    return run_batches(
        lambda imgs: getattr(model.forward_features(imgs), which), loader, device, amp_dtype, title
    )


def default_feature(model: nn.Module) -> str:
    """What the classifier's head reads; the class token of a pre-training model."""
    return "mean" if model.kind == "classifier" and model.global_pool else "cls"
