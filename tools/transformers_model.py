"""Convert a model to the one of Hugging Face transformers that computes the same.

Shapes: B images, C channels, H height, W width, L patches, D encoder width.
"""

import torch
from torch import Tensor, nn

from util.checkpoint import ENCODER_PARTS
from util.data.transforms import CROP_RATIO
from util.io.errors import UserError

RENAMED = (  # ours, theirs
    ("decoder_blocks.", "decoder.decoder_layers."),
    ("blocks.", "layers."),
    (".attn.proj.", ".attention.o_proj."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
)
EMBEDDINGS = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
DECODER = ("decoder_embed.", "decoder_norm.", "decoder_pred.", "mask_token", "decoder_pos_embed")


def to_transformers(model: nn.Module, trained, labels: list[str], encoder_only: bool) -> nn.Module:
    """The transformers model with the same weights, in evaluation mode.

    A classifier becomes BeitForImageClassification (mean pooling) or ViTForImageClassification; MAE
    ViTMAEForPreTraining; an encoder ViTModel, or BeitModel if it has no final norm.

    Raises:
        UserError: transformers is not installed, or the images are not square.
    """
    try:
        import transformers as hf
    except ImportError as error:
        raise UserError("--to transformers: pip install transformers.") from error
    height, width = model.patch_embed.img_size
    if height != width:
        raise UserError(
            f"transformers has no exact model for images of {height}x{width}; square ones are "
            "needed. Use --to timm, whose folder transformers opens as well."
        )
    options = config_options(model)
    weights = {
        k: v for k, v in model.state_dict().items() if k.startswith((*ENCODER_PARTS, "norm."))
    }
    if model.kind == "classifier":
        weights = model.state_dict()
        options |= dict(id2label=dict(enumerate(labels)))
        options |= dict(label2id={label: i for i, label in enumerate(labels)})
        cls = hf.BeitForImageClassification if model.global_pool else hf.ViTForImageClassification
        prefix = "beit." if model.global_pool else "vit."
    elif model.kind == "mae" and not encoder_only:
        weights, prefix, cls = model.state_dict(), "vit.", hf.ViTMAEForPreTraining
        options |= mae_options(model, trained)
    else:
        prefix, cls = "", hf.ViTModel if hasattr(model, "norm") else hf.BeitModel
    if cls in (hf.BeitForImageClassification, hf.BeitModel):
        options |= dict(use_absolute_position_embeddings=True, use_mean_pooling=True)
        options |= dict(layer_scale_init_value=0.0, drop_path_rate=0.0)
    config = cls.config_class(**options)
    new = cls(config, add_pooling_layer=False) if cls is hf.ViTModel else cls(config)
    converted = convert_weights(weights, prefix, with_key_bias="Beit" not in cls.__name__)
    if cls is hf.BeitModel:  # it has no final norm, but its pooler has one
        converted["pooler.layernorm.weight"] = torch.ones(model.embed_dim)
        converted["pooler.layernorm.bias"] = torch.zeros(model.embed_dim)
    new.load_state_dict(converted, strict=True)
    return new.eval()


def config_options(model: nn.Module) -> dict:
    """Sizes of the encoder under transformers' names."""
    block = model.blocks[0]
    return dict(
        hidden_size=model.embed_dim,
        num_hidden_layers=len(model.blocks),
        num_attention_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.out_features,
        image_size=model.patch_embed.img_size[0],
        patch_size=model.patch_embed.patch_size,
        num_channels=model.patch_embed.proj.in_channels,
        layer_norm_eps=block.norm1.eps,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def mae_options(model: nn.Module, trained) -> dict:
    block = model.decoder_blocks[0]
    return dict(
        decoder_hidden_size=model.decoder_embed_dim,
        decoder_num_hidden_layers=len(model.decoder_blocks),
        decoder_num_attention_heads=block.attn.num_heads,
        decoder_intermediate_size=block.mlp.fc1.out_features,
        mask_ratio=trained.mask_ratio,
        norm_pix_loss=trained.norm_pix_loss,
    )


def convert_weights(weights: dict[str, Tensor], prefix: str, with_key_bias: bool) -> dict:
    """Weights under transformers' names.

    Args:
        with_key_bias: False for BEiT, which has none; softmax is the same without it.
    """
    converted = {}
    for name, value in weights.items():
        new = name
        for ours, theirs in RENAMED:
            if ours in new and "decoder_layers." + theirs not in new:
                new = new.replace(ours, theirs, 1)
        if name in EMBEDDINGS:
            new = prefix + EMBEDDINGS[name]
        elif name.startswith("head."):
            new = name.replace("head.", "classifier.")
        elif name.startswith("fc_norm."):
            new = name.replace("fc_norm.", f"{prefix}pooler.layernorm.")
        elif name.startswith("norm."):
            new = name.replace("norm.", f"{prefix}layernorm.")
        elif name.startswith(DECODER):
            new = f"decoder.{name}"
        elif not name.startswith("decoder_blocks."):
            new = prefix + new
        if ".attn.qkv." not in new:
            converted[new] = value.clone()
            continue
        for letter, part in zip("qkv", value.chunk(3), strict=True):
            if letter != "k" or with_key_bias or new.endswith("weight"):
                converted[new.replace(".attn.qkv.", f".attention.{letter}_proj.")] = part.clone()
    return converted


def image_processor(trained):
    """The evaluation transform as transformers' image processor, for square images."""
    from transformers import BitImageProcessor

    side = trained.input_size
    side = side if isinstance(side, int) else side[0]
    return BitImageProcessor(
        size={"shortest_edge": int(side / CROP_RATIO) if side <= 224 else side},
        crop_size={"height": side, "width": side},
        resample=3,
        image_mean=list(trained.mean),
        image_std=list(trained.std),
        do_convert_rgb=trained.in_chans == 3,
    )
