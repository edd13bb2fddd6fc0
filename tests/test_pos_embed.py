"""Sine-cosine tables and the resizing of learned ones."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity_data import FOLDER, assert_match, find_case
from safetensors.torch import load_file

from util.pos_embed import get_2d_sincos_pos_embed, interpolate_pos_embed

TABLES = find_case("posembed", "posembed")["tables"]


@pytest.mark.parametrize("table", TABLES, ids=lambda t: f"{t['dim']}-{t['grid']}")
def test_stored_rows(table):
    """Chosen rows, or the full table, and its sums."""
    stored = load_file(FOLDER / "posembed.safetensors")
    ours = get_2d_sincos_pos_embed(table["dim"], table["grid"], cls_token=True)
    assert ours.dtype == torch.float32 and list(ours.shape) == table["shape"]
    kind, rows = ("full", slice(None)) if table.get("full") else ("rows", table["rows"])
    assert_match(ours[rows], stored[f"{kind}_{table['dim']}_{table['grid']}"], "table", 1e-5, 0)
    if "sum" in table:
        exact = ours.double()
        sums = {"sum": exact.sum(), "sum_abs": exact.abs().sum(), "sum_sq": (exact**2).sum()}
        for name, value in sums.items():
            assert_match(value.item(), table[name], "sums of the table", 1e-6 * exact.numel(), 0)


@pytest.mark.parametrize("grid", [3, (2, 5)])
def test_formula_entry_by_entry(grid):
    """Column first, then row; square and oblong grids, without and with the class row."""
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    table = get_2d_sincos_pos_embed(8, grid)
    assert table.shape == (rows * columns, 8)
    for r in range(rows):
        for c in range(columns):
            waves = [f(x * w) for x in (c, r) for f in (math.sin, math.cos) for w in (1, 0.01)]
            np.testing.assert_allclose(table[r * columns + c], waves, atol=1e-7)
    with_cls = get_2d_sincos_pos_embed(8, grid, cls_token=True)
    assert with_cls[0].eq(0).all() and with_cls[1:].equal(table)


def test_width_must_divide_by_four():
    with pytest.raises(ValueError, match="divisible by 4"):
        get_2d_sincos_pos_embed(10, 2)


def test_interpolation_changes_the_dict_in_place(tiny_vit):
    """Bicubic over the patch rows, class row kept; equal grids leave the table alone."""
    model = tiny_vit(img_size=48)
    table = torch.randn(1, 17, 32, generator=torch.Generator().manual_seed(0))
    state = {"pos_embed": table.clone()}
    interpolate_pos_embed(model, state)
    picture = table[:, 1:].reshape(4, 4, 32).permute(2, 0, 1)[None]
    resized = F.interpolate(picture, size=(6, 6), mode="bicubic", align_corners=False)
    assert state["pos_embed"].shape == (1, 37, 32)
    assert state["pos_embed"][:, 0].equal(table[:, 0])
    torch.testing.assert_close(state["pos_embed"][0, 1:], resized[0].flatten(1).T)
    same = {"pos_embed": table.clone()}
    interpolate_pos_embed(tiny_vit(), same)
    assert same["pos_embed"].equal(table)
