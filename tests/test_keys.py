"""State dicts of all public models: strict loading of published checkpoints requires equality."""

import importlib

import pytest
import torch
from parity_data import parity_cases, record
from torch import nn


@pytest.mark.parametrize("case", parity_cases("keys", "keys"))
def test_state_dict(case):
    """Names, shapes, order, counts, frozen tensors, LayerNorm eps and heads, on the meta device."""
    with torch.device("meta"):
        factory = getattr(importlib.import_module(case["module"]), case["factory"])
        model = factory(**case["kwargs"])
    state = model.state_dict()
    assert [[name, list(tensor.shape)] for name, tensor in state.items()] == case["state_dict"]
    assert len(state) == case["num_tensors"]
    params = dict(model.named_parameters())
    assert sum(p.numel() for p in params.values()) == case["params_total"]
    assert sum(p.numel() for p in params.values() if p.requires_grad) == case["params_trainable"]
    assert [name for name, p in params.items() if not p.requires_grad] == case["frozen"]
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert sorted({norm.eps for norm in norms}) == case["layernorm_eps"]
    assert head_counts(model.blocks) == case["heads"]
    if case["decoder_heads"]:
        assert head_counts(model.decoder_blocks) == case["decoder_heads"]
    record("names, shapes, order, counts, eps, heads")


def head_counts(blocks: nn.ModuleList) -> list[int]:
    """The distinct num_heads in these blocks."""
    return sorted({m.num_heads for m in blocks.modules() if hasattr(m, "num_heads")})
