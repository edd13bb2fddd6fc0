"""Drawing: pages of text, tiles and heat maps, made with Pillow and returned as uint8 tensors.

Knows nothing of models. Letters: B images, C channels, H height, W width, L patches.
"""

import textwrap
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

GREY = 128  # what is not shown
HATCH = (150, 205)  # the two greys of what is missing
INK = (20, 20, 20)
PAPER = (255, 255, 255)
RED = (230, 30, 30)
GAP = 8  # pixels between the parts of a page
TEXT_SIZE = 14
MIN_WIDTH = 420  # of a page, so that its text finds room
TILE_SIDE = 160  # small pictures are enlarged to about this

# Stops of the colour scales, evenly spaced: dark to bright, and blue over white to red.
HEAT = ((10, 8, 35), (85, 20, 110), (190, 55, 85), (245, 130, 30), (252, 250, 170))
SIGNED = ((25, 60, 150), (120, 165, 220), (250, 250, 250), (230, 140, 110), (150, 20, 35))


@cache
def font(size: int = TEXT_SIZE) -> ImageFont.FreeTypeFont:
    """The typeface that comes with Pillow."""
    return ImageFont.load_default(size)


def text_width(text: str, size: int = TEXT_SIZE) -> int:
    """Pixels that one line of text takes."""
    return int(font(size).getlength(text)) + 1


def line_height(size: int = TEXT_SIZE) -> int:
    return round(size * 1.35)


class Page:
    """A picture that grows downwards: lines of text, rows of tiles."""

    def __init__(self):
        self.parts: list[str | Image.Image] = []

    def add_text(self, text: str) -> None:
        """A paragraph; it is wrapped to the width of the page."""
        self.parts.append(text)

    def add_picture(self, picture: Image.Image) -> None:
        """A part of its own, at the left margin."""
        self.parts.append(picture)

    def add_tiles(self, tiles: Sequence[Tensor], labels: Sequence[str] = ()) -> None:
        """A row of tiles (3, H, W) of one size, each below its label."""
        height, width = tiles[0].shape[1:]
        column = max([width, *(text_width(label) for label in labels)]) + GAP
        top = line_height() if labels else 0
        row = Image.new("RGB", (column * len(tiles) - GAP, top + height), PAPER)
        draw = ImageDraw.Draw(row)
        for i, label in enumerate(labels):
            draw.text((i * column, 0), label, INK, font())
        for i, tile in enumerate(tiles):
            row.paste(to_pil_image(tile.cpu()), (i * column, top))
        self.parts.append(row)

    def draw(self) -> Tensor:
        """The page as uint8 (3, H, W)."""
        width = max([MIN_WIDTH, *(p.width for p in self.parts if isinstance(p, Image.Image))])
        parts = [draw_text(p, width) if isinstance(p, str) else p for p in self.parts]
        height = sum(part.height + GAP for part in parts) + GAP
        page = Image.new("RGB", (width + 2 * GAP, height), PAPER)
        top = GAP
        for part in parts:
            page.paste(part, (GAP, top))
            top += part.height + GAP
        return pil_to_tensor(page)


def draw_text(text: str, width: int) -> Image.Image:
    """Text as a picture of that width, in as many lines as it needs."""
    letters = max(1, int(width / text_width("abcdefghijklmnopqrstuvwxyz 0123456789") * 37))
    lines = textwrap.wrap(text, letters)
    picture = Image.new("RGB", (width, line_height() * len(lines)), PAPER)
    draw = ImageDraw.Draw(picture)
    for i, line in enumerate(lines):
        draw.text((0, i * line_height()), line, INK, font())
    return picture


def save_png(picture: Tensor, path) -> None:
    """Write uint8 (3, H, W) to a file, by the kind its name says."""
    to_pil_image(picture).save(path)


def to_rgb(imgs: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised pictures (B, C, H, W) in their true colours, uint8 (B, 3, H, W).

    1 or 2 channels: the first, as grey; more than 3: the first three.
    """
    shown = 3 if imgs.shape[1] >= 3 else 1
    mean, std = (
        torch.tensor(values[:shown], device=imgs.device).view(-1, 1, 1) for values in (mean, std)
    )
    pixels = (imgs[:, :shown].float() * std + mean).clamp(0, 1) * 255
    return pixels.round().to(torch.uint8).expand(-1, 3, -1, -1)


def enlarge(imgs: Tensor, factor: int) -> Tensor:
    """Every pixel of (..., H, W) as a square of factor x factor."""
    return imgs.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def enlargement(height: int, width: int) -> int:
    """The whole factor that makes a small picture visible; 1 for one that is large enough."""
    return max(1, round(TILE_SIDE / max(height, width)))


def patch_area(chosen: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Which pixels belong to the chosen patches: (B, L) -> bool (B, 1, H, W).

    Args:
        side: of a patch, in pixels of the result.
    """
    return enlarge(chosen.bool().unflatten(1, grid).unsqueeze(1), side)


def hatch(height: int, width: int, stripe: int) -> Tensor:
    """Diagonal grey stripes, `stripe` pixels wide: uint8 (height, width)."""
    diagonal = torch.arange(height).unsqueeze(1) + torch.arange(width)
    return torch.tensor(HATCH, dtype=torch.uint8)[diagonal // stripe % 2]


def colour(values: Tensor, stops: Sequence[tuple[int, int, int]] = HEAT) -> Tensor:
    """Numbers in 0..1 on a colour scale: (H, W) -> uint8 (3, H, W)."""
    places = np.linspace(0, 1, len(stops))
    channels = [np.interp(values.cpu().numpy(), places, channel) for channel in zip(*stops, strict=True)]
    return torch.from_numpy(np.stack(channels).round().astype(np.uint8))


def outline(tile: Tensor, row: int, column: int, side: int) -> Tensor:
    """A copy of tile (3, H, W) with a red frame around one patch."""
    picture = to_pil_image(tile.cpu())
    left, top = column * side, row * side
    line = max(1, side // 8)
    ImageDraw.Draw(picture).rectangle((left, top, left + side - 1, top + side - 1), None, RED, line)
    return pil_to_tensor(picture)
