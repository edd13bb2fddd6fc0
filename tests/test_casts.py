"""Weights cast together under autocast, against autocast's own casts."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from models_vit import VisionTransformer
from util.casts import CastWeights
from util.layers.vit import compile_model


class CountCasts(TorchDispatchMode):
    """Counts conversions of tensors of the given shapes."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.single, self.together = shapes, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.single += name == "_to_copy" and out.shape in self.shapes
        self.together += name == "_foreach_copy_"
        return out


@pytest.fixture(params=["cross", "cross, 1 map", "mae", "vit"])
def model(request, tiny_cross, tiny_mae, tiny_vit):
    build = {"cross": tiny_cross, "mae": tiny_mae, "vit": tiny_vit}
    options = {"weight_fm": True, "use_fm": [0]} if "map" in request.param else {}
    return build[request.param.split(",")[0]](**options).train()


def run(model, call, dtype, recompute="none"):
    """(output, gradients by name, None where there is none)."""
    model.set_recompute(recompute)
    model.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(0)
    imgs = torch.randn(3, 3, 32, 32, generator=generator)
    noise = torch.rand(3, model.patch_embed.num_patches, generator=generator)
    options = {} if isinstance(model, VisionTransformer) else {"noise": noise}
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        out = call(imgs, **options)
    out.float().square().mean().backward()
    return out, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("recompute", ["none", "gelu", "all"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_outputs_and_gradients_are_those_of_autocast(model, dtype, recompute):
    """Bit for bit, also of weights without a gradient; with a conversion for all of them."""
    expected, gradients = run(model, model, dtype, recompute)
    shapes = {x.shape for x in model.weights_to_cast().values()}
    with CountCasts(shapes) as counts:
        found, own = run(model, CastWeights(model), dtype, recompute)
    assert found.equal(expected) and found.dtype == expected.dtype
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (own[name] is None) == (gradient is None), name
        assert gradient is None or own[name].equal(gradient), name
    assert counts.together == 2
    with CountCasts(shapes) as autocasts:
        run(model, model, dtype, recompute)
    assert autocasts.single - counts.single >= len(model.weights_to_cast())


def test_where_it_does_nothing(model):
    """Without autocast, compiled, recomputed by blocks, and for modules without blocks."""
    with CountCasts(()) as counts:
        run(model, CastWeights(model), None)
        run(model, lambda *x, **o: CastWeights(model)(*x, **o), torch.bfloat16, "blocks")
    assert counts.together == 0
    compiled = copy.deepcopy(model)
    compile_model(compiled, backend="eager")
    assert not CastWeights(compiled).weights
    assert CastWeights(torch.nn.Linear(2, 3))(torch.ones(1, 2)).shape == (1, 3)


def test_ddp_and_frozen_weights(tiny_vit):
    """DDP reduces gradients during backward, so they must not wait; frozen weights need none."""
    model = tiny_vit()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert not CastWeights(DistributedDataParallel(model)).weights
    finally:
        dist.destroy_process_group()
    model.freeze_for_probe()
    assert not CastWeights(model).weights
