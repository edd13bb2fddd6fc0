"""Sine-cosine position embeddings and interpolation of position embeddings."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity_data import FOLDER, assert_match, find_case
from safetensors.torch import load_file

from util.pos_embed import get_2d_sincos_pos_embed, interpolate_pos_embed

CASES = find_case("posembed", "posembed")["tables"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['dim']}-{case['grid']}")
def test_matches_stored_values(case):
    """All or selected rows, and sums over all rows."""
    stored = load_file(FOLDER / "posembed.safetensors")
    pos_embed = get_2d_sincos_pos_embed(case["dim"], case["grid"], cls_token=True)
    assert pos_embed.dtype == torch.float32 and list(pos_embed.shape) == case["shape"]
    kind, rows = ("full", slice(None)) if case.get("full") else ("rows", case["rows"])
    expected = stored[f"{kind}_{case['dim']}_{case['grid']}"]
    assert_match(pos_embed[rows], expected, "position embedding", 1e-5, 0)
    if "sum" in case:
        exact = pos_embed.double()
        sums = {"sum": exact.sum(), "sum_abs": exact.abs().sum(), "sum_sq": (exact**2).sum()}
        for name, value in sums.items():
            assert_match(value.item(), case[name], "sums over all rows", 1e-6 * exact.numel(), 0)


@pytest.mark.parametrize("grid", [3, (2, 5)])
def test_entries_match_formula(grid):
    """Column before row; square and non-square grids, with and without class token."""
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    pos_embed = get_2d_sincos_pos_embed(8, grid)
    assert pos_embed.shape == (rows * columns, 8)
    for r in range(rows):
        for c in range(columns):
            waves = [f(x * w) for x in (c, r) for f in (math.sin, math.cos) for w in (1, 0.01)]
            np.testing.assert_allclose(pos_embed[r * columns + c], waves, atol=1e-7)
    with_cls = get_2d_sincos_pos_embed(8, grid, cls_token=True)
    assert with_cls[0].eq(0).all() and with_cls[1:].equal(pos_embed)


def test_width_not_divisible_by_4_is_refused():
    with pytest.raises(ValueError, match="divisible by 4"):
        get_2d_sincos_pos_embed(10, 2)


def test_interpolation_is_bicubic_and_in_place(tiny_vit, caplog):
    """The class token row is kept; equal grids change nothing. The log has MAE's line."""
    caplog.set_level("INFO")
    model = tiny_vit(img_size=48)
    pos_embed = torch.randn(1, 17, 32, generator=torch.Generator().manual_seed(0))
    state = {"pos_embed": pos_embed.clone()}
    interpolate_pos_embed(model, state)
    assert caplog.messages == ["Position interpolate from 4x4 to 6x6"]
    grid = pos_embed[:, 1:].reshape(4, 4, 32).permute(2, 0, 1)[None]
    resized = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)
    assert state["pos_embed"].shape == (1, 37, 32)
    assert state["pos_embed"][:, 0].equal(pos_embed[:, 0])
    torch.testing.assert_close(state["pos_embed"][0, 1:], resized[0].flatten(1).T)
    same = {"pos_embed": pos_embed.clone()}
    interpolate_pos_embed(tiny_vit(), same)
    assert same["pos_embed"].equal(pos_embed) and len(caplog.messages) == 1
