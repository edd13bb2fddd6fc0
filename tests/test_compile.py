"""Compiled models: how many programs there are, that none falls back, and the same numbers."""

import logging

import pytest
import torch
import torch.distributed as dist
from timm.layers import DropPath as TimmDropPath
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from util.layers.blocks import DropPath
from util.layers.vit import compile_model
from util.run.flags import parse_flags
from util.run.setup import describe_fallbacks

DEEP = dict(depth=12, drop_path_rate=0.2)


@pytest.fixture(autouse=True)
def forget_compiled_programs():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


def assert_compiled(num_graphs: int):
    assert counters["stats"]["unique_graphs"] == num_graphs
    assert counters["frames"]["ok"] == counters["frames"]["total"]
    assert not describe_fallbacks()


def train(model, size: int = 4, **options):
    model.train()
    for _ in range(2):
        model(torch.randn(size, 3, 32, 32), **options).float().square().mean().backward()


def evaluate(model, size: int = 4):
    model.eval()
    with torch.inference_mode():
        model(torch.randn(size, 3, 32, 32))


def test_blocks_of_fine_tuning(tiny_vit):
    """12 rates of stochastic depth share a program; the first block, with none, has its own."""
    model = tiny_vit(**DEEP)
    compile_model(model, backend="aot_eager")
    train(model)
    assert_compiled(2)
    evaluate(model)
    assert_compiled(4)
    evaluate(model, size=3)  # the last batch: programs of any batch size
    assert_compiled(6)
    evaluate(model, size=2)
    train(model)
    assert_compiled(6)


@pytest.mark.parametrize("factory", ["tiny_cross", "tiny_mae"])
def test_blocks_of_pre_training(factory, request):
    model = request.getfixturevalue(factory)(depth=12, decoder_depth=12)
    compile_model(model, backend="aot_eager")
    train(model)
    assert_compiled(2)


@pytest.mark.parametrize("factory", ["tiny_cross", "tiny_mae", "tiny_vit"])
def test_whole_model_is_one_program(factory, request):
    model = request.getfixturevalue(factory)()
    torch.manual_seed(0)
    imgs, options = torch.randn(4, 3, 32, 32), {}
    if factory != "tiny_vit":
        options["noise"] = torch.rand(4, 16)
    expected = model(imgs, **options)
    compile_model(model, "whole", backend="aot_eager")
    torch.testing.assert_close(model(imgs, **options), expected)
    train(model, **options)
    assert_compiled(1)


@pytest.mark.slow  # Inductor compiles for half a minute
def test_inductor_computes_the_same(tiny_cross):
    """Loss and gradients of the whole model for given masks."""
    model = tiny_cross(norm_pix_loss=True)
    imgs, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 16)
    results = []
    for _ in range(2):
        model.zero_grad()
        loss = model(imgs, noise=noise)
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        results.append((loss.detach(), grads))
        compile_model(model, "whole")
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
    assert_compiled(1)


@pytest.mark.parametrize("what", ["blocks", "whole"])
def test_ddp_adds_no_program(what, tiny_cross, tmp_path):
    model = tiny_cross(depth=12)
    compile_model(model, what, backend="aot_eager")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ddp_model = DistributedDataParallel(model, bucket_cap_mb=0.001)
        train(ddp_model)
    finally:
        dist.destroy_process_group()
    assert_compiled(2 if what == "blocks" else 1)


@torch._dynamo.config.patch(recompile_limit=1)
def test_a_fallback_is_described(tiny_vit):
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    model = tiny_vit(**DEEP)
    compile_model(model, backend="eager")
    train(model)
    assert "recompile limit" in describe_fallbacks()


def test_drop_path_equals_timm_bit_for_bit():
    x = torch.randn(8, 3, 4)
    ours, theirs = DropPath(0.3), TimmDropPath(0.3)
    torch.manual_seed(0)
    expected = theirs(x)
    torch.manual_seed(0)
    assert torch.equal(ours(x), expected) and torch.equal(ours.eval()(x), x)


def test_compiled_drop_path_keeps_the_mean():
    drop = DropPath(0.25)
    compiled = torch.compile(drop, backend="aot_eager", fullgraph=True)
    y = compiled(torch.ones(20000, 1, 2))
    kept = y[:, 0, 0] > 0
    assert torch.equal(y[:, 0, 0], y[:, 0, 1]) and abs(kept.float().mean() - 0.75) < 0.02
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / 0.75))


@pytest.mark.parametrize(
    "value, expected", [("true", "blocks"), ("false", None), ("whole", "whole")]
)
def test_flag_and_its_value_in_a_config_file(value, expected, tmp_path):
    """A bare --compile means blocks; run.json of earlier versions holds true or false."""
    from main_pretrain import get_args_parser

    (tmp_path / "run.yaml").write_text(f"compile: {value}\n")
    args = parse_flags(get_args_parser(), ["--config", str(tmp_path / "run.yaml")])
    assert args.compile == expected
    assert parse_flags(get_args_parser(), ["--compile"]).compile == "blocks"
    assert parse_flags(get_args_parser(), []).compile is None
