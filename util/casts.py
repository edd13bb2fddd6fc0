"""Under autocast, cast the weights of a model at once instead of one by one.

Autocast casts every weight and bias where it is used, and its gradient back: for a ViT-B with its
decoder, 432 small kernels in a training step. The values are the same here, bit for bit. The
gradients of all casts live until the end of backward, where they are cast back together.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call


def product_dtype(weight: Tensor) -> torch.dtype:
    """dtype of a matrix product with this weight: autocast's, else the weight's own."""
    device = weight.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # meta has no autocast
        return torch.get_autocast_dtype(device)
    return weight.dtype


class CastWeights:
    """Call a model with the weights that its `weights_to_cast` names in autocast's dtype.

    Models without that method are called as they are, and so is DDP, where all gradients would
    arrive at the end of backward instead of during it. The weights are listed once, when this is
    made: compile, freeze and choose what is recomputed before.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.weights = model.weights_to_cast() if hasattr(model, "weights_to_cast") else {}

    def __call__(self, *args, **kwargs):
        """model(*args, **kwargs)."""
        weights = list(self.weights.values())
        dtype = product_dtype(weights[0]) if weights else None
        if not weights or dtype == weights[0].dtype:
            return self.model(*args, **kwargs)
        casts = dict(zip(self.weights, CastTogether.apply(dtype, *weights), strict=True))
        return functional_call(self.model, casts, args, kwargs, tie_weights=False)


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
