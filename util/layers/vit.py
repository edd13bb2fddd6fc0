"""What MAE, CrossMAE and the classifier share: the Vision Transformer trunk, and the sizes.

Vision Transformer: arXiv 2010.11929. Masked autoencoders: arXiv 2111.06377.
Letters: B images, L patches, V visible, P predicted, N tokens, D encoder width, E decoder width,
C channels, p patch size.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from util.layers.attention import AttentionBackend
from util.layers.blocks import Block, LayerNorm, PatchEmbed
from util.layers.masking import Masking, num_visible_and_predicted, random_masking
from util.layers.patchify import gather_patches, normalize_patches, patchify, unpatchify
from util.pos_embed import get_2d_sincos_pos_embed

SMALL = dict(patch_size=16, embed_dim=384, depth=12, num_heads=6)
BASE = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12)
LARGE = dict(patch_size=16, embed_dim=1024, depth=24, num_heads=16)
HUGE = dict(patch_size=14, embed_dim=1280, depth=32, num_heads=16)
MINI = dict(patch_size=4, embed_dim=128, depth=6, num_heads=4)  # for 32-pixel pictures

MAE_SMALL = dict(SMALL, decoder_embed_dim=256, decoder_num_heads=8, norm_layer=LayerNorm)
MAE_BASE = dict(BASE, decoder_embed_dim=512, decoder_num_heads=16, norm_layer=LayerNorm)
MAE_LARGE = dict(LARGE, decoder_embed_dim=512, decoder_num_heads=16, norm_layer=LayerNorm)
MAE_HUGE = dict(HUGE, decoder_embed_dim=512, decoder_num_heads=16, norm_layer=LayerNorm)
MAE_MINI = dict(MINI, decoder_embed_dim=64, decoder_num_heads=4, norm_layer=LayerNorm)


class Features(NamedTuple):
    """What an encoder makes of whole pictures."""

    cls: Tensor  # (B, D)
    patches: Tensor  # (B, L, D), raster order

    @property
    def mean(self) -> Tensor:
        """Mean over the patches (B, D)."""
        return self.patches.mean(dim=1)


class ViTBackbone(nn.Module):
    """Patch embedding, class token, positions and encoder blocks."""

    kind: str  # "mae", "crossmae" or "classifier"
    grad_checkpointing = False  # keep only block inputs and run each block again in backward

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        norm_layer,
        attention_backend: AttentionBackend | None,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.attention_backend = attention_backend or AttentionBackend()
        self.embed_dim = embed_dim
        patch_embed = PatchEmbed(to_2tuple(img_size), patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patch_embed.num_patches, embed_dim))
        self.patch_embed = patch_embed
        drop_path = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, self.attention_backend, norm_layer, drop_path[i])
            for i in range(depth)
        )

    def embed(self, imgs: Tensor, ids: Tensor | None = None) -> Tensor:
        """Class token, then patches with positions: all (B, 1 + L, D), or those of ids (B, V)."""
        positions = self.pos_embed[:, 1:] if ids is None else self.pos_embed[0, 1:][ids]
        x = self.patch_embed(imgs, ids) + positions
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        return torch.cat([cls_token.to(x.dtype), x], dim=1)

    def run_blocks(self, x: Tensor, number: int | None = None) -> Iterator[Tensor]:
        """Output of each encoder block in turn, (B, N, D); of the first `number` of them."""
        for block in self.blocks[:number]:
            x = self.run(block, x)
            yield x

    def run(self, block: nn.Module, *inputs) -> Tensor:
        """block(*inputs), through activation checkpointing if that is on."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def forward_features(self, imgs: Tensor) -> Features:
        """Features of whole pictures, nothing masked: imgs (B, C, H, W).

        The outputs of the last block, through `norm` where the model has one.
        """
        *_, x = self.run_blocks(self.embed(imgs))
        x = getattr(self, "norm", nn.Identity())(x)
        return Features(x[:, 0], x[:, 1:])


class MaskedAutoencoder(ViTBackbone):
    """What both pre-training models share: fixed position tables, mask token, pixel target, start
    values.

    A subclass builds its decoder blocks, then calls `add_prediction_head`.
    """

    def __init__(self, *, decoder_embed_dim: int, norm_pix_loss: bool, **backbone):
        """
        Args:
            backbone: what ViTBackbone takes.
        """
        super().__init__(**backbone)
        self.norm_pix_loss = norm_pix_loss
        grid = self.patch_embed.grid_size
        table = get_2d_sincos_pos_embed(self.embed_dim, grid, cls_token=True)
        decoder_table = get_2d_sincos_pos_embed(decoder_embed_dim, grid, cls_token=True)
        self.pos_embed = nn.Parameter(table.unsqueeze(0), requires_grad=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(decoder_table.unsqueeze(0), requires_grad=False)

    def add_prediction_head(self, decoder_embed_dim: int, norm_layer) -> None:
        """Last layers of the decoder; then the start values of the whole model."""
        patch_pixels = self.patch_embed.patch_size**2 * self.patch_embed.proj.in_channels
        self.decoder_norm = norm_layer(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_pixels)
        self.apply(initialize)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def draw_masking(
        self, imgs: Tensor, mask_ratio: float, kept_mask_ratio: float, noise: Tensor | None
    ) -> Masking:
        """Random masking of these pictures; noise (B, L) replaces the random draw."""
        num_patches = self.patch_embed.num_patches
        counts = num_visible_and_predicted(num_patches, mask_ratio, kept_mask_ratio)
        if noise is None:
            noise = torch.rand(len(imgs), num_patches, device=imgs.device)
        return random_masking(noise, *counts)

    def pixel_target(self, imgs: Tensor, ids_pred: Tensor) -> Tensor:
        """What the decoder should predict at ids_pred (B, P), in float32: (B, P, p*p*C)."""
        target = gather_patches(imgs, ids_pred, self.patch_embed.patch_size)  # (B, P, C, p, p)
        target = target.permute(0, 1, 3, 4, 2).flatten(2).float()
        return normalize_patches(target) if self.norm_pix_loss else target

    def patchify(self, imgs: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, L, p*p*C)."""
        return patchify(imgs, self.patch_embed.patch_size)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """(B, L, p*p*C) -> (B, C, H, W)."""
        return unpatchify(patches, self.patch_embed.patch_size, self.patch_embed.grid_size)


def initialize(module: nn.Module) -> None:
    """Start values of the pre-training models: Xavier uniform weights, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)  # fused projections count as one matrix
        if module.bias is not None:
            nn.init.zeros_(module.bias)
