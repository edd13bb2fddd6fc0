"""Weighted sums of the encoder's feature maps, for all decoder blocks at once.

Shapes: J weighted sums, K feature maps.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def mix(weight: Tensor, maps: list[Tensor]) -> tuple[Tensor, ...]:
    """J weighted sums of K maps of one shape, weight (J, K); the maps alone are kept.

    One matrix product over the stacked maps; the stack is built again in backward, since a second
    copy of all feature maps would have to be kept for it.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return mix_stacked(weight, torch.stack(maps))
    return Mix.apply(weight, *maps)


def mix_stacked(weight: Tensor, stacked: Tensor) -> tuple[Tensor, ...]:
    """weight (J, K), stacked (K, ...) -> J tensors (...)."""
    return (weight @ stacked.flatten(1)).unflatten(1, stacked.shape[1:]).unbind(0)


class Mix(torch.autograd.Function):
    """See mix()."""

    @staticmethod
    def forward(ctx, weight: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(weight, *maps)
        return mix_stacked(weight, torch.stack(maps))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        weight, *maps = ctx.saved_tensors
        grad = torch.stack(grads).flatten(1)  # (J, n)
        stacked = torch.stack(maps).to(grad.dtype).flatten(1)  # (K, n)
        grad_weight = (grad @ stacked.T).to(weight.dtype)
        grad_maps = (weight.to(grad.dtype).T @ grad).unflatten(1, maps[0].shape)
        return grad_weight, *(g.to(m.dtype) for g, m in zip(grad_maps, maps, strict=True))
