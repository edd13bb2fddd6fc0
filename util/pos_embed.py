"""Position tables: the fixed 2-D sine-cosine table, and resizing a learned one to another grid.

Letters: L patches, D width.
"""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.io.errors import UserError

logger = logging.getLogger(__name__)


def get_2d_sincos_pos_embed(
    dim: int, grid: int | tuple[int, int], cls_token: bool = False
) -> Tensor:
    """Table (L, dim) for a (rows, columns) grid; with cls_token a zero row comes first.

    Each row is [sin(column w), cos(column w), sin(row w), cos(row w)], w_i = 10000^(-i / (dim / 4))
    ("Attention Is All You Need", arXiv 1706.03762, in two dimensions as in MAE). Steps are one
    patch, whatever the picture size.

    Raises:
        UserError: dim does not divide by 4.
    """
    if dim % 4:
        raise UserError(f"A sine-cosine table needs a width divisible by 4, got {dim}.")
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [position.reshape(-1, 1) * omega for position in (column, row)]
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    if cls_token:
        table = F.pad(table, (0, 0, 1, 0))
    return table.float()


def resize_pos_embed(
    pos_embed: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> Tensor:
    """Resize a table (1, 1 + L, D) bicubically to another grid; the class row is kept."""
    cls_row, patch_rows = pos_embed[:, :1], pos_embed[:, 1:]
    image = patch_rows.unflatten(1, old_grid).permute(0, 3, 1, 2)
    image = F.interpolate(image.float(), size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat([cls_row, image.permute(0, 2, 3, 1).flatten(1, 2).to(cls_row)], dim=1)


def interpolate_pos_embed(
    model: nn.Module, state_dict: dict[str, Tensor], old_grid: tuple[int, int] | None = None
) -> None:
    """Resize state_dict["pos_embed"] in place to the grid of `model`.

    Args:
        old_grid: (rows, columns) the table was made for; files that do not say are square.

    Raises:
        UserError: the stored table is not square and old_grid is not given.
    """
    if "pos_embed" not in state_dict:
        return
    table, new_grid = state_dict["pos_embed"], model.patch_embed.grid_size
    num_patches = table.shape[1] - 1
    side = round(num_patches**0.5)
    old_grid = old_grid or (side, side)
    if old_grid[0] * old_grid[1] != num_patches:
        raise UserError(
            f"The checkpoint's position table has {num_patches} rows, which are no {old_grid[0]}x"
            f"{old_grid[1]} grid; it holds no grid of its own, so it cannot be resized."
        )
    if tuple(old_grid) != tuple(new_grid):
        logger.info("Position interpolate from %dx%d to %dx%d", *old_grid, *new_grid)
        state_dict["pos_embed"] = resize_pos_embed(table, tuple(old_grid), tuple(new_grid))
