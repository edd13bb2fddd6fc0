"""Weighted sums of the encoder's feature maps, for all decoder blocks at once.

Shapes: J weighted sums, K feature maps, B images, N tokens, D width; n = B * N * D.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from util.casts import product_dtype


def mix(weight: Tensor, maps: list[Tensor], recompute_stack: bool = False) -> tuple[Tensor, ...]:
    """J weighted sums of K maps (B, N, D), weight (J, K); under autocast in its dtype.

    One matrix product over the stacked maps.

    Args:
        recompute_stack: stack the maps again in backward instead of keeping this copy of them.
    """
    dtype = product_dtype(weight)
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return mix_stacked(weight.to(dtype), stack_as(maps, dtype))
    return Mix.apply(weight, dtype, recompute_stack, *maps)


def mix_stacked(weight: Tensor, stacked: Tensor) -> tuple[Tensor, ...]:
    """weight (J, K), stacked (K, B, N, D) -> J tensors (B, N, D)."""
    return (weight @ stacked.flatten(1)).unflatten(1, stacked.shape[1:]).unbind(0)


def stack_as(maps: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The maps in one tensor (K, B, N, D) of dtype; each is read and written once."""
    if torch.compiler.is_compiling():
        return torch.stack(maps).to(dtype)  # fused
    stacked = torch.empty(len(maps), *maps[0].shape, dtype=dtype, device=maps[0].device)
    for target, source in zip(stacked, maps, strict=True):
        target.copy_(source)
    return stacked


class Mix(torch.autograd.Function):
    """See mix()."""

    @staticmethod
    def forward(ctx, weight: Tensor, dtype: torch.dtype, recompute_stack: bool, *maps: Tensor):
        stacked = stack_as(maps, dtype)  # (K, B, N, D)
        ctx.map_dtypes, ctx.recompute_stack = [m.dtype for m in maps], recompute_stack
        ctx.save_for_backward(weight, *(maps if recompute_stack else [stacked]))
        return mix_stacked(weight.to(dtype), stacked)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        weight, *saved = ctx.saved_tensors
        grad = torch.stack(grads)  # (J, B, N, D)
        stacked = stack_as(saved, grad.dtype) if ctx.recompute_stack else saved[0]
        grad_weight = multiply_maps(grad, stacked)
        grad_maps = (weight.to(grad.dtype).T @ grad.flatten(1)).unflatten(1, grad.shape[1:])
        return (
            grad_weight.to(weight.dtype),
            None,
            None,
            *(g.to(dtype) for g, dtype in zip(grad_maps, ctx.map_dtypes, strict=True)),
        )


def multiply_maps(grad: Tensor, stacked: Tensor) -> Tensor:
    """Inner products over all else of grad (J, B, N, D) and stacked (K, B, N, D): (J, K).

    In 16 bits one product per image, then a sum in float32: a single product over millions of
    elements would be split in a way that depends on the device, and its parts rounded.
    """
    if grad.dtype not in (torch.float16, torch.bfloat16):
        return grad.flatten(1) @ stacked.flatten(1).T
    per_image = grad.flatten(2).transpose(0, 1) @ stacked.flatten(2).permute(1, 2, 0)  # (B, J, K)
    return per_image.sum(0, dtype=torch.float32)
