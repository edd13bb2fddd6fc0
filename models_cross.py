"""CrossMAE: masked autoencoder with a cross-attention decoder (arXiv 2401.14391).

A decoder query is the position of a masked patch. It attends to feature maps of the encoder and to
no other query, so any fraction of the masked patches can be predicted.

Shapes: B images, L patches, V visible, P predicted, D encoder width, E decoder width, K feature
maps, J decoder blocks, C channels, p patch size.
"""

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from util.io.errors import UserError
from util.layers.blocks import CrossAttentionBlock
from util.layers.masking import Masking
from util.layers.mix import mix
from util.layers.vit import MAE_BASE, MAE_HUGE, MAE_LARGE, MAE_MINI, MAE_SMALL, MaskedAutoencoder


class WeightedFeatureMaps(nn.Module):
    """For each decoder block, a learned weighted sum of the encoder's feature maps."""

    recompute = "none"

    def __init__(self, num_maps: int, decoder_depth: int):
        super().__init__()
        self.linear = nn.Linear(num_maps, decoder_depth, bias=False)  # weight (J, K)

    def forward(self, maps: Sequence[Tensor]) -> Sequence[Tensor]:
        """K maps (B, N, D) of one shape -> J weighted sums (B, N, D)."""
        return mix(self.linear.weight, list(maps), self.recompute != "none")


class CrossMAE(MaskedAutoencoder):
    """Pre-training model; `forward` returns the loss."""

    kind = "crossmae"

    def __init__(
        self,
        *,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        weight_fm: bool = False,
        use_fm: Sequence[int] = (-1,),
        use_input: bool = False,
        self_attn: bool = False,
        **backbone,
    ):
        """
        Args:
            weight_fm: every decoder block attends to its own weighted sum of feature maps; without
                it, all attend to the normalized output of the last encoder block.
            use_fm: encoder blocks whose outputs are summed, negative from the end; -1 alone means
                all.
            use_input: the encoder's input tokens are one more feature map, the first.
            self_attn: queries also attend to each other.
            backbone: arguments of MaskedAutoencoder and ViTBackbone.
        """
        super().__init__(**backbone)
        D, E = self.embed_dim, self.decoder_embed_dim
        self.cls_token, self.mask_token = self.new_token(D), self.new_token(E)
        self.pos_embed, self.decoder_pos_embed = self.new_pos_embed(D), self.new_pos_embed(E)
        self.weight_fm = weight_fm
        self.use_input = use_input
        self.use_fm = resolve_feature_maps(use_fm, len(self.blocks))
        self.has_unused_blocks = weight_fm and self.use_fm[-1] < len(self.blocks) - 1
        if weight_fm:
            self.dec_norms = nn.ModuleList(self.norm_layer(D) for _ in range(decoder_depth))
            self.wfm = WeightedFeatureMaps(len(self.use_fm) + use_input, decoder_depth)
        else:
            self.norm = self.norm_layer(D)
        self.decoder_blocks = nn.ModuleList(
            CrossAttentionBlock(E, D, decoder_num_heads, self_attn=self_attn, **self.block_options)
            for _ in range(decoder_depth)
        )
        self.add_prediction_head()
        self.initialize_weights()

    def forward_encoder(self, imgs: Tensor, masking: Masking) -> Sequence[Tensor]:
        """imgs (B, C, H, W) -> the context of each of the J decoder blocks, (B, 1 + V, D).

        With weight_fm these are weighted sums, which `dec_norms` still have to normalize.
        """
        x = self.embed(imgs, masking.ids_keep)
        if not self.weight_fm:
            return [self.norm(self.run_blocks(x))] * len(self.decoder_blocks)
        maps = [x] if self.use_input else []
        for i, block in enumerate(self.blocks[: self.use_fm[-1] + 1]):  # no map needs later blocks
            x = self.run_block(block, x)  # (B, 1 + V, D)
            if i in self.use_fm:
                maps.append(x)
        return self.wfm(maps)

    def forward_decoder(self, contexts: Sequence[Tensor], masking: Masking) -> Tensor:
        """J contexts (B, 1 + V, D) -> predicted pixels of the predicted patches (B, P, p*p*C)."""
        x = self.decoder_pos_embed[0, 1:][masking.ids_pred] + self.mask_token  # (B, P, E)
        norms = self.dec_norms if self.weight_fm else [None] * len(self.decoder_blocks)
        for block, context, norm in zip(self.decoder_blocks, contexts, norms, strict=True):
            x = self.run_block(block, x, context, norm)  # (B, P, E)
        x = self.decoder_norm(x)  # (B, P, E)
        return self.decoder_pred(x)  # (B, P, p*p*C)

    def forward_loss(self, imgs: Tensor, pred: Tensor, masking: Masking) -> Tensor:
        """Mean squared error over the predicted patches: pred (B, P, p*p*C) -> scalar."""
        target = self.pixel_target(imgs, masking.ids_pred)
        return F.mse_loss(pred.float(), target)

    def forward(
        self,
        imgs: Tensor,
        mask_ratio: float = 0.75,
        kept_mask_ratio: float = 0.75,
        vis: bool = False,
        noise: Tensor | None = None,
    ):
        """Loss of imgs (B, C, H, W).

        Args:
            mask_ratio: fraction of the patches that is masked.
            kept_mask_ratio: fraction of all patches that is predicted, at most mask_ratio.
            vis: return (loss, pred, target, mask) instead: pred and target (B, L, p*p*C), zero at
                patches that are not predicted; mask (B, L), 1 at those that are.
            noise: (B, L), replaces the random draw; patches with the smallest values are visible,
                those with the largest are predicted.
        """
        masking = self.draw_masking(imgs, mask_ratio, kept_mask_ratio, noise)
        pred = self.forward_decoder(self.forward_encoder(imgs, masking), masking)
        loss = self.forward_loss(imgs, pred, masking)
        if not vis:
            return loss
        target = self.pixel_target(imgs, masking.ids_pred)
        pred, target = (scatter_patches(x, masking) for x in (pred, target))
        return loss, pred, target, masking.mask


def scatter_patches(patches: Tensor, masking: Masking) -> Tensor:
    """Predicted patches (B, P, n) at their positions among zeros: (B, L, n)."""
    ids = masking.ids_pred.unsqueeze(-1).expand_as(patches)
    return patches.new_zeros(*masking.order.shape, patches.shape[-1]).scatter(1, ids, patches)


def resolve_feature_maps(use_fm: Sequence[int], depth: int) -> list[int]:
    """Indices of the blocks whose outputs are summed, in encoder order.

    Raises:
        UserError: a block does not exist or is named twice.
    """
    if list(use_fm) == [-1]:
        return list(range(depth))
    blocks = sorted(i + depth if i < 0 else i for i in use_fm)
    if not blocks or blocks[0] < 0 or blocks[-1] >= depth or len(set(blocks)) < len(blocks):
        raise UserError(
            f"use_fm {list(use_fm)} does not fit an encoder of {depth} blocks: give distinct "
            f"indices from {-depth} to {depth - 1}, or -1 alone for all blocks."
        )
    return blocks


MaskedAutoencoderViT = CrossMAE  # the name that MAE-style scripts import

mae_vit_mini_patch4 = partial(CrossMAE, **MAE_MINI)
mae_vit_small_patch16 = partial(CrossMAE, **MAE_SMALL)
mae_vit_base_patch16 = partial(CrossMAE, **MAE_BASE)
mae_vit_large_patch16 = partial(CrossMAE, **MAE_LARGE)
mae_vit_huge_patch14 = partial(CrossMAE, **MAE_HUGE)
# the longer names that MAE-style scripts use for the same models
mae_vit_small_patch16_dec512d8b = mae_vit_small_patch16
mae_vit_base_patch16_dec512d8b = mae_vit_base_patch16
mae_vit_large_patch16_dec512d8b = mae_vit_large_patch16
mae_vit_huge_patch14_dec512d8b = mae_vit_huge_patch14
