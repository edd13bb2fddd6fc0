"""Transformer blocks of the encoder and of both decoders.

Shapes: B images, N query tokens, M key tokens, D width of the block, C width of the context,
H heads, d = D / H head width. Parameter names are those of the published checkpoints.
"""

from functools import partial

import torch
from torch import Tensor, nn

from util.io.errors import UserError
from util.layers.attention import AttentionBackend
from util.layers.patchify import gather_patches
from util.layers.recompute import gelu_linear, norm_linear

LayerNorm = partial(nn.LayerNorm, eps=1e-6)  # of every published model


class PatchEmbed(nn.Module):
    """Linear embedding of patches, stored as the weights of a p x p convolution with stride p."""

    def __init__(self, img_size: tuple[int, int], patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        if img_size[0] % patch_size or img_size[1] % patch_size:
            raise UserError(
                f"Input size {img_size[0]}x{img_size[1]} does not divide by patch size "
                f"{patch_size}; choose a multiple of it for both sides."
            )
        self.img_size = tuple(img_size)
        self.patch_size = patch_size
        self.grid_size = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, imgs: Tensor, ids: Tensor | None = None) -> Tensor:
        """imgs (B, C, H, W) -> (B, L, D), or only the patches ids (B, V) -> (B, V, D).

        Raises:
            UserError: the images are not of the size and channels the model was built for.
        """
        expected = (self.proj.in_channels, *self.img_size)
        if imgs.shape[1:] != expected:
            raise UserError(
                f"The model was built for images of {expected} (channels, height, width), "
                f"got {tuple(imgs.shape[1:])}; build it with this size or resize the images."
            )
        if ids is None:
            return self.proj(imgs).flatten(2).transpose(1, 2)
        patches = gather_patches(imgs, ids, self.patch_size).flatten(2)
        return nn.functional.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, zero a branch for some of the images.

    The others are scaled by 1 / (1 - drop_prob), so that the mean stays the same.
    """

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob
        # A number would be compiled in, and every block then needs a program of its own. Not a
        # buffer, which DDP would broadcast in every step.
        self.keep_prob = torch.tensor(1 - drop_prob, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        if not self.training:
            return x
        if torch.compiler.is_compiling():
            kept = torch.rand(len(x), 1, 1, device=x.device) < self.keep_prob
            return x * (kept / self.keep_prob).to(x.dtype)
        keep_prob = 1 - self.drop_prob
        kept = x.new_empty(len(x), 1, 1).bernoulli_(keep_prob)
        return x * kept.div_(keep_prob)


class Mlp(nn.Module):
    """Two linear layers with the exact (erf) GELU between them."""

    recompute = "none"  # a policy of ViTBackbone.set_recompute

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D); of norm(x), recomputed in backward, if norm is given."""
        hidden = norm_linear(norm, x, self.fc1) if norm else self.fc1(x)
        if self.recompute in ("gelu", "all"):
            return gelu_linear(hidden, self.fc2)
        return self.fc2(nn.functional.gelu(hidden))


class Attention(nn.Module):
    """Multi-head self-attention with one projection for q, k and v."""

    def __init__(self, dim: int, num_heads: int, attention_backend: AttentionBackend):
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.attention_backend = attention_backend
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D); of norm(x), recomputed in backward, if norm is given."""
        qkv = norm_linear(norm, x, self.qkv) if norm else self.qkv(x)
        qkv = qkv.unflatten(2, (3, self.num_heads, -1))  # (B, N, 3, H, d)
        return self.proj(self.attention_backend.self_attention(qkv).flatten(2))


class CrossAttention(nn.Module):
    """Multi-head attention from N queries to a context of M tokens."""

    def __init__(
        self, dim: int, context_dim: int, num_heads: int, attention_backend: AttentionBackend
    ):
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.attention_backend = attention_backend
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(context_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor, norm=None, context_norm=None) -> Tensor:
        """Attend from x (B, N, D) to context (B, M, C) -> (B, N, D); of norm(x) and
        context_norm(context), recomputed in backward, if they are given.
        """
        q = norm_linear(norm, x, self.q) if norm else self.q(x)
        kv = norm_linear(context_norm, context, self.kv) if context_norm else self.kv(context)
        q = q.unflatten(2, (self.num_heads, -1))  # (B, N, H, d)
        kv = kv.unflatten(2, (2, self.num_heads, -1))  # (B, M, 2, H, d)
        return self.proj(self.attention_backend.cross_attention(q, kv).flatten(2))


class Block(nn.Module):
    """Pre-norm encoder block: x + attn(norm1(x)), then x + mlp(norm2(x))."""

    recompute = "none"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        attention_backend: AttentionBackend,
        norm_layer=LayerNorm,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, attention_backend)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        if self.recompute == "all":
            x = x + self.drop_path(self.attn(x, self.norm1))
            return x + self.drop_path(self.mlp(x, self.norm2))
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class CrossAttentionBlock(nn.Module):
    """CrossMAE decoder block: optional self-attention, cross-attention to a context, MLP."""

    recompute = "none"

    def __init__(
        self,
        dim: int,
        context_dim: int,
        num_heads: int,
        mlp_ratio: float,
        attention_backend: AttentionBackend,
        norm_layer=LayerNorm,
        self_attn: bool = False,
    ):
        super().__init__()
        if self_attn:
            self.norm0 = norm_layer(dim)
            self.self_attn = Attention(dim, num_heads, attention_backend)
        self.has_self_attn = self_attn
        self.norm1 = norm_layer(dim)
        self.cross_attn = CrossAttention(dim, context_dim, num_heads, attention_backend)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, context: Tensor, context_norm: nn.Module | None = None) -> Tensor:
        """Queries x (B, N, D), context (B, M, C), normalized by context_norm -> (B, N, D)."""
        if self.recompute == "all":
            if self.has_self_attn:
                x = x + self.self_attn(x, self.norm0)
            x = x + self.cross_attn(x, context, self.norm1, context_norm)
            return x + self.mlp(x, self.norm2)
        if self.has_self_attn:
            x = x + self.self_attn(self.norm0(x))
        context = context_norm(context) if context_norm else context
        x = x + self.cross_attn(self.norm1(x), context)
        return x + self.mlp(self.norm2(x))


def check_heads(dim: int, num_heads: int) -> None:
    """Raises UserError when dim does not divide by num_heads."""
    if dim % num_heads:
        raise UserError(f"Width {dim} does not divide by {num_heads} heads; change one of them.")
