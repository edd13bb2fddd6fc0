"""Convert a model to the one of Hugging Face transformers that computes the same.

Shapes: B images, L patches, D encoder width.
"""

import logging

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from tools.formats.checks import (
    TOLERANCE,
    check_close,
    check_empty,
    crop_ratio,
    example_images,
    label_names,
)
from util.checkpoint import ENCODER_PARTS
from util.data.transforms import build_transform
from util.io.errors import UserError
from util.io.files import atomic_write
from util.io.transformers_names import to_transformers

logger = logging.getLogger(__name__)


def write_transformers(model: nn.Module, trained, args) -> None:
    """Write a folder for from_pretrained, after a comparison of the outputs.

    Raises:
        UserError: transformers is not installed, or the images are not square.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "--to transformers needs transformers: pip install transformers."
        ) from error
    height, width = model.patch_embed.img_size
    if height != width:
        raise UserError(
            f"--to transformers writes models of square images, this one takes {height}x{width}; "
            "use --to timm, whose folder transformers opens as well."
        )
    check_empty(args.out)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    name, config, weights = convert(model, trained, args.features)
    native = load_native(name, config, weights)
    with torch.no_grad():
        compare(native, model, trained)
    texts = {"config.json": config.to_json_string()}
    if trained.in_chans == 3:
        processor = image_processor(trained)
        compare_processor(processor, trained)
        texts["preprocessor_config.json"] = processor.to_json_string()
    else:
        logger.warning("No image processor is written: those of transformers take RGB images")
    with atomic_write(args.out / "model.safetensors") as tmp_path:
        save_file(weights, tmp_path, metadata={"format": "pt"})
    for file, text in texts.items():
        with atomic_write(args.out / file) as tmp_path:
            tmp_path.write_text(text, encoding="utf-8")
    option = ", add_pooling_layer=False" if name == "ViTModel" else ""
    call = f"{name}.from_pretrained({str(args.out)!r}{option})"
    logger.info("Wrote %s: transformers.%s", args.out, call)


def convert(model: nn.Module, trained, features: bool):
    """(name of the class, its configuration, weights under the names of transformers).

    Args:
        features: the encoder alone, also of a classifier or MAE.
    """
    import transformers

    weights, options = model.state_dict(), encoder_options(model)
    if model.kind == "classifier" and not features:
        name = "BeitForImageClassification" if model.global_pool else "ViTForImageClassification"
        labels = label_names(trained)
        options["id2label"] = dict(enumerate(labels))
        options["label2id"] = {label: i for i, label in enumerate(labels)}
    elif model.kind == "mae" and not features:
        name = "ViTMAEForPreTraining"
        options |= decoder_options(model, trained)
    else:
        name = "ViTModel" if hasattr(model, "norm") else "BeitModel"
        parts = (*ENCODER_PARTS, "norm.", "fc_norm.")
        weights = {k: v for k, v in weights.items() if k.startswith(parts)}
        if name == "BeitModel" and "fc_norm.weight" not in weights:  # its pooler has a norm
            weights["fc_norm.weight"] = torch.ones(model.embed_dim)
            weights["fc_norm.bias"] = torch.zeros(model.embed_dim)
    is_beit = name.startswith("Beit")
    if is_beit:
        quarters = [len(model.blocks) * i // 4 for i in (1, 2, 3, 4)]  # feature maps of a backbone
        options |= dict(
            use_absolute_position_embeddings=True,
            use_mean_pooling=True,
            layer_scale_init_value=0.0,
            drop_path_rate=0.0,
            out_indices=sorted({max(i, 1) for i in quarters}),
        )
    config = getattr(transformers, name).config_class(architectures=[name], **options)
    prefix = "" if name in ("ViTModel", "BeitModel") else "beit." if is_beit else "vit."
    weights = to_transformers(weights, prefix)
    if is_beit:  # it has no key bias: softmax cancels it
        weights = {k: v for k, v in weights.items() if not k.endswith("attention.key.bias")}
    return name, config, weights


def encoder_options(model: nn.Module) -> dict:
    """Configuration of the encoder in transformers' words."""
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
    )


def decoder_options(model: nn.Module, trained) -> dict:
    block = model.decoder_blocks[0]
    return dict(
        decoder_hidden_size=model.decoder_embed_dim,
        decoder_num_hidden_layers=len(model.decoder_blocks),
        decoder_num_attention_heads=block.attn.num_heads,
        decoder_intermediate_size=block.mlp.fc1.out_features,
        mask_ratio=trained.mask_ratio,
        norm_pix_loss=trained.norm_pix_loss,
    )


def load_native(name: str, config, weights: dict[str, Tensor]) -> nn.Module:
    """The model of transformers, loaded as from a file.

    Raises:
        RuntimeError: a weight is missing or has no place.
    """
    import transformers

    options = {"add_pooling_layer": False} if name == "ViTModel" else {}
    native, info = getattr(transformers, name).from_pretrained(
        None, config=config, state_dict=weights, output_loading_info=True, **options
    )
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        raise RuntimeError(f"transformers {transformers.__version__} reads other weights: {info}")
    return native.eval()


def compare(native: nn.Module, model: nn.Module, trained) -> None:
    """Outputs of both models on the same images."""
    imgs, name = example_images(model, 2), type(native).__name__
    if name.endswith("ForImageClassification"):
        found, expected = native(imgs).logits, model(imgs)
    elif name == "ViTMAEForPreTraining":
        shape, random = (2, model.patch_embed.num_patches), torch.Generator().manual_seed(0)
        noise = torch.rand(shape, generator=random)
        output = native(imgs, noise=noise)
        loss, expected, *_ = model(imgs, trained.mask_ratio, vis=True, noise=noise)
        check_close(output.loss, loss, TOLERANCE, f"transformers' {name} (loss)")
        found = output.logits
    else:
        found, features = native(imgs).last_hidden_state, model.forward_features(imgs)
        expected = torch.cat([features.cls[:, None], features.patches], dim=1)  # (B, 1 + L, D)
    check_close(found, expected, TOLERANCE, f"transformers' {name}")


def image_processor(trained):
    """The evaluation transform as an image processor of transformers, for square RGB images."""
    from transformers import BitImageProcessor

    side = trained.input_size if isinstance(trained.input_size, int) else trained.input_size[0]
    return BitImageProcessor(
        size={"shortest_edge": int(side / crop_ratio(trained))},
        crop_size={"height": side, "width": side},
        resample=3,  # bicubic
        image_mean=list(trained.mean),
        image_std=list(trained.std),
    )


def compare_processor(processor, trained) -> None:
    """Both transforms of one image; transformers' default backend differs by one gray level."""
    side, short_side = processor.crop_size["height"], processor.size["shortest_edge"]
    if (short_side - side) % 4 == 3:
        logger.warning(
            "The image processor crops one pixel beside the evaluation: of %d pixels too many, "
            "transformers rounds the half down",
            short_side - side,
        )
        return
    random = np.random.RandomState(0).randint(0, 256, (6, 8, 3), dtype=np.uint8)
    size = 2 * (side + 4 * short_side), 2 * short_side  # its crop needs no rounding
    img = Image.fromarray(random).resize(size, Image.Resampling.BICUBIC)
    found = torch.as_tensor(processor(img)["pixel_values"][0])
    gray_level = 1.01 / 255 / min(trained.std)
    check_close(found, build_transform(False, trained)(img), gray_level, "the image processor")
