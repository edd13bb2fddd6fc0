"""Weights to start from that other software wrote: transformers, timm, and their folders."""

import difflib
import json
from pathlib import Path

import timm
import torch
from torch import nn

from util.io.checkpoint_content import check_content
from util.io.checkpoint_file import read_checkpoint, weights_of
from util.io.download import fetch_repository, quiet_hub
from util.io.errors import CheckpointError, UserError, one_line
from util.io.transformers_names import from_transformers

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
MODEL_TYPES = ("vit", "vit_mae", "beit")
MODEL_ARGS = set(  # of a plain ViT of timm
    "img_size patch_size in_chans num_classes embed_dim depth num_heads mlp_ratio qkv_bias "
    "global_pool class_token fc_norm final_norm drop_rate drop_path_rate dynamic_img_size".split()
)
TIMM_NAMES = ("cls_token", "pos_embed", "patch_embed.proj.", "norm.", "fc_norm.", "head.")
IN_BLOCK = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def read_pretrained(source: str) -> dict:
    """A checkpoint (see read_checkpoint) whose weights have our names.

    Besides files and URLs: a folder or repository (hf://owner/repository) of transformers (ViT,
    ViTMAE, BEiT layout) or timm, and "timm:NAME". Then `args` holds the input (input_size,
    patch_size, in_chans, mean, std) and `encoder` its depth and num_heads.

    Raises:
        CheckpointError: the weights are not those of a plain ViT, or cannot be read.
    """
    source = str(source)
    if source.startswith("timm:"):
        checkpoint = read_timm(source)
    elif source.startswith("hf://") and source.strip("/").count("/") == 3:
        names = ("preprocessor_config.json", *WEIGHT_FILES)
        checkpoint = read_folder(fetch_repository(source.strip("/"), names), source)
    elif Path(source, "config.json").is_file():
        checkpoint = read_folder(Path(source), source)
    else:
        return read_checkpoint(source)
    check_content(checkpoint, source)
    return checkpoint


def read_folder(folder: Path, source: str) -> dict:
    """A folder with config.json and weights, of transformers or timm."""
    config, options = read_json(folder / "config.json"), {}
    files = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not files:
        raise CheckpointError(f"{source} has no weights: {' or '.join(WEIGHT_FILES)} is needed.")
    is_timm = isinstance(config.get("architecture"), str)
    if not is_timm and config.get("model_type") not in MODEL_TYPES:
        raise CheckpointError(
            f"{source} is of type {config.get('model_type')!r}; {', '.join(MODEL_TYPES)} or a "
            "ViT of timm is needed."
        )
    weights = weights_of(read_checkpoint(files[0]), source)
    if is_timm:
        options = read_model_args(config, source)
        model = create_timm(config["architecture"], source, **options | {"num_classes": 0})
        return timm_checkpoint(model, weights, config.get("pretrained_cfg") or {}, source)
    if config.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(f"{source} has the activation {config['hidden_act']}, not gelu.")
    processor = folder / "preprocessor_config.json"
    processor = read_json(processor) if processor.is_file() else {}
    args = dict(
        input_size=config.get("image_size", 224),
        patch_size=config.get("patch_size", 16),
        in_chans=config.get("num_channels", 3),
        mean=processor.get("image_mean"),
        std=processor.get("image_std"),
    )
    encoder = dict(
        depth=config.get("num_hidden_layers", 12), num_heads=config.get("num_attention_heads", 12)
    )
    return {"model": from_transformers(weights, source), "args": args, "encoder": encoder}


def read_model_args(config: dict, source: str) -> dict:
    """timm's `model_args` of a config.json; only what describes a ViT, so that none opens a file.

    Raises:
        CheckpointError: it holds anything else.
    """
    options = config.get("model_args") or {}
    unknown = sorted(set(options) - MODEL_ARGS) if isinstance(options, dict) else [repr(options)]
    if unknown:
        raise CheckpointError(
            f"{source} has model_args that are not read ({', '.join(unknown)}); known are "
            f"{', '.join(sorted(MODEL_ARGS))}."
        )
    return options


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({one_line(error)}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dict.")
    return content


def read_timm(source: str) -> dict:
    """Pre-trained weights of timm by name, for example timm:vit_base_patch16_224.mae."""
    name = source.removeprefix("timm:")
    model = outline_timm(name, source)  # is it a ViT at all? without a download
    timm_checkpoint(model, model.state_dict(), {}, source)
    with quiet_hub():
        model = create_timm(name, source, pretrained=True, num_classes=0)
    return timm_checkpoint(model, model.state_dict(), model.pretrained_cfg, source)


def outline_timm(name: str, source: str) -> nn.Module:
    """The model without values, or with random ones."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, num_classes=0)
    except RuntimeError:  # unknown, or timm 1.0.15, which reads values while it builds
        return create_timm(name, source, num_classes=0)


def create_timm(name: str, source: str, **options) -> nn.Module:
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models("vit_*"), n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(f"{source}: timm has no model {name}{hint}; see timm.list_pretrained().")
    try:
        return timm.create_model(name, **options)
    except Exception as error:  # of the hub, the network, or arguments that do not fit
        raise UserError(
            f"Could not get {source} from timm ({one_line(error)}); check the name and the network."
        ) from error


def timm_checkpoint(model: nn.Module, weights: dict, data: dict, source: str) -> dict:
    """A checkpoint of timm's weights.

    Args:
        model: built for the weights, to see what they mean.
        data: timm's pretrained_cfg.
    """
    is_plain = type(model) is timm.models.VisionTransformer and not model.no_embed_class
    is_plain = is_plain and isinstance(model.blocks[0].mlp.act, nn.GELU)
    known = {f"blocks.{i}.{x}." for i in range(len(getattr(model, "blocks", []))) for x in IN_BLOCK}
    other = [name for name in weights if not name.startswith((*TIMM_NAMES, *known))]
    if not is_plain or other or "cls_token" not in weights:
        found = f"it has {other[0]}" if other else f"it is a {type(model).__name__}"
        raise CheckpointError(
            f"{source} is not a plain ViT with a class token ({found}), so its weights do not fit "
            "the encoders here; use one as timm:vit_base_patch16_224.mae."
        )
    patch_embed = model.patch_embed
    args = dict(
        input_size=list(patch_embed.img_size),
        patch_size=patch_embed.patch_size[0],
        in_chans=patch_embed.proj.in_channels,
        mean=data.get("mean"),
        std=data.get("std"),
    )
    encoder = dict(depth=len(model.blocks), num_heads=model.blocks[0].attn.num_heads)
    return {"model": weights, "args": args, "encoder": encoder}
