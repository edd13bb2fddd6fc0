"""CrossMAE: masked autoencoder with a cross-attention decoder (arXiv 2401.14391).

A decoder query is the position of a masked patch; it reads the encoder's feature maps and no other
query, so any share of the masked patches can be predicted.

Letters: B images, L patches, V visible, P predicted, D encoder width, E decoder width, K feature
maps, J decoder blocks, C channels, p patch size.
"""

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from util.io.errors import UserError
from util.layers.attention import AttentionBackend
from util.layers.blocks import CrossAttentionBlock
from util.layers.masking import Masking
from util.layers.recompute import mix
from util.layers.vit import MAE_BASE, MAE_HUGE, MAE_LARGE, MAE_MINI, MAE_SMALL, MaskedAutoencoder


class WeightedFeatureMaps(nn.Module):
    """For each decoder block, a learned weighted sum of the encoder's feature maps."""

    def __init__(self, num_maps: int, decoder_depth: int):
        super().__init__()
        self.linear = nn.Linear(num_maps, decoder_depth, bias=False)  # weight (J, K)

    def forward(self, maps: Sequence[Tensor]) -> Sequence[Tensor]:
        """K maps (B, N, D) of one shape -> J mixtures (B, N, D)."""
        return mix(self.linear.weight, list(maps))


class CrossMAE(MaskedAutoencoder):
    """Pre-training model; `forward` returns the loss."""

    kind = "crossmae"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_layer=nn.LayerNorm,
        norm_pix_loss: bool = False,
        weight_fm: bool = False,
        use_fm: Sequence[int] = (-1,),
        use_input: bool = False,
        self_attn: bool = False,
        attention_backend: AttentionBackend | None = None,
    ):
        """
        Args:
            weight_fm: every decoder block reads its own mixture of feature maps; without it, all
                read the normalised output of the last block.
            use_fm: encoder blocks whose outputs are mixed, negative from the end; -1 alone means
                all.
            use_input: the encoder's input tokens are one more feature map, the first.
            self_attn: queries also attend to each other.
        """
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            decoder_embed_dim=decoder_embed_dim,
            mlp_ratio=mlp_ratio,
            norm_layer=norm_layer,
            norm_pix_loss=norm_pix_loss,
            attention_backend=attention_backend,
        )
        for name in ("pos_embed", "decoder_pos_embed"):  # published order: both tokens come first
            setattr(self, name, self._parameters.pop(name))
        self.weight_fm = weight_fm
        self.use_input = use_input
        self.use_fm = resolve_feature_maps(use_fm, depth)
        if weight_fm:
            self.dec_norms = nn.ModuleList(norm_layer(embed_dim) for _ in range(decoder_depth))
            self.wfm = WeightedFeatureMaps(len(self.use_fm) + use_input, decoder_depth)
        else:
            self.norm = norm_layer(embed_dim)
        self.decoder_blocks = nn.ModuleList(
            CrossAttentionBlock(
                decoder_embed_dim,
                embed_dim,
                decoder_num_heads,
                mlp_ratio,
                self.attention_backend,
                norm_layer,
                self_attn,
            )
            for _ in range(decoder_depth)
        )
        self.add_prediction_head(decoder_embed_dim, norm_layer)

    @property
    def has_unused_blocks(self) -> bool:
        """Whether the last encoder blocks are read by nobody, and so get no gradient."""
        return self.weight_fm and self.use_fm[-1] < len(self.blocks) - 1

    def forward_encoder(self, imgs: Tensor, masking: Masking) -> Sequence[Tensor]:
        """imgs (B, C, H, W) -> what each of the J decoder blocks reads, (B, 1 + V, D).

        With weight_fm these are mixtures, which `dec_norms` still have to normalise.
        """
        x = self.embed(imgs, masking.ids_keep)
        if not self.weight_fm:
            *_, x = self.run_blocks(x)
            return [self.norm(x)] * len(self.decoder_blocks)
        maps = [x] if self.use_input else []
        last = self.use_fm[-1]  # blocks after it are read by nobody, and not run
        for i, output in enumerate(self.run_blocks(x, last + 1)):
            if i in self.use_fm:
                maps.append(output)
        return self.wfm(maps)

    def forward_decoder(self, contexts: Sequence[Tensor], masking: Masking) -> Tensor:
        """J contexts (B, 1 + V, D) -> predicted pixels of the predicted patches (B, P, p*p*C)."""
        x = self.decoder_pos_embed[0, 1:][masking.ids_pred] + self.mask_token  # (B, P, E)
        norms = self.dec_norms if self.weight_fm else [None] * len(self.decoder_blocks)
        for block, context, norm in zip(self.decoder_blocks, contexts, norms, strict=True):
            x = self.run(block, x, context, norm)
        return self.decoder_pred(self.decoder_norm(x))

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
            mask_ratio: share of the patches that the encoder does not see.
            kept_mask_ratio: share of all patches that is predicted, at most mask_ratio.
            vis: return (loss, pred, target, mask) instead, pred and target (B, L, p*p*C) with zeros
                where nothing is predicted, mask (B, L) 1 where something is.
            noise: (B, L), orders the patches instead of a random draw; the smallest stay visible,
                the largest are predicted.
        """
        masking = self.draw_masking(imgs, mask_ratio, kept_mask_ratio, noise)
        pred = self.forward_decoder(self.forward_encoder(imgs, masking), masking)
        loss = self.forward_loss(imgs, pred, masking)
        if not vis:
            return loss
        target = self.pixel_target(imgs, masking.ids_pred)
        return loss, place(pred, masking), place(target, masking), masking.mask


def place(patches: Tensor, masking: Masking) -> Tensor:
    """Put predicted patches (B, P, n) at their places among zeros: (B, L, n)."""
    ids = masking.ids_pred.unsqueeze(-1).expand_as(patches)
    return patches.new_zeros(*masking.order.shape, patches.shape[-1]).scatter(1, ids, patches)


def resolve_feature_maps(use_fm: Sequence[int], depth: int) -> list[int]:
    """Block numbers to mix, in encoder order.

    Raises:
        UserError: a block does not exist or is named twice.
    """
    if list(use_fm) == [-1]:
        return list(range(depth))
    blocks = sorted(i + depth if i < 0 else i for i in use_fm)
    if not blocks or blocks[0] < 0 or blocks[-1] >= depth or len(set(blocks)) < len(blocks):
        raise UserError(
            f"use_fm {list(use_fm)} does not fit an encoder of {depth} blocks: give different "
            f"numbers from {-depth} to {depth - 1}, or -1 alone for all blocks."
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
