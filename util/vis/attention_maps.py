"""What a decoder reads: the attention of predicted patches, recomputed and drawn.

Letters: B images, L patches, V visible, P predicted, N query tokens, M key tokens, H heads, d head
width, J decoder blocks.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from util.layers.masking import gather_tokens
from util.vis.figures import (
    GREY,
    TILE_SIDE,
    Page,
    color,
    enlarge,
    fit,
    heat_map,
    outline,
    patch_area,
    to_rgb,
)
from util.vis.reconstruction import draw_noise, predicts_a_part, share_to_predict

READ = ("visible", "masked", "class token")  # what a decoder may attend to
MIN_SIDE = 4  # pixels of a patch in a map


class DecoderAttention(NamedTuple):
    """What the predicted patches read, mean over heads."""

    weights: Tensor  # (J, B, P, 1 + L): class token first, then patches; 0 where nothing is read
    ids_pred: Tensor  # (B, P)
    visible: Tensor  # (B, L) bool

    @property
    def mass(self) -> Tensor:
        """Share of a predicted patch's attention that goes to each of READ, mean over patches and
        pictures: (3, J), every column sums to 1.
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

    Recomputed from the queries and keys that the model's own layers give; the model runs unchanged.
    CrossMAE's queries read the class token and visible patches, MAE's all patches.
    """
    masking = model.draw_masking(imgs, mask_ratio, kept_mask_ratio, noise)
    is_cross = predicts_a_part(model)
    layers = [block.cross_attn if is_cross else block.attn for block in model.decoder_blocks]
    projections = [p for x in layers for p in ((x.q, x.kv) if is_cross else (x.qkv,))]
    with catch_outputs(projections) as outputs:
        model(imgs, mask_ratio, kept_mask_ratio, noise=noise)
    weights = [attention_weights(layer, outputs).mean(1) for layer in layers]  # (B, N, M) each
    if is_cross:
        weights = [spread(w, masking.ids_keep, masking.order.shape[1]) for w in weights]
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


def attention_weights(layer: nn.Module, outputs: dict[nn.Module, Tensor]) -> Tensor:
    """softmax(q k^T / sqrt(d)), written out: (B, H, N, M).

    Args:
        layer: util.layers.blocks.CrossAttention or Attention.
        outputs: what its projections gave.
    """
    if hasattr(layer, "qkv"):
        q, k, _ = outputs[layer.qkv].unflatten(2, (3, layer.num_heads, -1)).unbind(2)
    else:
        q = outputs[layer.q].unflatten(2, (layer.num_heads, -1))
        k, _ = outputs[layer.kv].unflatten(2, (2, layer.num_heads, -1)).unbind(2)
    logits = torch.einsum("bnhd,bmhd->bhnm", q.float(), k.float())
    return (logits / q.shape[-1] ** 0.5).softmax(dim=-1)


def spread(weights: Tensor, ids_keep: Tensor, num_patches: int) -> Tensor:
    """Columns of the visible patches to their places: (B, P, 1 + V) -> (B, P, 1 + L)."""
    columns = torch.cat([torch.zeros_like(ids_keep[:, :1]), 1 + ids_keep], dim=1).unsqueeze(1)
    full = weights.new_zeros(*weights.shape[:2], 1 + num_patches)
    return full.scatter_(2, columns.expand_as(weights), weights)


def attention_grid(
    model: nn.Module,
    imgs: Tensor,
    args,
    mask_ratios: Sequence[float] | None = None,
    kept_mask_ratio: float | None = None,
    seed: int = 0,
    title: str = "",
    num_patches: int = 3,
) -> Tensor:
    """What predicted patches read: one row per patch, one column per decoder block.

    Args:
        num_patches: predicted patches of each picture, spread evenly over its raster order.
        others: as for util.vis.reconstruction.reconstruction_grid.

    Raises:
        UserError: as there.
    """
    noise = draw_noise(model, len(imgs), seed).to(imgs.device)
    page = Page()
    if title:
        page.add_text(title)
    for note in notes(model):
        page.add_text(note)
    for mask_ratio in mask_ratios or [args.mask_ratio]:
        kept = share_to_predict(model, args, mask_ratio, kept_mask_ratio)
        attention = read_attention(model, imgs, noise, mask_ratio, kept)
        page.add_text(
            f"mask ratio {mask_ratio:g}: where the attention goes, mean over all "
            f"{attention.ids_pred.numel()} predicted patches; over the blocks it adds up to "
            + ", ".join(f"{x:.2f} {n}" for n, x in zip(READ, attention.mass.sum(1), strict=True))
        )
        blocks = [f"block {j + 1}" for j in range(len(attention.weights))]
        page.add_picture(heat_map(attention.mass, READ, blocks))
        for i, img in enumerate(to_rgb(imgs, args.mean, args.std)):
            for tiles, labels in attention_rows(model, img, attention, i, num_patches):
                page.add_tiles(tiles, labels)
    return page.draw()


def attention_rows(
    model: nn.Module, img: Tensor, attention: DecoderAttention, index: int, num_patches: int
) -> Iterator[tuple[list[Tensor], list[str]]]:
    """Tiles and labels for some predicted patches of picture `index`, uint8 (3, height, width)."""
    grid = model.patch_embed.grid_size
    side = max(MIN_SIDE, round(TILE_SIDE / max(grid)))
    area = patch_area(attention.visible[index : index + 1], grid, side)[0].cpu()
    masked = fit(img.cpu(), grid[0] * side, grid[1] * side).where(area, GREY)
    readable = area if predicts_a_part(model) else torch.ones_like(area)
    num_predicted = attention.ids_pred.shape[1]
    number = min(num_patches, num_predicted)
    for place in [(2 * i + 1) * num_predicted // (2 * number) for i in range(number)]:
        row, column = divmod(attention.ids_pred[index, place].item(), grid[1])
        tiles, labels = [masked], ["masked"]
        for j, weights in enumerate(attention.weights[:, index, place, 1:].cpu()):
            largest = weights.max().clamp(min=1e-12)
            heat = enlarge(color((weights / largest).unflatten(0, grid)), side)
            tiles.append(heat.where(readable, GREY))
            labels.append(f"block {j + 1}: {largest:.3f}")
        yield [outline(tile, row, column, side) for tile in tiles], labels


def notes(model: nn.Module) -> list[str]:
    """How the maps are to be read."""
    found = [
        "Attention of predicted patches (framed) in the decoder, mean over heads. In each map, "
        "black is 0 and the brightest colour the number above it."
    ]
    if predicts_a_part(model):
        found.append("Grey patches are hidden: this decoder reads visible patches only.")
    if getattr(model.decoder_blocks[0], "has_self_attn", False):
        found.append("Its self-attention between predicted patches is not drawn.")
    return found
