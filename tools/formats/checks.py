"""What the exporters share: the evaluation crop, class names, and the comparison of outputs."""

import logging
from pathlib import Path

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from util.data.transforms import CROP_RATIO
from util.io.errors import UserError

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5


def check_empty(folder: Path) -> None:
    """Raises UserError unless the folder is new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {folder} exists and is not an empty folder; name a new one.")


def label_names(trained) -> list[str]:
    """Class names, or neutral ones: transformers takes 1000 unnamed classes for ImageNet's."""
    return trained.class_names or [f"class {i}" for i in range(trained.nb_classes)]


def crop_ratio(trained) -> float:
    """Fraction of an image's sides that the evaluation transform keeps."""
    sides = to_2tuple(trained.input_size)
    if min(sides) <= 224 < max(sides):
        logger.warning(
            "Evaluation crops only the side of up to 224 pixels; the exported crop ratio holds for "
            "both sides and is set to 1, so other software keeps a little more of each image"
        )
    return CROP_RATIO if max(sides) <= 224 else 1.0


def example_images(model: nn.Module, count: int) -> Tensor:
    """Noise of the model's input size (count, C, H, W), the same in every call."""
    size = (count, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def check_close(found: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    """Compare outputs, relative to the largest expected value if that is above 1."""
    difference = (found - expected).abs().max().item()
    if not difference <= tolerance * max(1.0, expected.abs().max().item()):
        raise RuntimeError(f"Outputs of {name} differ from the model's by {difference:.2e}.")
    logger.info("Outputs of %s equal the model's: largest difference %.1e", name, difference)
