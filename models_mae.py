"""MAE, the baseline: masked autoencoder with a self-attention decoder (arXiv 2111.06377).

Shapes: B images, L patches, V visible, P predicted, D encoder width, E decoder width, C channels,
p patch size. The decoder runs on all L patches; only masked ones enter the loss.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.layers.blocks import Block
from util.layers.masking import Masking, gather_tokens
from util.layers.vit import MAE_BASE, MAE_HUGE, MAE_LARGE, MAE_MINI, MAE_SMALL, MaskedAutoencoder


class MAE(MaskedAutoencoder):
    """Pre-training model; `forward` returns the loss."""

    kind = "mae"

    def __init__(self, *, decoder_depth: int = 8, decoder_num_heads: int = 16, **backbone):
        """
        Args:
            backbone: arguments of MaskedAutoencoder and ViTBackbone.
        """
        super().__init__(**backbone)
        D, E = self.embed_dim, self.decoder_embed_dim
        self.cls_token, self.pos_embed = self.new_token(D), self.new_pos_embed(D)
        self.mask_token, self.decoder_pos_embed = self.new_token(E), self.new_pos_embed(E)
        self.norm = self.norm_layer(D)
        self.decoder_embed = nn.Linear(D, E)
        self.decoder_blocks = nn.ModuleList(
            Block(E, decoder_num_heads, **self.block_options) for _ in range(decoder_depth)
        )
        self.add_prediction_head()
        self.initialize_weights()

    def forward_encoder(self, imgs: Tensor, masking: Masking) -> Tensor:
        """imgs (B, C, H, W) -> class token and visible patches (B, 1 + V, D)."""
        return self.norm(self.run_blocks(self.embed(imgs, masking.ids_keep)))

    def forward_decoder(self, x: Tensor, masking: Masking) -> Tensor:
        """(B, 1 + V, D) -> predicted pixels of all patches (B, L, p*p*C)."""
        x = self.decoder_embed(x)  # (B, 1 + V, E)
        cls_token, visible = x[:, :1], x[:, 1:]
        num_masked = masking.order.shape[1] - visible.shape[1]
        masked = self.mask_token.to(x.dtype).expand(len(x), num_masked, -1)  # (B, L - V, E)
        x = torch.cat([visible, masked], dim=1)  # (B, L, E), in the random order
        x = gather_tokens(x, masking.ids_restore)  # (B, L, E), in raster order
        x = torch.cat([cls_token, x], dim=1) + self.decoder_pos_embed  # (B, 1 + L, E)
        for block in self.decoder_blocks:
            x = self.run_block(block, x)  # (B, 1 + L, E)
        x = self.decoder_norm(x)  # (B, 1 + L, E)
        return self.decoder_pred(x)[:, 1:]  # (B, L, p*p*C)

    def forward_loss(self, imgs: Tensor, pred: Tensor, masking: Masking) -> Tensor:
        """Mean squared error over the masked patches: pred (B, L, p*p*C) -> scalar."""
        ids_pred = masking.ids_pred
        target = self.pixel_target(imgs, ids_pred)
        return F.mse_loss(gather_tokens(pred, ids_pred).float(), target)

    def forward(
        self,
        imgs: Tensor,
        mask_ratio: float = 0.75,
        kept_mask_ratio: float | None = None,
        vis: bool = False,
        noise: Tensor | None = None,
    ):
        """Loss of imgs (B, C, H, W).

        Args:
            mask_ratio: fraction of the patches that is masked, and predicted.
            kept_mask_ratio: no effect; this decoder predicts every masked patch.
            vis: return (loss, pred, target, mask) instead: pred and target (B, L, p*p*C) of all
                patches; mask (B, L), 1 at masked patches.
            noise: (B, L), replaces the random draw; patches with the smallest values are visible.
        """
        masking = self.draw_masking(imgs, mask_ratio, mask_ratio, noise)
        pred = self.forward_decoder(self.forward_encoder(imgs, masking), masking)
        loss = self.forward_loss(imgs, pred, masking)
        if not vis:
            return loss
        all_patches = torch.arange(pred.shape[1], device=imgs.device).expand(len(imgs), -1)
        return loss, pred, self.pixel_target(imgs, all_patches), masking.mask


MaskedAutoencoderViT = MAE  # the name that MAE-style scripts import

mae_vit_mini_patch4 = partial(MAE, **MAE_MINI)
mae_vit_small_patch16 = partial(MAE, **MAE_SMALL)
mae_vit_base_patch16 = partial(MAE, **MAE_BASE)
mae_vit_large_patch16 = partial(MAE, **MAE_LARGE)
mae_vit_huge_patch14 = partial(MAE, **MAE_HUGE)
# the longer names that MAE-style scripts use for the same models
mae_vit_small_patch16_dec512d8b = mae_vit_small_patch16
mae_vit_base_patch16_dec512d8b = mae_vit_base_patch16
mae_vit_large_patch16_dec512d8b = mae_vit_large_patch16
mae_vit_huge_patch14_dec512d8b = mae_vit_huge_patch14
