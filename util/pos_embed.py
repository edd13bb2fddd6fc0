"""Position embeddings: the fixed 2-D sine-cosine one, and resizing one to another grid.

Shapes: L patches, D width.
"""

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.io.errors import UserError

logger = logging.getLogger(__name__)


def get_2d_sincos_pos_embed(
    dim: int, grid: int | tuple[int, int], cls_token: bool = False
) -> Tensor:
    """Sine-cosine embedding (L, dim) of a (rows, columns) grid; cls_token puts a zero row first.

    The first half of each row encodes the column, the second half the row (as in MAE). The step is
    one patch at every image size.

    Raises:
        UserError: dim does not divide by 4.
    """
    if dim % 4:
        raise UserError(
            f"A sine-cosine position embedding needs a width divisible by 4, got {dim}."
        )
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    embed = get_2d_sincos_pos_embed_from_grid(dim, (column, row))
    return F.pad(embed, (0, 0, 1, 0)) if cls_token else embed


def get_2d_sincos_pos_embed_from_grid(dim: int, grid: Sequence[Tensor]) -> Tensor:
    """Embedding (L, dim) of L positions, given as (columns, rows), L values each in any shape."""
    return torch.cat([get_1d_sincos_pos_embed_from_grid(dim // 2, pos) for pos in grid], dim=1)


def get_1d_sincos_pos_embed_from_grid(dim: int, pos: Tensor) -> Tensor:
    """Embedding (L, dim) of L positions: [sin(pos w), cos(pos w)], w_i = 10000^(-i / (dim / 2)).

    Computed in float64 ("Attention Is All You Need", arXiv 1706.03762).
    """
    omega = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angle = torch.as_tensor(pos).reshape(-1, 1) * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def resize_pos_embed(
    pos_embed: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> Tensor:
    """Resize (1, 1 + L, D) bicubically to another grid; the class token's row is kept."""
    cls_row, patch_rows = pos_embed[:, :1], pos_embed[:, 1:]
    image = patch_rows.unflatten(1, old_grid).permute(0, 3, 1, 2)
    image = F.interpolate(image.float(), size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat([cls_row, image.permute(0, 2, 3, 1).flatten(1, 2).to(cls_row)], dim=1)


def interpolate_pos_embed(
    model: nn.Module, state_dict: dict[str, Tensor], old_grid: tuple[int, int] | None = None
) -> None:
    """Resize state_dict["pos_embed"] in place to the grid of `model`.

    Args:
        old_grid: (rows, columns) of the stored embedding; by default a square.

    Raises:
        UserError: the stored grid is not square and old_grid is not given.
    """
    if "pos_embed" not in state_dict:
        return
    pos_embed, new_grid = state_dict["pos_embed"], model.patch_embed.grid_size
    num_patches = pos_embed.shape[1] - 1
    side = round(num_patches**0.5)
    old_grid = old_grid or (side, side)
    if old_grid[0] * old_grid[1] != num_patches:
        raise UserError(
            f"The checkpoint's pos_embed has {num_patches} patches, not a {old_grid[0]}x"
            f"{old_grid[1]} grid, and the file does not name its grid, so it cannot be resized."
        )
    if tuple(old_grid) != tuple(new_grid):
        logger.info("Position interpolate from %dx%d to %dx%d", *old_grid, *new_grid)
        state_dict["pos_embed"] = resize_pos_embed(pos_embed, tuple(old_grid), tuple(new_grid))
