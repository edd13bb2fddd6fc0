"""Reference implementation of CrossMAE and MAE: the papers' formulas written out, unoptimized.

It computes the loss from the parameters of the project's models; tests and the benchmark compare
with it. All patches are embedded and all targets normalized, feature maps are stacked along a new
last dimension and weighted there, q, k and v are slices of one tensor, and masked patches are
selected with boolean masks. No training run uses it.

Shapes: B images, L patches, V visible, P predicted, N and M tokens, D encoder width, E decoder
width, K feature maps, J decoder blocks, C channels, H height, W width, p patch size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def reference_loss(
    model: nn.Module, imgs: Tensor, mask_ratio: float, kept_mask_ratio: float, noise: Tensor
) -> Tensor:
    """Loss of a CrossMAE or MAE model: imgs (B, C, H, W), noise (B, L) -> scalar.

    Patches with the smallest noise are visible, those with the largest are predicted.
    """
    is_cross = model.kind == "crossmae"
    num_patches = noise.shape[1]
    num_visible = int(num_patches * (1 - mask_ratio))
    num_dropped = int(num_patches * (mask_ratio - kept_mask_ratio)) if is_cross else 0
    order = noise.argsort(dim=1)
    ids_restore = order.argsort(dim=1)
    mask = torch.zeros_like(noise)  # in random order: 0 visible or dropped, 1 predicted
    mask[:, num_visible + num_dropped :] = 1
    mask = mask.gather(1, ids_restore)  # in raster order

    x = model.patch_embed.proj(imgs).flatten(2).transpose(1, 2)  # (B, L, D)
    x = x + model.pos_embed[:, 1:]
    ids = order[:, :num_visible].unsqueeze(-1).expand(-1, -1, x.shape[-1])
    x = x.gather(1, ids)
    x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)

    maps = [x] if is_cross and model.use_input else []
    for i, block in enumerate(model.blocks):
        x = encoder_block(block, x)
        if is_cross and i in model.use_fm:
            maps.append(x)
    pred = cross_decoder(model, x, maps, mask) if is_cross else mae_decoder(model, x, ids_restore)

    target = model.patchify(imgs)
    if model.norm_pix_loss:
        mean = target.mean(dim=-1, keepdim=True)
        var = target.var(dim=-1, keepdim=True)
        target = (target - mean) / (var + 1e-6) ** 0.5
    if is_cross:
        target = target[mask.bool()].view(len(imgs), -1, target.shape[-1])
        return ((pred.float() - target) ** 2).mean()
    loss = ((pred.float() - target) ** 2).mean(dim=-1)
    return (loss * mask).sum() / mask.sum()


def encoder_block(block: nn.Module, x: Tensor) -> Tensor:
    """x + attention(norm1(x)), then x + mlp(norm2(x)): x (B, N, D) -> (B, N, D)."""
    x = x + self_attention(block.attn, block.norm1(x))
    return x + mlp(block.mlp, block.norm2(x))


def self_attention(attn: nn.Module, x: Tensor) -> Tensor:
    """Multi-head self-attention: x (B, N, D) -> (B, N, D)."""
    B, N, D = x.shape
    qkv = attn.qkv(x).reshape(B, N, 3, attn.num_heads, D // attn.num_heads).permute(2, 0, 3, 1, 4)
    x = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
    return attn.proj(x.transpose(1, 2).reshape(B, N, D))


def mlp(layers: nn.Module, x: Tensor) -> Tensor:
    return layers.fc2(F.gelu(layers.fc1(x)))


def cross_attention(attn: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Queries from x (B, N, E), keys and values from y (B, M, D) -> (B, N, E)."""
    B, N, E = x.shape
    q = attn.q(x).reshape(B, N, attn.num_heads, E // attn.num_heads).permute(0, 2, 1, 3)
    kv = attn.kv(y).reshape(B, y.shape[1], 2, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    x = F.scaled_dot_product_attention(q, kv[0], kv[1])
    return attn.proj(x.transpose(1, 2).reshape(B, N, E))


def cross_decoder(model, x: Tensor, maps: list[Tensor], mask: Tensor) -> Tensor:
    """CrossMAE: x (B, 1 + V, D) -> pixels of predicted patches, in raster order (B, P, p*p*C)."""
    if model.weight_fm:
        mixed = model.wfm.linear(torch.stack(maps, dim=-1))  # (B, N, D, K) -> (B, N, D, J)
        contexts = [norm(mixed[..., j]) for j, norm in enumerate(model.dec_norms)]
    else:
        contexts = [model.norm(x)] * len(model.decoder_blocks)
    queries = (model.mask_token + model.decoder_pos_embed[:, 1:]).expand(len(x), -1, -1)
    q = queries[mask.bool()].view(len(x), -1, queries.shape[-1])
    for block, context in zip(model.decoder_blocks, contexts, strict=True):
        if block.has_self_attn:
            q = q + self_attention(block.self_attn, block.norm0(q))
        q = q + cross_attention(block.cross_attn, block.norm1(q), context)
        q = q + mlp(block.mlp, block.norm2(q))
    return model.decoder_pred(model.decoder_norm(q))


def mae_decoder(model, x: Tensor, ids_restore: Tensor) -> Tensor:
    """MAE: x (B, 1 + V, D) -> pixels of all patches (B, L, p*p*C)."""
    x = model.decoder_embed(model.norm(x))
    num_masked = ids_restore.shape[1] + 1 - x.shape[1]
    tokens = torch.cat([x[:, 1:], model.mask_token.repeat(len(x), num_masked, 1)], dim=1)
    tokens = tokens.gather(1, ids_restore.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    x = torch.cat([x[:, :1], tokens], dim=1) + model.decoder_pos_embed
    for block in model.decoder_blocks:
        x = encoder_block(block, x)
    return model.decoder_pred(model.decoder_norm(x))[:, 1:]
