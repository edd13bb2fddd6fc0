"""Names of a ViT's weights in Hugging Face transformers, and back to ours.

Written as in the files of the Hub, which every version of transformers loads; read with those names
and with the ones that transformers 5 has in memory.
Shapes: D width.
"""

import re

import torch
from torch import Tensor

from util.io.errors import CheckpointError

IN_BLOCK = {  # ours: theirs
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.q": "attention.attention.query",
    "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
DECODER = ("mask_token", "decoder_pos_embed", "decoder_embed", "decoder_norm", "decoder_pred")
IN_ENCODER = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "fc_norm": "pooler.layernorm",
}
OUTSIDE = {"head": "classifier", **{name: f"decoder.{name}" for name in DECODER}}

OURS_IN_BLOCK = {theirs: ours for ours, theirs in IN_BLOCK.items()} | {
    **{f"attention.{x}_proj": f"attn.{x}" for x in "qkv"},
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
OURS = {theirs: ours for ours, theirs in (IN_ENCODER | OUTSIDE).items()}
BLOCK = re.compile(r"(decoder_)?blocks\.(\d+)\.(.+)")
# transformers 5.24 saves ViTMAE's decoder with the last of these
THEIR_BLOCK = re.compile(
    r"(?:encoder\.layer|layers|(decoder\.)(?:decoder_layers|decoder_encoder\.layer))\.(\d+)\.(.+)"
)
ENCODER = ("embeddings.", "encoder.", "layers.")
UNUSED = ("embeddings.mask_token",)  # of other pre-training methods


def split_name(name: str) -> tuple[str, str]:
    """("blocks.0.norm1", ".weight") of blocks.0.norm1.weight; ("cls_token", "") of cls_token."""
    found = re.fullmatch(r"(.+)(\.(?:weight|bias))", name)
    return (found[1], found[2]) if found else (name, "")


def to_transformers(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Our weights under the names of transformers.

    Args:
        prefix: of the encoder, such as "vit."; "" for an encoder alone.
    """
    renamed = {}
    for name, value in split_qkv(weights).items():
        stem, end = split_name(name)
        block = BLOCK.fullmatch(stem)
        if block:
            folder = "decoder.decoder_layers" if block[1] else f"{prefix}encoder.layer"
            stem = f"{folder}.{block[2]}.{IN_BLOCK[block[3]]}"
        else:
            stem = prefix + IN_ENCODER[stem] if stem in IN_ENCODER else OUTSIDE[stem]
        renamed[stem + end] = value.contiguous()
    return renamed


def split_qkv(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """attn.qkv (3D, ...) -> attn.q, attn.k and attn.v, (D, ...) each."""
    split = {}
    for name, value in weights.items():
        if ".attn.qkv." in name:
            for x, part in zip("qkv", value.chunk(3), strict=True):
                split[name.replace(".qkv.", f".{x}.")] = part.clone()
        else:
            split[name] = value
    return split


def from_transformers(weights: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Weights of a ViT, ViTMAE or BEiT model under our names; other heads are left out.

    Raises:
        CheckpointError: the encoder has weights that ours does not have.
    """
    renamed = {}
    for name, value in weights.items():
        name = re.sub(r"^(vit|beit)\.", "", name)
        stem, end = split_name(name)
        block = THEIR_BLOCK.fullmatch(stem)
        if block and block[3] in OURS_IN_BLOCK:
            blocks = "decoder_blocks" if block[1] else "blocks"
            renamed[f"{blocks}.{block[2]}.{OURS_IN_BLOCK[block[3]]}{end}"] = value
        elif stem in OURS:
            renamed[OURS[stem] + end] = value
        elif name.startswith(ENCODER) and name not in UNUSED:
            raise CheckpointError(
                f"{source} has {name}, which the encoders here do not have; use a plain ViT "
                "(absolute position embeddings, no layer scale)."
            )
    return merge_qkv(renamed)


def merge_qkv(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of split_qkv; BEiT's missing key bias, which softmax ignores, becomes zero."""
    merged = {}
    for name, value in weights.items():
        if ".attn.q." in name:
            parts = [weights.get(name.replace(".q.", f".{x}.")) for x in "qkv"]
            parts = [torch.zeros_like(value) if part is None else part for part in parts]
            merged[name.replace(".q.", ".qkv.")] = torch.cat(parts)
        elif not re.search(r"\.attn\.[kv]\.", name):
            merged[name] = value
    return merged
