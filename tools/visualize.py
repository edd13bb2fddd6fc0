"""Draw what a pre-training checkpoint does, as a PNG, PDF or SVG file.

    python -m tools.visualize --checkpoint C.pth --images FILE_OR_FOLDER [more] --out grid.png
    python -m tools.visualize --checkpoint C.pth --compare D.pth [more] --images ... --out both.png
    python -m tools.visualize --checkpoint C.pth --images ... --attention --out attention.pdf
    python -m tools.visualize --checkpoint C.pth --weights --out weights.svg

The first draws reconstructions: original, masked, prediction, prediction with the visible patches.
The second puts the predictions of several models side by side, the third draws which patches a
predicted patch attends to, the fourth the weights of the encoder's feature maps. Sizes, mean and
std, norm_pix_loss and mask ratios come from the checkpoint.
"""

import argparse
import logging
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run by its path

from util.build import load_trained
from util.data.image_io import open_image
from util.data.sources import evenly_spaced, list_images
from util.data.transforms import build_transform
from util.distributed import choose_device
from util.io.errors import CheckpointError, UserError
from util.run.checks import check_ranges
from util.run.flags import FlagParser, add_flag
from util.run.launch import launch
from util.vis.attention_maps import draw_attention
from util.vis.comparison import draw_comparison
from util.vis.figures import check_format, save_figure
from util.vis.reconstruction import draw_feature_map_weights, draw_reconstructions

logger = logging.getLogger(__name__)

NUM_PATCHES = 3


def get_args_parser() -> FlagParser:
    parser = FlagParser("python -m tools.visualize", description=__doc__.splitlines()[0])
    flag = partial(add_flag, parser)
    text = "of main_pretrain.py: a file, https:// or hf:// URL"
    flag("--checkpoint", str, None, text, required=True)
    flag("--model", str, None, "name of the model, if the file does not hold it")
    flag("--images", str, None, "image files, or folders of them", nargs="+", metavar="PATH")
    flag("--out", str, None, "file to write: .png, .pdf or .svg", required=True)
    mode = partial(add_flag, parser.add_mutually_exclusive_group())
    text = "draw which patches a predicted patch attends to in each decoder block"
    mode("--attention", bool, False, text)
    text = "draw the learned weights of the encoder's feature maps; needs no --images"
    mode("--weights", bool, False, text)
    text = "further checkpoints: their predictions of all masked patches side by side"
    mode("--compare", str, None, text, nargs="+", metavar="C")
    flag("--num_images", int, 8, "images drawn at most, spread evenly over those of --images")
    text = "ratio of masked patches; several: a block of rows each (default: the checkpoint's)"
    flag("--mask_ratio", float, None, text, nargs="+", metavar="R")
    text = "CrossMAE: ratio of all patches that is predicted (default: the checkpoint's fraction "
    flag("--kept_mask_ratio", float, None, text + "of the masked ones)")
    text = f"with --attention: predicted patches per image (default: {NUM_PATCHES})"
    flag("--num_patches", int, None, text)
    flag("--seed", int, 0, "of the masks")
    flag("--device", str, None, "cuda or cpu (default: cuda if available)")
    flag("--caption", str, "", "first line of the text below the figure")
    return parser


def load_images(sources: list[str], count: int, args: argparse.Namespace) -> Tensor:
    """At most `count` images (B, C, H, W), evenly spaced, with the evaluation transform."""
    transform = build_transform(False, args)
    samples = evenly_spaced(list_images(*sources).samples, count)
    return torch.stack([transform(open_image(path, args.in_chans)) for path, _ in samples])


def check_args(args: argparse.Namespace) -> None:
    """Raises UserError for a flag that is out of range or would not act."""
    check_format(args.out)
    check_ranges(args, dict(num_images="[1, inf)", num_patches="[1, inf)", seed="[0, 4294967295]"))
    if args.weights:
        for name in ("images", "mask_ratio", "kept_mask_ratio"):
            if getattr(args, name):
                raise UserError(f"--weights needs no images and no masks: leave out --{name}.")
    elif not args.images:
        raise UserError("There is nothing to draw: name images or folders with --images.")
    if args.compare and (args.kept_mask_ratio or len(args.mask_ratio or []) > 1):
        raise UserError("--compare predicts all masked patches, for one --mask_ratio.")
    if args.num_patches is not None and not args.attention:
        raise UserError("--num_patches belongs to --attention: add it, or leave this out.")


def load_pretrained(checkpoint: str, name: str | None = None):
    """(model, its arguments); CheckpointError for a classifier.

    Args:
        name: of the model, if the file does not hold it.
    """
    model, trained = load_trained(checkpoint, model=name)
    if model.kind == "classifier":
        raise CheckpointError(
            f"{checkpoint} is a fine-tuned classifier, which predicts no pixels; give the "
            "checkpoint that main_pretrain.py wrote."
        )
    return model, trained


def main(args: argparse.Namespace) -> None:
    check_args(args)
    device = choose_device(args.device, 0)
    model, trained = load_pretrained(args.checkpoint, args.model)
    if args.weights:
        figure = draw_feature_map_weights(model, args.caption)
    else:
        imgs = load_images(args.images, args.num_images, trained).to(device)
        draw = draw_reconstructions
        if args.attention:
            draw = partial(draw_attention, num_patches=args.num_patches or NUM_PATCHES)
        options = args.mask_ratio, args.kept_mask_ratio, args.seed, args.caption
        if args.compare:
            models = [(model, trained), *(load_pretrained(c, args.model) for c in args.compare)]
            models = [(model.to(device), trained) for model, trained in models]
            (mask_ratio,) = args.mask_ratio or [None]
            figure = draw_comparison(models, imgs, mask_ratio, args.seed, args.caption)
        else:
            figure = draw(model.to(device), imgs, trained, *options)
    save_figure(figure, args.out)
    logger.info("Figure in %s", args.out)


if __name__ == "__main__":
    launch(main, get_args_parser().parse_args())
