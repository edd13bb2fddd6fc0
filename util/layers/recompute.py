"""Keep less for backward: recompute cheap operations instead of storing their outputs.

`linear(gelu(x))` normally stores x for the backward of GELU and gelu(x) for the weight gradient of
`linear`; `linear(norm(x))` likewise. The functions here store x alone and compute the operation
again in backward. No matrix product is done twice. Gradients are bit for bit those of autograd.

Shapes: B images, N tokens, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from util.casts import product_dtype


def gelu_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """linear(gelu(x)) of x (B, N, D); x has the type that the product is done in."""
    if is_planned_elsewhere():
        return linear(F.gelu(x))
    return GeluLinear.apply(x, linear.weight.to(x.dtype), linear.bias.to(x.dtype))


def norm_linear(norm: nn.Module, x: Tensor, linear: nn.Linear) -> Tensor:
    """linear(norm(x)) of x (B, N, D); other modules than LayerNorm are never recomputed."""
    if is_planned_elsewhere() or type(norm) is not nn.LayerNorm:
        return linear(norm(x))
    dtype = product_dtype(linear.weight)
    params = norm.weight, norm.bias, linear.weight.to(dtype), linear.bias.to(dtype)
    return NormLinear.apply(x, norm.eps, *params)


def is_planned_elsewhere() -> bool:
    """Whether nothing is kept, or a compiler decides what is."""
    return not torch.is_grad_enabled() or torch.compiler.is_compiling()


class GeluLinear(torch.autograd.Function):
    """F.linear(gelu(x), weight, bias), all of one dtype."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad_weight, grad_bias = linear_backward(grad, F.gelu(x), ctx.needs_input_grad[1:])
        return torch.ops.aten.gelu_backward(grad @ weight, x), grad_weight, grad_bias


class NormLinear(torch.autograd.Function):
    """F.linear(layer_norm(x), weight, bias), normalized in the dtype of the norm's weight."""

    @staticmethod
    def forward(ctx, x: Tensor, eps: float, scale, shift, weight, bias) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(
            x.to(scale.dtype), scale.shape, scale, shift, eps
        )  # (B, N, D), (B, N, 1), (B, N, 1)
        ctx.eps = eps
        ctx.save_for_backward(x, scale, shift, weight, mean, rstd)
        return F.linear(y.to(weight.dtype), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, scale, shift, weight, mean, rstd = ctx.saved_tensors
        x_dtype, x = x.dtype, x.to(scale.dtype)
        y = torch.native_layer_norm(x, scale.shape, scale, shift, ctx.eps)[0].to(weight.dtype)
        needs = ctx.needs_input_grad
        grad_weight, grad_bias = linear_backward(grad, y, needs[4:])
        del y  # before the next tensor of its size
        grad_x, grad_scale, grad_shift = torch.ops.aten.native_layer_norm_backward(
            (grad @ weight).to(x.dtype),
            x,
            scale.shape,
            mean,
            rstd,
            scale,
            shift,
            [True, *needs[2:4]],
        )
        return grad_x.to(x_dtype), None, grad_scale, grad_shift, grad_weight, grad_bias


def linear_backward(grad: Tensor, y: Tensor, needs: tuple[bool, ...]):
    """Gradients of weight and bias of linear(y) where needed, else None: grad (B, N, out)."""
    rows = grad.flatten(0, -2)
    grad_weight = rows.T @ y.flatten(0, -2) if needs[0] else None
    return grad_weight, rows.sum(0) if needs[1] else None
