"""Weighted sums of feature maps against the sum written out, forward and gradients."""

import pytest
import torch

from util.layers.mix import mix

J, K = 4, 3


def run(function, weight, maps, amp):
    weight, *maps = (x.clone().requires_grad_() for x in (weight, *maps))
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        sums = function(weight, maps)
    total = sum((j + 1) * x.float().square().sum() for j, x in enumerate(sums))
    return [torch.stack([x.float() for x in sums]), *torch.autograd.grad(total, [weight, *maps])]


def written_out(weight, maps):
    return [sum(w * m for w, m in zip(row, maps, strict=True)) for row in weight]


@pytest.fixture
def data():
    torch.manual_seed(0)
    return torch.randn(J, K), [torch.randn(5, 7, 16) for _ in range(K)]


def test_equals_the_written_out_sum(data):
    for got, expected in zip(run(mix, *data, False), run(written_out, *data, False), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_float32_is_one_product_of_the_stack(data):
    """Bit for bit what autograd gives for it, on which stored results depend."""

    def product(weight, maps):
        stacked = torch.stack(maps)
        return (weight @ stacked.flatten(1)).unflatten(1, stacked.shape[1:]).unbind(0)

    for got, expected in zip(run(mix, *data, False), run(product, *data, False), strict=True):
        assert torch.equal(got, expected)


def test_float64_gradients(data):
    weight, maps = data[0].double().requires_grad_(), [m.double().requires_grad_() for m in data[1]]
    assert torch.autograd.gradcheck(lambda w, *m: mix(w, list(m)), (weight, *maps))


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("num_maps", [1, K])
def test_stacking_again_changes_nothing(data, amp, num_maps):
    weight, maps = data[0][:, :num_maps], data[1][:num_maps]
    kept = run(mix, weight, maps, amp)
    again = run(lambda w, m: mix(w, m, recompute_stack=True), weight, maps, amp)
    for got, expected in zip(again, kept, strict=True):
        assert torch.equal(got, expected)


def test_bf16_is_within_its_rounding(data):
    exact = run(written_out, *data, False)
    for got, expected in zip(run(mix, *data, True), exact, strict=True):
        assert got.dtype == torch.float32
        assert (got - expected).norm() <= 2**-7 * expected.norm()


def test_weight_gradient_sums_images_in_float32():
    """A sum in bf16 would stop growing at 256: there 1 is less than half a step."""
    maps = [torch.ones(1000, 1, 1)]
    weight = torch.ones(1, 1, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        (mixed,) = mix(weight, [m.requires_grad_() for m in maps])
    mixed.sum(dtype=torch.float32).backward()
    assert weight.grad.item() == 1000


def test_compiled_equals_eager(data):
    compiled = torch.compile(mix, backend="aot_eager", fullgraph=True)
    for got, expected in zip(run(compiled, *data, False), run(mix, *data, False), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
