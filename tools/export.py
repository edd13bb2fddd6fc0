"""Write a checkpoint in the forms other software reads: timm, safetensors, ONNX.

    python -m tools.export --checkpoint C --to timm --out FOLDER
    python -m tools.export --checkpoint C --to safetensors --out model.safetensors
    python -m tools.export --checkpoint C --to onnx --out model.onnx

timm          a folder as on the Hugging Face Hub (config.json, model.safetensors) for a stock timm
              Vision Transformer, with this checkpoint's own mean, deviation and crop. Of a
              pre-training checkpoint the encoder, without a head.
safetensors   all weights under their own names; what the model is stands in the file's metadata.
onnx          imgs (B, C, H, W) with free B -> logits (B, K); of a pre-training checkpoint, or with
              --features, -> cls (B, D), mean (B, D), patches (B, L, D). Needs the packages onnx and
              onnxscript, and onnxruntime to compare the outputs.

Letters: B images, C channels, H height, W width, L patches, D encoder width, K classes.
"""

import argparse
import importlib.util
import json
import logging
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from timm.layers import to_2tuple
from torch import Tensor, nn

from util.build import CLASSIFIER_DEFAULTS, PRETRAIN_DEFAULTS, SHARED_DEFAULTS, load_trained
from util.checkpoint import ENCODER_PARTS
from util.data.transforms import CROP_RATIO
from util.io.errors import UserError
from util.io.files import atomic_write
from util.layers.vit import BASE, HUGE, LARGE, SMALL
from util.run import launch as run

logger = logging.getLogger(__name__)

STOCK = {
    "vit_small_patch16_224": SMALL,
    "vit_base_patch16_224": BASE,
    "vit_large_patch16_224": LARGE,
    "vit_huge_patch14_224": HUGE,
}
STOCK_SIZES = dict(img_size=(224, 224), in_chans=3, mlp_ratio=4.0)  # of all of them
TOLERANCE = 1e-5  # of timm's outputs
ONNX_TOLERANCE = 1e-4  # other kernels, other order of sums
SINGLE_FILE_LIMIT = 1_800_000_000  # bytes of weights; an ONNX file cannot exceed 2 GiB


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m tools.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint", required=True, help="of main_pretrain.py or main_finetune.py: file or URL"
    )
    parser.add_argument("--to", required=True, choices=sorted(WRITERS), help="form to write")
    parser.add_argument("--out", required=True, type=Path, help="folder for timm, else a file")
    parser.add_argument(
        "--features",
        action="store_true",
        help="onnx of a fine-tuned checkpoint: features instead of logits",
    )
    parser.add_argument(
        "--model", help="name of the model, needed only where the checkpoint does not say it"
    )
    return parser


def is_classifier(model: nn.Module) -> bool:
    return hasattr(model, "head")


def fold_probe(model: nn.Module) -> None:
    """Make one linear layer of a linear probe's BatchNorm and linear layer.

    In evaluation they are the same function, and other software knows no such head.
    """
    norm, linear = model.head
    with torch.no_grad():
        scale = (norm.running_var + norm.eps).rsqrt()  # (D,)
        linear.bias -= linear.weight @ (norm.running_mean * scale)
        linear.weight *= scale
    model.head = linear


def describe(model: nn.Module, trained) -> dict[str, str]:
    """What the model is, as strings: lists and numbers as JSON.

    `args` holds the flags that decide the model, no paths.
    """
    defaults = CLASSIFIER_DEFAULTS if is_classifier(model) else PRETRAIN_DEFAULTS
    names = ["model", *SHARED_DEFAULTS, *defaults] + ["nb_classes"] * is_classifier(model)
    names.remove("grad_checkpointing")
    facts = {
        "format": "pt",
        "model": trained.model,
        "kind": "fine-tuned" if is_classifier(model) else "pre-training",
        "input_size": list(to_2tuple(trained.input_size)),
        "patch_size": model.patch_embed.patch_size,
        "in_chans": trained.in_chans,
        "mean": trained.mean,
        "std": trained.std,
        "crop_pct": crop_share(trained),
        "interpolation": "bicubic",
        "class_names": trained.class_names,
        "args": {name: getattr(trained, name) for name in names},
    }
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}


def crop_share(trained) -> float:
    """Share of the picture's sides that evaluation keeps."""
    sides = to_2tuple(trained.input_size)
    if min(sides) <= 224 < max(sides):
        logger.warning(
            "Evaluation crops the side up to 224 pixels and not the longer one; the file can only "
            "say that none is cropped, so its pictures will be a little larger in view"
        )
    return CROP_RATIO if max(sides) <= 224 else 1.0


def timm_name_and_args(model: nn.Module) -> tuple[str, dict]:
    """Name of a stock timm model, and how this one differs from it."""
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
    name, stock = "vit_base_patch16_224", BASE
    for other, sizes in STOCK.items():
        if all(own[key] == value for key, value in sizes.items() if key != "patch_size"):
            name, stock = other, sizes
    different = {k: v for k, v in own.items() if v != (STOCK_SIZES | stock)[k]}
    if is_classifier(model):
        pool = {"global_pool": "avg"} if model.global_pool else {}
        return name, different | {"num_classes": model.head.out_features} | pool
    norm = {} if hasattr(model, "norm") else {"final_norm": False}
    return name, different | {"num_classes": 0, "fc_norm": False} | norm


def make_timm(model: nn.Module, name: str, options: dict) -> nn.Module:
    """The same network as a stock timm model.

    Raises:
        RuntimeError: outputs differ by more than TOLERANCE.
    """
    other = timm.create_model(name, **options).eval()
    weights = model.state_dict()
    if not is_classifier(model):
        wanted = (*ENCODER_PARTS, "norm.")
        weights = {k: v for k, v in weights.items() if k.startswith(wanted)}
    other.load_state_dict(weights, strict=True)
    imgs = example_images(model, 2)
    with torch.no_grad():
        ours = model(imgs) if is_classifier(model) else model.forward_features(imgs).cls
        check_close(other(imgs), ours, TOLERANCE, "timm")
    return other


def timm_config(trained, name: str, options: dict, other: nn.Module) -> dict:
    """What timm's config.json says: how to build the model and how to prepare pictures for it."""
    config = dict(
        architecture=name,
        num_classes=other.num_classes,
        num_features=other.num_features,
        global_pool=other.global_pool,
        model_args=options,
        pretrained_cfg=dict(
            num_classes=other.num_classes,
            input_size=[trained.in_chans, *to_2tuple(trained.input_size)],
            fixed_input_size=True,
            crop_pct=crop_share(trained),
            crop_mode="center",
            interpolation="bicubic",
            mean=trained.mean,
            std=trained.std,
            first_conv="patch_embed.proj",
            classifier="head",
        ),
    )
    names = trained.class_names if other.num_classes else []
    return config | ({"label_names": names} if names else {})


def example_images(model: nn.Module, count: int) -> Tensor:
    """Noise of the model's size (count, C, H, W), the same at every call."""
    size = (count, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def check_close(theirs: Tensor, ours: Tensor, tolerance: float, name: str) -> None:
    """Compare outputs, relative to the largest of ours where that is above 1.

    Raises:
        RuntimeError: they differ.
    """
    difference = (theirs - ours).abs().max().item()
    if not difference <= tolerance * max(1.0, ours.abs().max().item()):
        raise RuntimeError(f"Outputs of {name} differ from ours by {difference:.2e}.")
    logger.info("Outputs of %s are ours: largest difference %.1e", name, difference)


def write_timm(model: nn.Module, trained, args) -> None:
    """Write the folder.

    Raises:
        UserError: it holds something already.
    """
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UserError(f"--out {args.out} exists and is not an empty folder; name a new one.")
    name, options = timm_name_and_args(model)
    other = make_timm(model, name, options)
    config, weights = args.out / "config.json", args.out / "model.safetensors"
    with (
        atomic_write(weights) as tmp_path,
        atomic_write(config) as tmp_config,
    ):
        save_file(other.state_dict(), tmp_path, metadata={"format": "pt"})
        text = json.dumps(timm_config(trained, name, options, other), indent=2)
        tmp_config.write_text(text + "\n", encoding="utf-8")
    call = ", ".join([f'"{name}"', *(f"{k}={v!r}" for k, v in options.items())])
    logger.info("Wrote %s and %s, the weights of timm.create_model(%s)", config, weights, call)


def write_safetensors(model: nn.Module, trained, args) -> None:
    """Write all weights, and what they belong to."""
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    with atomic_write(args.out) as tmp_path:
        save_file(tensors, tmp_path, metadata=describe(model, trained))
    logger.info("Wrote %d tensors of %s to %s", len(tensors), trained.model, args.out)


class FeaturesOnly(nn.Module):
    """imgs (B, C, H, W) -> cls (B, D), mean (B, D), patches (B, L, D)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, imgs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.model.forward_features(imgs)
        return features.cls, features.mean, features.patches


def write_onnx(model: nn.Module, trained, args) -> None:
    """Write the graph and compare its outputs where onnxruntime is installed.

    Raises:
        UserError: a package is missing.
    """
    for library in ("onnxscript", "onnx_ir"):
        logging.getLogger(library).setLevel(logging.WARNING)
    missing = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(
            f"--to onnx needs {' and '.join(missing)}: "
            "pip install onnx onnxscript onnxruntime (the last to check the result)."
        )
    names = ["logits"]
    if args.features or not is_classifier(model):
        model, names = FeaturesOnly(model).eval(), ["cls", "mean", "patches"]
    trunk = getattr(model, "model", model)
    imgs = example_images(trunk, 2)
    # strict: the other way of tracing takes the number of example images for a constant.
    shapes = {"imgs": {0: torch.export.Dim("batch", min=1)}}
    with torch.no_grad():
        graph = torch.export.export(model, (imgs,), dynamic_shapes=shapes, strict=True)
        program = torch.onnx.export(
            graph, input_names=["imgs"], output_names=names, dynamo=True, verbose=False
        )
    name_batch(program.model.graph)
    program.model.metadata_props.update(describe(trunk, trained))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if size > SINGLE_FILE_LIMIT:  # weights go to a file of their own, whose name is in the graph
        program.save(str(args.out), external_data=True)
    else:
        with atomic_write(args.out) as tmp_path:
            program.save(str(tmp_path), external_data=False)
    check_onnx(model, trunk, names, args.out)
    logger.info("Wrote %s: imgs -> %s", args.out, ", ".join(names))


def name_batch(graph) -> None:
    """Call the free dimension "batch" in inputs and outputs."""
    for value in (*graph.inputs, *graph.outputs):
        if isinstance(value.shape[0], int):
            raise RuntimeError(f"The batch of {value.name} was exported as {value.shape[0]}.")
        value.shape = type(value.shape)(["batch", *value.shape[1:]])


def check_onnx(model: nn.Module, trunk: nn.Module, names: list[str], path: Path) -> None:
    """Run the file with onnxruntime on one and on three pictures, and compare.

    Raises:
        RuntimeError: outputs differ by more than ONNX_TOLERANCE.
    """
    if not importlib.util.find_spec("onnxruntime"):
        logger.warning("Not checked: onnxruntime is not installed (pip install onnxruntime)")
        return
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for count in (1, 3):
        imgs = example_images(trunk, count)
        with torch.no_grad():
            ours = model(imgs)
        ours = (ours,) if isinstance(ours, Tensor) else ours
        theirs = session.run(names, {"imgs": imgs.numpy()})
        for name, a, b in zip(names, theirs, ours, strict=True):
            label = f"onnxruntime ({name}, {count} pictures)"
            check_close(torch.from_numpy(a), b, ONNX_TOLERANCE, label)


WRITERS = {"timm": write_timm, "safetensors": write_safetensors, "onnx": write_onnx}


def main(args: argparse.Namespace) -> None:
    """Write one form.

    Raises:
        UserError: --features with a form that does not know it, or as the writers say.
    """
    if args.features and args.to != "onnx":
        raise UserError("--features belongs to --to onnx; leave it out.")
    model, trained = load_trained(args.checkpoint, model=args.model)
    if is_classifier(model) and isinstance(model.head, nn.Sequential):
        fold_probe(model)
        trained.linear_probe = False
    WRITERS[args.to](model, trained, args)


if __name__ == "__main__":
    run.run(main, get_args_parser().parse_args())
