"""Images to patches and back.

Shapes: B images, C channels, L patches on a (rows, columns) grid, M selected patches, p patch size.
Inside a patch the order is row, column, channel (channel fastest), as in the published checkpoints.
"""

import torch
from torch import Tensor


def view_patches(imgs: Tensor, patch_size: int) -> Tensor:
    """View of imgs (B, C, H, W) as (B, rows, columns, C, p, p); no copy."""
    rows, columns = imgs.shape[2] // patch_size, imgs.shape[3] // patch_size
    grid = imgs.unflatten(3, (columns, patch_size)).unflatten(2, (rows, patch_size))
    return grid.permute(0, 2, 4, 1, 3, 5)


def patchify(imgs: Tensor, patch_size: int) -> Tensor:
    """imgs (B, C, H, W) -> (B, L, p*p*C)."""
    return view_patches(imgs, patch_size).permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """patches (B, L, p*p*C) on a (rows, columns) grid -> (B, C, H, W); the inverse of patchify."""
    x = patches.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, grid)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def gather_patches(imgs: Tensor, ids: Tensor, patch_size: int) -> Tensor:
    """Select patches: imgs (B, C, H, W), ids (B, M) -> (B, M, C, p, p)."""
    grid = view_patches(imgs, patch_size)
    image = torch.arange(len(imgs), device=imgs.device).unsqueeze(1)
    return grid[image, ids // grid.shape[2], ids % grid.shape[2]]


def normalize_patches(patches: Tensor) -> Tensor:
    """Patches (..., pixels) with mean 0 and unbiased variance 1: the target of norm_pix_loss."""
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean).div_((var + 1e-6).sqrt())
