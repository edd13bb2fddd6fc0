"""Recomputation in backward: the same outputs and gradients bit for bit, with less kept."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from util.layers.recompute import gelu_linear, norm_linear

POLICIES = ("none", "gelu", "all", "blocks")


def run(compute, x, params, amp):
    """Output and gradients of x and of the parameters that are not frozen."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        y = compute(x)
    trained = [p for p in params if p.requires_grad]
    return [y, *torch.autograd.grad(y.float().square().sum(), [x, *trained])]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("op", ["gelu", "norm"])
def test_bitwise_equal_to_autograd(op, amp, frozen):
    torch.manual_seed(0)
    linear, norm = nn.Linear(24, 40), nn.LayerNorm(24, eps=1e-6)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    params = [*linear.parameters()] + ([*norm.parameters()] if op == "norm" else [])
    params[0].requires_grad_(not frozen)
    params[-1].requires_grad_(not frozen)
    x = torch.randn(3, 5, 24)
    if op == "gelu":
        x = x.bfloat16() if amp else x  # what a linear layer before it gives
        plain, lean = lambda x: linear(F.gelu(x)), lambda x: gelu_linear(x, linear)
    else:
        plain, lean = lambda x: linear(norm(x)), lambda x: norm_linear(norm, x, linear)
    for got, expected in zip(run(lean, x, params, amp), run(plain, x, params, amp), strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("factory", ["tiny_cross", "tiny_mae", "tiny_vit"])
def test_policies_change_no_gradient_and_keep_less(factory, amp, request):
    options = dict(self_attn=True) if factory == "tiny_cross" else {}
    model = request.getfixturevalue(factory)(**options)
    imgs, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 16)
    arguments = {} if factory == "tiny_vit" else {"noise": noise}
    expected, kept = None, {}
    for policy in POLICIES:
        model.set_recompute(policy)
        model.zero_grad(set_to_none=True)
        stored = {}

        def note(x, stored=stored):
            stored[x.untyped_storage()._cdata] = x
            return x

        with (
            torch.autocast("cpu", torch.bfloat16, enabled=amp),
            saved_tensors_hooks(note, lambda x: x),
        ):
            loss = model(imgs, **arguments).float().square().mean()
        kept[policy] = sum(x.untyped_storage().nbytes() for x in stored.values())
        loss.backward()
        grads = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
        expected = expected or grads
        exact = not amp or policy != "all"  # the CPU's own LayerNorm in bf16 rounds its output
        for got, wanted in zip(grads, expected, strict=True):
            assert torch.equal(got, wanted) if exact else torch.allclose(got, wanted, atol=2e-2)
    if not amp:  # in bf16 the casts of the weights outweigh so small activations
        assert kept["blocks"] < kept["all"] < kept["gelu"] < kept["none"]
