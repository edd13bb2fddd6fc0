"""Draw what a pre-training checkpoint does, as a PNG file.

    python -m tools.visualize --checkpoint C.pth --images FILE_OR_FOLDER [more] --out grid.png
    python -m tools.visualize --checkpoint C.pth --images ... --attention --out attention.png
    python -m tools.visualize --checkpoint C.pth --weights --out weights.png

The first draws reconstructions: original, masked, predicted, predicted pasted into the visible
patches. The second draws which patches a predicted patch reads, the third the weights of the
encoder's feature maps. Size, patch, channels, mean and deviation, norm_pix_loss and mask ratios
come from the checkpoint.
"""

import argparse
import logging
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from util.build import load_trained
from util.data.image_io import open_image
from util.data.sources import find_images
from util.data.transforms import build_transform
from util.distributed import choose_device
from util.io.errors import CheckpointError, UserError
from util.run import launch as run
from util.vis import attention_maps as decoder_attention
from util.vis import reconstruction as views
from util.vis.figures import check_png, save_png

logger = logging.getLogger(__name__)

NUM_PATCHES = 3


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.visualize", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="of main_pretrain.py: a file, https or hf:// address",
    )
    parser.add_argument("--model", help="name of the model, where the file does not say it")
    parser.add_argument(
        "--images", nargs="+", default=[], metavar="PATH", help="pictures, or folders of them"
    )
    parser.add_argument("--out", required=True, help="PNG file to write")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--attention",
        action="store_true",
        help="draw which patches a predicted patch reads in each decoder block",
    )
    mode.add_argument(
        "--weights",
        action="store_true",
        help="draw the learned weights of the encoder's feature maps; needs no --images",
    )
    parser.add_argument(
        "--num_images",
        type=int,
        default=8,
        help="at most so many, spread evenly over what --images finds (default: 8)",
    )
    parser.add_argument(
        "--mask_ratio",
        type=float,
        nargs="+",
        metavar="R",
        help="share of patches hidden; several: a block of rows each (default: the checkpoint's)",
    )
    parser.add_argument(
        "--kept_mask_ratio",
        type=float,
        help="CrossMAE: share of all patches that is predicted (default: the checkpoint's share of "
        "the hidden ones)",
    )
    parser.add_argument(
        "--num_patches",
        type=int,
        help=f"with --attention: predicted patches per picture (default: {NUM_PATCHES})",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the masks (default: 0)")
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    return parser


def load_pretrained(source: str, **changes) -> tuple[nn.Module, argparse.Namespace]:
    """Model of a pre-training checkpoint, and the arguments it was made with.

    Raises:
        CheckpointError: the file cannot be read or has no decoder.
    """
    model, args = load_trained(source, **changes)
    if not hasattr(model, "decoder_pred"):
        raise CheckpointError(
            f"{source} is a fine-tuned classifier, which predicts no pixels; give the checkpoint "
            "that main_pretrain.py wrote."
        )
    return model, args


def choose_images(sources: list[str], number: int) -> list[str]:
    """At most `number` files, evenly spread over the given files and those in the given folders.

    Raises:
        UserError: a source does not exist, or there is no picture at all.
        UserError: there is no source, or the number is not positive.
    """
    if not sources:
        raise UserError("There is nothing to draw: name pictures or folders with --images.")
    if number < 1:
        raise UserError(f"--num_images is {number}; it must be at least 1.")
    paths = []
    for source in sources:
        if not Path(source).exists():
            raise UserError(f"There is no file or folder {source}; check --images.")
        paths += find_images(source) if Path(source).is_dir() else [source]
    if not paths:
        raise UserError(f"There is no picture in {', '.join(sources)}; check --images.")
    number = min(number, len(paths))
    return [paths[i * len(paths) // number] for i in range(number)]


def load_images(paths: list[str], args: argparse.Namespace) -> Tensor:
    """Pictures as evaluation sees them, resized, cropped, normalised: (B, C, H, W)."""
    transform = build_transform(False, args)
    return torch.stack([transform(open_image(path, args.in_chans)) for path in paths])


def check_args(args: argparse.Namespace) -> None:
    """Refuse flags that would not act.

    Raises:
        UserError: with the flag and the remedy.
    """
    check_png(args.out)
    if args.weights:
        for name in ("images", "mask_ratio", "kept_mask_ratio"):
            if getattr(args, name):
                raise UserError(f"--weights needs no pictures and no masks: leave out --{name}.")
    if args.num_patches is not None and not args.attention:
        raise UserError("--num_patches belongs to --attention: add it, or leave this out.")
    if args.num_patches is not None and args.num_patches < 1:
        raise UserError(f"--num_patches is {args.num_patches}; it must be at least 1.")


def main(args: argparse.Namespace) -> None:
    check_args(args)
    device = choose_device(args.device, 0)
    model, trained = load_pretrained(args.checkpoint, model=args.model)
    title = f"{trained.model}, {args.checkpoint}"
    if args.weights:
        picture = views.feature_map_weights(model, title)
    else:
        paths = choose_images(args.images, args.num_images)
        imgs = load_images(paths, trained).to(device)
        draw = views.reconstruction_grid
        if args.attention:
            draw = partial(
                decoder_attention.attention_grid, num_patches=args.num_patches or NUM_PATCHES
            )
        picture = draw(
            model.to(device),
            imgs,
            trained,
            args.mask_ratio,
            args.kept_mask_ratio,
            args.seed,
            title,
        )
    save_png(picture, args.out)
    logger.info("%s: %d x %d pixels", args.out, picture.shape[2], picture.shape[1])


if __name__ == "__main__":
    run.run(main, get_args_parser().parse_args())
