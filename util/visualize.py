"""Draw what a pre-training checkpoint reconstructs.

    python -m util.visualize --checkpoint C.pth --images FILE_OR_FOLDER [more] --out grid.png

Size, patch, channels, mean and deviation, norm_pix_loss and mask ratios come from the checkpoint.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from util import run, views
from util.build import load_trained
from util.checkpoint import CheckpointError
from util.datasets import build_transform
from util.distributed import choose_device
from util.images import find_images, open_image
from util.pictures import save_png


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m util.visualize", description=__doc__)
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="file of main_pretrain.py, or its https or hf:// address",
    )
    parser.add_argument("--model", help="name of the model, where the file does not say it")
    parser.add_argument(
        "--images", nargs="+", default=[], metavar="PATH", help="pictures, or folders of them"
    )
    parser.add_argument("--out", required=True, help="PNG file to write")
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
        FileNotFoundError: a source does not exist, or there is no picture at all.
        ValueError: there is no source, or the number is not positive.
    """
    if not sources:
        raise ValueError("There is nothing to draw: name pictures or folders with --images.")
    if number < 1:
        raise ValueError(f"--num_images is {number}; it must be at least 1.")
    paths = []
    for source in sources:
        if not Path(source).exists():
            raise FileNotFoundError(f"There is no file or folder {source}; check --images.")
        paths += find_images(source) if Path(source).is_dir() else [source]
    if not paths:
        raise FileNotFoundError(f"There is no picture in {', '.join(sources)}; check --images.")
    number = min(number, len(paths))
    return [paths[i * len(paths) // number] for i in range(number)]


def load_images(paths: list[str], args: argparse.Namespace) -> Tensor:
    """Pictures as evaluation sees them, resized, cropped, normalised: (B, C, H, W)."""
    transform = build_transform(False, args)
    return torch.stack([transform(open_image(path, args.in_chans)) for path in paths])


def main(args: argparse.Namespace) -> None:
    model, trained = load_pretrained(args.checkpoint, model=args.model)
    device = choose_device(args.device, 0)
    imgs = load_images(choose_images(args.images, args.num_images), trained).to(device)
    picture = views.reconstruction_grid(
        model.to(device),
        imgs,
        trained,
        args.mask_ratio,
        args.kept_mask_ratio,
        args.seed,
        title=f"{trained.model}, {args.checkpoint}",
    )
    save_png(picture, args.out)
    print(f"{len(imgs)} pictures in {args.out}, {picture.shape[2]} x {picture.shape[1]} pixels")


if __name__ == "__main__":
    run.run(main, get_args_parser().parse_args())
