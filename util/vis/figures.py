"""Drawing: pages of text, tiles and heat maps, made with Pillow and returned as uint8 tensors.

Knows nothing of models. Letters: B images, C channels, H height, W width, L patches.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from util.io.errors import UserError

GREY = 128  # what is not shown
HATCH = (150, 205)  # the two greys of what is missing
INK = (20, 20, 20)
PAPER = (255, 255, 255)
FRAME = (0, 235, 235)
GAP = 8  # pixels between the parts of a page
TEXT_SIZE = 14
CELL_HEIGHT = 26  # of a heat map
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
        texts = [part for part in self.parts if isinstance(part, str)]
        pictures = [part for part in self.parts if not isinstance(part, str)]
        words = [text_width(word) for text in texts for word in text.split()]
        width = max([MIN_WIDTH, *words, *(picture.width for picture in pictures)])
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
    lines = wrap(text, width)
    picture = Image.new("RGB", (width, line_height() * len(lines)), PAPER)
    draw = ImageDraw.Draw(picture)
    for i, line in enumerate(lines):
        draw.text((0, i * line_height()), line, INK, font())
    return picture


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most that many pixels, unless one word takes more."""
    lines = []
    for word in text.split():
        if lines and text_width(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def heat_map(
    matrix: Tensor, row_names: Sequence[str], column_names: Sequence[str], signed: bool = False
) -> Image.Image:
    """A matrix (rows, columns) as coloured cells with their numbers and names.

    Args:
        signed: white is 0, blue below, red above; else dark is 0 and bright the largest number.
    """
    values = matrix.detach().float().cpu()
    largest = values.abs().max().clamp(min=1e-12)
    scaled = values / largest
    colors = color(scaled / 2 + 0.5, SIGNED) if signed else color(scaled.clamp(min=0))
    left = max(text_width(name) for name in row_names) + GAP
    cell = max([text_width("-0.00"), *(text_width(name) for name in column_names)]) + GAP
    top = line_height()
    cells = enlarge(colors, CELL_HEIGHT).numpy().transpose(1, 2, 0)
    cells = Image.fromarray(cells).resize(
        (cell * values.shape[1], CELL_HEIGHT * values.shape[0]), Image.Resampling.NEAREST
    )
    picture = Image.new("RGB", (left + cells.width, top + cells.height), PAPER)
    picture.paste(cells, (left, top))
    draw = ImageDraw.Draw(picture)
    for j, name in enumerate(column_names):
        draw.text((left + (j + 0.5) * cell, 0), name, INK, font(), anchor="ma")
    for i, name in enumerate(row_names):
        middle = top + (i + 0.5) * CELL_HEIGHT
        draw.text((0, middle), name, INK, font(), anchor="lm")
        for j, value in enumerate(values[i].tolist()):
            ink = INK if colors[:, i, j].float().mean() > 128 else PAPER
            place = (left + (j + 0.5) * cell, middle)
            draw.text(place, f"{round(value, 2) + 0:.2f}", ink, font(), anchor="mm")
    return picture


def check_png(path: str | Path) -> None:
    """Raises UserError unless the name is one for save_png; to be called before the work."""
    if Path(path).suffix.lower() != ".png":
        raise UserError(f"--out is {path}; it must end in .png.")


def save_png(picture: Tensor, path: str | Path) -> None:
    """Write uint8 (3, H, W) to a PNG file, in a folder that is made if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil_image(picture).save(path, format="PNG")


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


def fit(img: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 (3, H, W), each new pixel the mean of what it covers."""
    resized = torch.nn.functional.interpolate(img[None].float(), (height, width), mode="area")
    return resized[0].round().to(torch.uint8)


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


def color(values: Tensor, stops: Sequence[tuple[int, int, int]] = HEAT) -> Tensor:
    """Numbers in 0..1 on a colour scale: (H, W) -> uint8 (3, H, W)."""
    places = np.linspace(0, 1, len(stops))
    channels = [
        np.interp(values.cpu().numpy(), places, channel) for channel in zip(*stops, strict=True)
    ]
    return torch.from_numpy(np.stack(channels).round().astype(np.uint8))


def outline(tile: Tensor, row: int, column: int, side: int) -> Tensor:
    """A copy of tile (3, H, W) with a frame around one patch."""
    picture = to_pil_image(tile.cpu())
    left, top = column * side, row * side
    line = max(1, side // 8)
    ImageDraw.Draw(picture).rectangle(
        (left, top, left + side - 1, top + side - 1), None, FRAME, line
    )
    return pil_to_tensor(picture)
