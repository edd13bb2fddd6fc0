"""The classifier that is fine-tuned: a Vision Transformer (arXiv 2010.11929) with a linear head.

Parameter names and outputs equal those of timm's VisionTransformer.
Shapes: B images, L patches, D width, C channels.
"""

from functools import partial

import torch
from torch import Tensor, nn

from util.io.errors import UserError
from util.layers.blocks import LayerNorm
from util.layers.vit import BASE, HUGE, LARGE, MINI, SMALL, ViTBackbone


class VisionTransformer(ViTBackbone):
    """Classifier; `forward` returns logits."""

    kind = "classifier"

    def __init__(
        self,
        global_pool: bool = False,
        num_classes: int = 1000,
        qkv_bias: bool = True,
        **backbone,
    ):
        """
        Args:
            global_pool: classify the mean of the patch tokens (then `fc_norm`) instead of the class
                token (after `norm`).
            qkv_bias: must be True, as in every published model.
            backbone: arguments of ViTBackbone; ViT-B's are the defaults.
        """
        if not qkv_bias:
            raise UserError("qkv_bias=False is not supported: the published models have it.")
        super().__init__(**dict(BASE, norm_layer=LayerNorm) | backbone)
        D = self.embed_dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, D))
        self.global_pool = global_pool
        if global_pool:
            self.fc_norm = self.norm_layer(D)
        else:
            self.norm = self.norm_layer(D)
        self.head = nn.Linear(D, num_classes)
        self.apply(init_trunc_normal)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)

    def init_head(self) -> None:
        """Initialize the head for a pre-trained encoder, as in the published recipes."""
        if self.is_probe:
            nn.init.trunc_normal_(self.head[1].weight, std=0.01)
        else:
            nn.init.trunc_normal_(self.head.weight, std=2e-5)

    @property
    def is_probe(self) -> bool:
        """Whether the encoder is frozen and the head has a BatchNorm: a linear probe."""
        return isinstance(self.head, nn.Sequential)

    def freeze_for_probe(self) -> None:
        """Train only the head, behind a BatchNorm without weights (MAE, appendix A.1)."""
        self.requires_grad_(False)
        norm = nn.BatchNorm1d(self.embed_dim, affine=False, eps=1e-6)
        self.head = nn.Sequential(norm, self.head.requires_grad_(True))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay although they have several dimensions."""
        return {"cls_token", "pos_embed"}

    def forward_head(self, x: Tensor) -> Tensor:
        """Tokens (B, 1 + L, D) -> logits (B, classes)."""
        x = self.fc_norm(x[:, 1:].mean(dim=1)) if self.global_pool else self.norm(x)[:, 0]
        return self.head(x)

    def forward(self, imgs: Tensor) -> Tensor:
        """imgs (B, C, H, W) -> logits (B, classes)."""
        return self.forward_head(self.run_blocks(self.embed(imgs)))


def init_trunc_normal(module: nn.Module) -> None:
    """Initialize linear layers as timm does."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


vit_mini_patch4 = partial(VisionTransformer, **MINI)
vit_small_patch16 = partial(VisionTransformer, **SMALL)
vit_base_patch16 = partial(VisionTransformer, **BASE)
vit_large_patch16 = partial(VisionTransformer, **LARGE)
vit_huge_patch14 = partial(VisionTransformer, **HUGE)
