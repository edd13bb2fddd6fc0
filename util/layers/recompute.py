"""Keep less for backward: recompute op operations instead of storing their outputs.

`linear(op(x))` normally stores x for the backward of `op` and op(x) for the weight gradient of
`linear`. `recompute_then_linear` stores x alone and evaluates `op` again in backward. With
LayerNorm and GELU as `op`, a transformer block keeps 10 instead of 16 values per token and channel,
at the price of a few per cent of its arithmetic; no matrix product is done twice.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge


def recompute_then_linear(op: Callable[[Tensor], Tensor], x: Tensor, linear: nn.Linear) -> Tensor:
    """linear(op(x)) of x (B, N, D), the same function and gradients, with x alone kept.

    Args:
        op: a module or function without randomness, such as LayerNorm or GELU.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # a compiler plans for itself
        return linear(op(x))
    params = tuple(op.parameters()) if isinstance(op, nn.Module) else ()
    return RecomputeThenLinear.apply(op, x, linear.weight, linear.bias, *params)


class RecomputeThenLinear(torch.autograd.Function):
    """F.linear(op(x), weight, bias); `params` are the parameters that `op` uses."""

    @staticmethod
    def forward(ctx, op, x: Tensor, weight: Tensor, bias: Tensor, *params: Tensor) -> Tensor:
        device = x.device.type
        # Not through __call__ in backward: the hooks of a module have run in forward.
        ctx.again = op.forward if isinstance(op, nn.Module) else op
        ctx.amp_dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        )
        ctx.save_for_backward(x, weight, *params)
        return F.linear(op(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, *params = ctx.saved_tensors
        autocast = torch.autocast(x.device.type, ctx.amp_dtype, enabled=ctx.amp_dtype is not None)
        x = x.detach().requires_grad_()
        with torch.enable_grad(), autocast:
            y = ctx.again(x)  # (B, N, D)
        end, dtype = get_gradient_edge(y), y.dtype
        _, _, needs_weight, needs_bias, *needs_params = ctx.needs_input_grad  # some may be frozen
        rows = grad.flatten(0, -2)  # (B * N, out), of the type that the product was done in
        grad_weight = grad_bias = None
        if needs_weight:
            grad_weight = (rows.T @ y.detach().to(grad.dtype).flatten(0, -2)).to(weight.dtype)
        if needs_bias:
            grad_bias = rows.sum(0)
        del y  # before the next tensor of its size
        grad_y = (grad @ weight.to(grad.dtype)).to(dtype)
        trained = [p for p, needed in zip(params, needs_params, strict=True) if needed]
        grad_x, *found = torch.autograd.grad(end, (x, *trained), grad_y)
        found = iter(found)
        grad_params = [next(found) if needed else None for needed in needs_params]
        return None, grad_x, grad_weight, grad_bias, *grad_params


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
