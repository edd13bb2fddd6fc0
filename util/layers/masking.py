"""Random masking: which patches are visible to the encoder, predicted by the decoder, or skipped.

Shapes: B images, L patches, V visible, P predicted, N tokens, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from util.io.errors import UserError


class Masking(NamedTuple):
    """A random order of the patches: the first V visible, the last P predicted, others skipped."""

    order: Tensor  # (B, L) patch indices
    num_visible: int
    ids_pred: Tensor  # predicted patches (B, P), in raster order

    @property
    def ids_keep(self) -> Tensor:
        """Visible patches (B, V), in the random order."""
        return self.order[:, : self.num_visible]

    @property
    def ids_restore(self) -> Tensor:
        """Position of each patch in the random order (B, L); undoes the shuffling."""
        return self.order.argsort(dim=1)

    @property
    def mask(self) -> Tensor:
        """(B, L) in raster order: 1 predicted, 0 visible or skipped."""
        return torch.zeros(self.order.shape, device=self.order.device).scatter_(1, self.ids_pred, 1)


def num_visible_and_predicted(
    num_patches: int, mask_ratio: float, kept_mask_ratio: float
) -> tuple[int, int]:
    """(V, P) of L patches, rounded as in the published code: float64 products cut to integers.

    Raises:
        UserError: a ratio is outside (0, 1), kept_mask_ratio exceeds mask_ratio, or nothing would
            be visible or predicted.
    """
    for name, ratio in (("mask_ratio", mask_ratio), ("kept_mask_ratio", kept_mask_ratio)):
        if not 0 < ratio < 1:
            raise UserError(f"{name} is {ratio}; it must be between 0 and 1, exclusive.")
    if kept_mask_ratio > mask_ratio:
        raise UserError(
            f"kept_mask_ratio {kept_mask_ratio} exceeds mask_ratio {mask_ratio}; "
            "only masked patches can be predicted, so lower it or raise mask_ratio."
        )
    num_visible = int(num_patches * (1 - mask_ratio))
    num_predicted = num_patches - num_visible - int(num_patches * (mask_ratio - kept_mask_ratio))
    if num_visible < 1 or num_predicted < 1:
        raise UserError(
            f"Of {num_patches} patches, mask_ratio {mask_ratio} and kept_mask_ratio "
            f"{kept_mask_ratio} leave {num_visible} visible and {num_predicted} predicted; "
            "both must be at least 1: use more patches or other ratios."
        )
    return num_visible, num_predicted


def random_masking(noise: Tensor, num_visible: int, num_predicted: int) -> Masking:
    """Order the patches of each image by noise (B, L), smallest first."""
    order = noise.argsort(dim=1)
    ids_pred = order[:, order.shape[1] - num_predicted :].sort(dim=1).values
    return Masking(order, num_visible, ids_pred)


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Select tokens: x (B, N, D), ids (B, M) -> (B, M, D)."""
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
