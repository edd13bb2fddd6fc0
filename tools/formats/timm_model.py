"""Convert a model to the timm VisionTransformer that computes the same."""

import timm
from torch import nn

from util.checkpoint import ENCODER_PARTS
from util.layers.vit import BASE, HUGE, LARGE, SMALL

TIMM_SHARED = dict(img_size=(224, 224), in_chans=3, mlp_ratio=4.0)
TIMM_MODELS = {
    "vit_small_patch16_224": TIMM_SHARED | SMALL,
    "vit_base_patch16_224": TIMM_SHARED | BASE,
    "vit_large_patch16_224": TIMM_SHARED | LARGE,
    "vit_huge_patch14_224": TIMM_SHARED | HUGE,
}


def to_timm(model: nn.Module) -> tuple[nn.Module, str, dict]:
    """(timm model with the same weights, its name and arguments for timm.create_model).

    Of a pre-training model the encoder, whose output is the class token.
    """
    name, options = timm_name_and_args(model)
    timm_model = timm.create_model(name, **options)
    weights = model.state_dict()
    if model.kind != "classifier":
        encoder = (*ENCODER_PARTS, "norm.")
        weights = {k: v for k, v in weights.items() if k.startswith(encoder)}
    timm_model.load_state_dict(weights, strict=True)
    return timm_model.eval(), name, options


def timm_name_and_args(model: nn.Module) -> tuple[str, dict]:
    """Name of the timm model of the same size, and the arguments that differ from its defaults."""
    block = model.blocks[0]
    own = dict(
        img_size=model.patch_embed.img_size,
        patch_size=model.patch_embed.patch_size,
        in_chans=model.patch_embed.proj.in_channels,
        embed_dim=model.embed_dim,
        depth=len(model.blocks),
        num_heads=block.attn.num_heads,
        mlp_ratio=block.mlp.fc1.out_features / model.embed_dim,
    )
    size = ("embed_dim", "depth", "num_heads")
    same = [name for name, stock in TIMM_MODELS.items() if all(own[k] == stock[k] for k in size)]
    name = same[0] if same else "vit_base_patch16_224"
    options = {k: v for k, v in own.items() if v != TIMM_MODELS[name][k]}
    if model.kind == "classifier":
        options["num_classes"] = model.head.out_features
        return name, options | ({"global_pool": "avg"} if model.global_pool else {})
    options |= {"num_classes": 0, "fc_norm": False}
    return name, options | ({} if hasattr(model, "norm") else {"final_norm": False})
