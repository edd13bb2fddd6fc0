"""Where the decoder's predicted patches attend to, recomputed and drawn.

Notation: B images, L patches, V visible, P predicted, N query tokens, M key tokens, H heads, d head
width, J decoder blocks.
"""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from util.layers.masking import gather_tokens
from util.vis import figures
from util.vis.figures import DPI, GAP, LINE
from util.vis.reconstruction import GRAY, choose_kept_mask_ratio, draw_noise, patch_area

READ = ("visible", "masked", "class token")  # what a decoder may attend to
COLORS = colormaps["magma"].with_extremes(bad=[GRAY / 255] * 3)  # gray: not readable
FRAME, FRAME_WIDTH = "cyan", 1.0  # of the query patch, in points
WIDTH = int(7 * DPI)  # pixels that a row of maps takes at most, unless there are many blocks
TILE_SIDE = int(1.1 * DPI)  # pixels of one map, at most
MIN_SIDE = 8  # pixels of a patch in a map, at least


class DecoderAttention(NamedTuple):
    """Attention of the predicted patches, mean over heads."""

    weights: Tensor  # (J, B, P, 1 + L): class token first, then patches; 0 where nothing is read
    ids_pred: Tensor  # (B, P)
    visible: Tensor  # (B, L) bool

    @property
    def mass(self) -> Tensor:
        """Fraction of a predicted patch's attention that goes to each of READ, mean over patches
        and images: (3, J), every column sums to 1.
        """
        cls, patches = self.weights[..., 0], self.weights[..., 1:]
        is_visible = self.visible.unsqueeze(1)
        parts = ((patches * is_visible).sum(-1), (patches * ~is_visible).sum(-1), cls)
        return torch.stack(parts).mean((2, 3))


@torch.no_grad()
def read_attention(
    model: nn.Module, imgs: Tensor, noise: Tensor, mask_ratio: float, kept_mask_ratio: float
) -> DecoderAttention:
    """Attention of every decoder block on imgs (B, C, H, W), masked by noise (B, L).

    Recomputed from the queries and keys of the model's own layers; the model runs unchanged.
    CrossMAE's queries attend to the class token and visible patches, MAE's to all patches.
    """
    masking = model.draw_masking(imgs, mask_ratio, kept_mask_ratio, noise)
    is_cross = model.kind == "crossmae"
    layers = [block.cross_attn if is_cross else block.attn for block in model.decoder_blocks]
    projections = [p for x in layers for p in ((x.q, x.kv) if is_cross else (x.qkv,))]
    with catch_outputs(projections) as outputs:
        model(imgs, mask_ratio, kept_mask_ratio, noise=noise)
    weights = [attention_weights(x, outputs, is_cross).mean(1) for x in layers]  # (B, N, M) each
    if is_cross:
        weights = [scatter_columns(w, masking.ids_keep, masking.order.shape[1]) for w in weights]
    else:
        weights = [gather_tokens(w, 1 + masking.ids_pred) for w in weights]
    visible = torch.zeros_like(masking.mask).scatter_(1, masking.ids_keep, 1).bool()
    return DecoderAttention(torch.stack(weights), masking.ids_pred, visible)


@contextlib.contextmanager
def catch_outputs(modules: Sequence[nn.Module]):
    """The outputs of modules that run meanwhile, {module: tensor}."""
    outputs = {}

    def keep(module, inputs, output):
        outputs[module] = output

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def attention_weights(layer: nn.Module, outputs: dict[nn.Module, Tensor], is_cross: bool) -> Tensor:
    """softmax(q k^T / sqrt(d)) from the outputs of the layer's projections: (B, H, N, M)."""
    if is_cross:
        q = outputs[layer.q].unflatten(2, (layer.num_heads, -1))
        k, _ = outputs[layer.kv].unflatten(2, (2, layer.num_heads, -1)).unbind(2)
    else:
        q, k, _ = outputs[layer.qkv].unflatten(2, (3, layer.num_heads, -1)).unbind(2)
    logits = torch.einsum("bnhd,bmhd->bhnm", q.float(), k.float())
    return (logits / q.shape[-1] ** 0.5).softmax(dim=-1)


def scatter_columns(weights: Tensor, ids_keep: Tensor, num_patches: int) -> Tensor:
    """Columns of the visible patches to their positions: (B, P, 1 + V) -> (B, P, 1 + L)."""
    columns = torch.cat([torch.zeros_like(ids_keep[:, :1]), 1 + ids_keep], dim=1).unsqueeze(1)
    full = weights.new_zeros(*weights.shape[:2], 1 + num_patches)
    return full.scatter_(2, columns.expand_as(weights), weights)


def draw_attention(
    model: nn.Module,
    imgs: Tensor,
    args,
    mask_ratios: Sequence[float] | None = None,
    kept_mask_ratio: float | None = None,
    seed: int = 0,
    caption: str = "",
    num_patches: int = 3,
) -> Figure:
    """Attention of predicted patches: one row per patch, one column per decoder block.

    Above the rows, the fraction of attention that goes to each of READ. Arguments and errors are
    those of util.vis.reconstruction.draw_reconstructions; num_patches predicted patches of each
    image are drawn, spread evenly over its raster order.
    """
    noise = draw_noise(model, len(imgs), seed).to(imgs.device)
    windows = figures.choose_windows(imgs, args.mean, args.std)
    pixels = figures.to_rgb(imgs, args.mean, args.std, windows)
    grid = model.patch_embed.grid_size
    tile = min(TILE_SIDE, WIDTH // (1 + len(model.decoder_blocks)) - GAP)
    side = max(MIN_SIDE, tile // max(grid))  # of a patch
    figure, top = figures.new_figure(), 0
    for mask_ratio in mask_ratios or [args.mask_ratio]:
        kept = choose_kept_mask_ratio(model, args, mask_ratio, kept_mask_ratio)
        attention = read_attention(model, imgs, noise, mask_ratio, kept)
        top = add_summary(figure, attention, mask_ratio, grid[1] * side + GAP, top)
        weights = attention.weights[..., 1:]
        if model.kind == "crossmae":
            weights = weights.masked_fill(~attention.visible.unsqueeze(1), torch.nan)
        maps = weights.cpu().unflatten(-1, grid).numpy()  # (J, B, P, rows, columns)
        area = patch_area(attention.visible, grid, pixels.shape[1] // grid[0])
        masked = np.where(area[..., None], pixels, np.uint8(GRAY))
        num_predicted = maps.shape[2]
        count = min(num_patches, num_predicted)
        for i, image in enumerate(masked):
            for j in range(count):
                query = (2 * j + 1) * num_predicted // (2 * count)
                place = divmod(attention.ids_pred[i, query].item(), grid[1])
                add_maps(figure, image, maps[:, i, query], place, side, top)
                top += grid[0] * side + LINE  # room for the labels of the color bars
        top += 2 * GAP
    return figures.fit(figure, caption, *notes(model), figures.windows_note(windows))


def add_summary(
    figure: Figure, attention: DecoderAttention, mask_ratio: float, pitch: int, top: int
) -> int:
    """Draw the fraction of attention that goes to each of READ as a heat map above the maps.

    pitch is the pixels from one column of maps to the next; column 0 is that of the image. Returns
    the top of the first row of maps.
    """
    mass = attention.mass.cpu()
    num_blocks, height = mass.shape[1], 3 * LINE // 2
    sums = ", ".join(f"{x:.2f} {name}" for name, x in zip(READ, mass.sum(1), strict=True))
    text = (
        f"Mask ratio {mask_ratio:g}: fraction of attention, mean over all "
        f"{attention.ids_pred.numel()} predicted patches; sum over blocks: {sums}"
    )
    top = figures.add_text(figure, text, 0, top, (1 + num_blocks) * pitch) + 2 * LINE
    names = READ, [f"block {j + 1}" for j in range(num_blocks)]
    options = dict(cmap=COLORS, vmin=0, vmax=1, texts=np.char.mod("%.2f", mass.numpy()))
    place = pitch - GAP // 2, top, pitch, height
    axes = figures.add_heat_map(figure, mass.numpy(), *place, names, "fraction", **options)
    axes.xaxis.tick_top()
    return top + len(READ) * height + GAP


def add_maps(
    figure: Figure, image: np.ndarray, maps: np.ndarray, query: tuple[int, int], side: int, top: int
) -> None:
    """One row: a masked image (H, W, 3) and what one of its patches attends to, with a color bar.

    maps are (J, rows, columns) of patches, NaN if not readable; query is the row and column of the
    framed patch, side the pixels of a patch.
    """
    rows, columns = maps.shape[1:]
    size = columns * side, rows * side
    pitch = size[0] + GAP
    colors = dict(cmap=COLORS, vmin=0, vmax=np.nanmax(maps))
    extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)  # in patches, like the maps
    tiles = [figures.add_image(figure, image, 0, top, *size, extent=extent, interpolation="auto")]
    for j, values in enumerate(maps):
        tiles.append(figures.add_image(figure, values, (1 + j) * pitch, top, *size, **colors))
    margin = 0.5 + 0.5 * FRAME_WIDTH / 72 * DPI / side  # the frame is outside the patch
    for axes in tiles:
        corner = query[1] - margin, query[0] - margin
        line = dict(fill=False, edgecolor=FRAME, linewidth=FRAME_WIDTH, clip_on=False)
        axes.add_patch(Rectangle(corner, 2 * margin, 2 * margin, **line))
    figures.add_colorbar(figure, axes.images[0], len(tiles) * pitch + GAP // 2, top, size[1])


def notes(model: nn.Module) -> list[str]:
    """What a reader has to know, one sentence each."""
    found = [
        "Attention of predicted patches (framed) in each decoder block, mean over heads. First "
        "column: the masked image. Color bars: attention to one patch, on one scale per row."
    ]
    if model.kind == "crossmae":
        found.append("Gray: masked patches, which this decoder does not attend to.")
        if model.decoder_blocks[0].has_self_attn:
            found.append("Its self-attention between predicted patches is not shown.")
    return found
