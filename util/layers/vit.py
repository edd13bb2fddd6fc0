"""What MAE, CrossMAE and the classifier share: the Vision Transformer backbone, and the sizes.

Vision Transformer: arXiv 2010.11929. Masked autoencoders: arXiv 2111.06377.
Shapes: B images, L patches, V visible, P predicted, N tokens, D encoder width, E decoder width,
C channels, p patch size.
"""

from typing import NamedTuple

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from util.layers.attention import AttentionBackend
from util.layers.blocks import Block, CrossAttentionBlock, LayerNorm, PatchEmbed
from util.layers.masking import Masking, num_visible_and_predicted, random_masking
from util.layers.patchify import gather_patches, normalize_patches, patchify, unpatchify
from util.pos_embed import get_2d_sincos_pos_embed

SMALL = dict(patch_size=16, embed_dim=384, depth=12, num_heads=6)
BASE = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12)
LARGE = dict(patch_size=16, embed_dim=1024, depth=24, num_heads=16)
HUGE = dict(patch_size=14, embed_dim=1280, depth=32, num_heads=16)
MINI = dict(patch_size=4, embed_dim=128, depth=6, num_heads=4)  # for 32-pixel images

MAE_SMALL = dict(SMALL, decoder_embed_dim=256, decoder_num_heads=8, norm_layer=LayerNorm)
MAE_BASE = dict(BASE, decoder_embed_dim=512, decoder_num_heads=16, norm_layer=LayerNorm)
MAE_LARGE = dict(LARGE, decoder_embed_dim=512, decoder_num_heads=16, norm_layer=LayerNorm)
MAE_HUGE = dict(HUGE, decoder_embed_dim=512, decoder_num_heads=16, norm_layer=LayerNorm)
MAE_MINI = dict(MINI, decoder_embed_dim=64, decoder_num_heads=4, norm_layer=LayerNorm)


class Features(NamedTuple):
    """Encoder output for whole images."""

    cls: Tensor  # (B, D)
    patches: Tensor  # (B, L, D), raster order

    @property
    def mean(self) -> Tensor:
        """Mean over the patches (B, D)."""
        return self.patches.mean(dim=1)


class ViTBackbone(nn.Module):
    """Patch embedding and encoder blocks; subclasses add `cls_token` and `pos_embed`.

    They do so themselves because the published checkpoints differ in the order of these tensors.
    """

    kind: str  # "mae", "crossmae", "classifier" or "encoder"
    grad_checkpointing = False  # keep only block inputs and run each block again in backward
    has_unused_blocks = False  # whether the last encoder blocks get no gradient

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        norm_layer=nn.LayerNorm,
        attention_backend: AttentionBackend | None = None,
    ):
        """
        Args:
            img_size: side of the images, or their height and width.
            drop_path_rate: stochastic depth of the last block, rising linearly from 0.
        """
        super().__init__()
        self.embed_dim = embed_dim
        self.norm_layer = norm_layer
        self.block_options = dict(
            mlp_ratio=mlp_ratio,
            norm_layer=norm_layer,
            attention_backend=attention_backend or AttentionBackend(),
        )
        self.patch_embed = PatchEmbed(to_2tuple(img_size), patch_size, in_chans, embed_dim)
        drop_path = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, drop_path=rate, **self.block_options) for rate in drop_path
        )

    def embed(self, imgs: Tensor, ids: Tensor | None = None) -> Tensor:
        """Class token, then embedded patches: all (B, 1 + L, D), or those of ids (B, V)."""
        pos_embed = self.pos_embed[:, 1:] if ids is None else self.pos_embed[0, 1:][ids]
        x = self.patch_embed(imgs, ids) + pos_embed
        # From (1, D): the gradient of one image is then contiguous too, which DDP asks for.
        cls_token = (self.cls_token[0] + self.pos_embed[0, :1]).expand(x.shape[0], -1, -1)
        return torch.cat([cls_token.to(x.dtype), x], dim=1)

    def run_blocks(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) -> output of the last encoder block (B, N, D)."""
        for block in self.blocks:
            x = self.run_block(block, x)
        return x

    def run_block(self, block: nn.Module, *inputs) -> Tensor:
        """block(*inputs), through activation checkpointing if that is on."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def weights_to_cast(self) -> dict[str, nn.Parameter]:
        """Trained weights of the blocks' linear layers by name; see util.casts.CastWeights.

        Empty where a compiler fuses the casts, or blocks are recomputed and cast again.
        """
        if self.grad_checkpointing or any(m._compiled_call_impl for m in self.modules()):
            return {}
        return {
            f"{block_name}.{linear_name}.{param_name}": param
            for block_name, block in self.named_modules()
            if isinstance(block, Block | CrossAttentionBlock)
            for linear_name, linear in block.named_modules()
            if isinstance(linear, nn.Linear)
            for param_name, param in linear.named_parameters()
            if param.requires_grad
        }

    def set_recompute(self, policy: str) -> None:
        """Choose what backward computes again instead of keeping it.

        Args:
            policy: "none"; "gelu": GELU, and the stack of CrossMAE's feature maps; "all": LayerNorm
                too; "blocks": whole blocks, and that stack.
        """
        self.grad_checkpointing = policy == "blocks"
        for module in self.modules():
            if hasattr(module, "recompute"):
                module.recompute = policy

    def forward_features(self, imgs: Tensor) -> Features:
        """Features of whole images, nothing masked: imgs (B, C, H, W).

        The output of the last block, normalized where the model has a `norm`.
        """
        x = self.run_blocks(self.embed(imgs))
        x = getattr(self, "norm", nn.Identity())(x)
        return Features(x[:, 0], x[:, 1:])


class Encoder(ViTBackbone):
    """The encoder of a model, without decoder or head; `forward` returns its Features."""

    kind = "encoder"

    def __init__(self, model: ViTBackbone):
        """
        Args:
            model: whose modules and parameters these are.
        """
        nn.Module.__init__(self)  # not ViTBackbone's, which would build new blocks
        self.embed_dim = model.embed_dim
        self.cls_token, self.pos_embed = model.cls_token, model.pos_embed
        self.patch_embed, self.blocks = model.patch_embed, model.blocks
        if hasattr(model, "norm"):
            self.norm = model.norm

    def forward(self, imgs: Tensor) -> Features:
        """imgs (B, C, H, W), nothing masked."""
        return self.forward_features(imgs)


class MaskedAutoencoder(ViTBackbone):
    """What both pre-training models share: fixed position embeddings, masking, pixel target.

    A subclass adds its tokens and decoder blocks, then calls `add_prediction_head` and
    `initialize_weights`.
    """

    def __init__(self, decoder_embed_dim: int = 512, norm_pix_loss: bool = False, **backbone):
        """
        Args:
            norm_pix_loss: predict pixels normalized within each patch.
            backbone: arguments of ViTBackbone.
        """
        super().__init__(**backbone)
        self.decoder_embed_dim = decoder_embed_dim
        self.norm_pix_loss = norm_pix_loss

    def new_token(self, dim: int) -> nn.Parameter:
        """A token (1, 1, dim), filled by `initialize_weights`."""
        return nn.Parameter(torch.zeros(1, 1, dim))

    def new_pos_embed(self, dim: int) -> nn.Parameter:
        """Fixed sine-cosine position embedding (1, 1 + L, dim), zero for the class token."""
        pos_embed = get_2d_sincos_pos_embed(dim, self.patch_embed.grid_size, cls_token=True)
        return nn.Parameter(pos_embed.unsqueeze(0), requires_grad=False)

    def add_prediction_head(self) -> None:
        """Last layers of the decoder."""
        patch_pixels = self.patch_embed.patch_size**2 * self.patch_embed.proj.in_channels
        self.decoder_norm = self.norm_layer(self.decoder_embed_dim)
        self.decoder_pred = nn.Linear(self.decoder_embed_dim, patch_pixels)

    def initialize_weights(self) -> None:
        """Initialize linear layers and tokens; called last, when all of them exist."""
        self.apply(init_xavier)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def draw_masking(
        self, imgs: Tensor, mask_ratio: float, kept_mask_ratio: float, noise: Tensor | None
    ) -> Masking:
        """Random masking of these images; noise (B, L) replaces the random draw."""
        num_patches = self.patch_embed.num_patches
        counts = num_visible_and_predicted(num_patches, mask_ratio, kept_mask_ratio)
        if noise is None:
            noise = torch.rand(len(imgs), num_patches, device=imgs.device)
        return random_masking(noise, *counts)

    def pixel_target(self, imgs: Tensor, ids_pred: Tensor) -> Tensor:
        """Pixels to predict at ids_pred (B, P), in float32: (B, P, p*p*C)."""
        target = gather_patches(imgs, ids_pred, self.patch_embed.patch_size)  # (B, P, C, p, p)
        target = target.permute(0, 1, 3, 4, 2).flatten(2).float()
        return normalize_patches(target) if self.norm_pix_loss else target

    def patchify(self, imgs: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, L, p*p*C)."""
        return patchify(imgs, self.patch_embed.patch_size)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """(B, L, p*p*C) -> (B, C, H, W)."""
        return unpatchify(patches, self.patch_embed.patch_size, self.patch_embed.grid_size)


def init_xavier(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases of linear layers, as in the published models."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)  # a fused projection counts as one matrix
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def compile_model(model: nn.Module, what: str = "blocks", **options) -> None:
    """torch.compile every transformer block, or the whole model, in place.

    Blocks of one kind share one compiled program, and names in the state dict stay the same.

    Args:
        what: "blocks", or "whole": one program, without a part that is not compiled.
        options: of torch.compile.
    """
    torch._dynamo.config.optimize_ddp = False  # it would split programs at DDP's buckets
    if what == "whole":
        model.compile(fullgraph=True, **options)
        return
    for module in model.modules():
        if isinstance(module, Block | CrossAttentionBlock):
            module.compile(**options)
