"""Under autocast, cast the weights of all blocks at once instead of one by one.

Autocast casts every weight and bias where it is used, and its gradient back: for a ViT-B with its
decoder, 432 small kernels in a training step. The values are the same here, bit for bit.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from util.layers.blocks import Block, CrossAttentionBlock
from util.layers.recompute import product_dtype


class CastWeights:
    """Call a model with the weights of its blocks in autocast's dtype.

    Only where that saves something: a compiler fuses the casts, under DDP all gradients would
    arrive at the end of backward instead of during it, and recomputed blocks cast again.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        is_compiled = any(x._compiled_call_impl is not None for x in model.modules())
        is_plain = not is_compiled and not getattr(model, "grad_checkpointing", True)
        self.weights = find_weights(model) if is_plain else {}

    def __call__(self, *inputs, **options):
        """model(*inputs, **options)."""
        weights = list(self.weights.values())
        dtype = product_dtype(weights[0]) if weights else None
        if not weights or dtype == weights[0].dtype:
            return self.model(*inputs, **options)
        casts = dict(zip(self.weights, CastTogether.apply(dtype, *weights), strict=True))
        return functional_call(self.model, casts, inputs, options, tie_weights=False)


def find_weights(model: nn.Module) -> dict[str, Tensor]:
    """Trained weights and biases of the linear layers in the blocks, by name."""
    return {
        f"{prefix}.{name}.{kind}": param
        for prefix, block in model.named_modules()
        if isinstance(block, Block | CrossAttentionBlock)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
        for kind, param in module.named_parameters()
        if param.requires_grad
    }


class CastTogether(torch.autograd.Function):
    """Copies of all tensors in dtype; their gradients in the tensors' own dtype."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        ctx.set_materialize_grads(False)
        return tuple(cast_all(tensors, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None):
        casts = iter(cast_all([x for x in grads if x is not None], ctx.dtype))
        return None, *(None if x is None else next(casts) for x in grads)


def cast_all(tensors, dtype: torch.dtype) -> list[Tensor]:
    casts = [torch.empty_like(x, dtype=dtype) for x in tensors]
    torch._foreach_copy_(casts, tensors)
    return casts
