"""Export a checkpoint for other software: timm, transformers, safetensors, ONNX.

    python -m tools.export --checkpoint C --to timm --out FOLDER
    python -m tools.export --checkpoint C --to transformers --out FOLDER
    python -m tools.export --checkpoint C --to safetensors --out model.safetensors
    python -m tools.export --checkpoint C --to onnx --out model.onnx

timm          a folder as on the Hugging Face Hub (config.json, model.safetensors) for timm's own
              VisionTransformer, with the mean, std and crop of this checkpoint. Of a pre-training
              checkpoint the encoder, without a head.
              transformers opens it too, through TimmWrapper.
transformers  a folder for from_pretrained, with an image processor: a classifier, MAE with its
              decoder, or with --features, and of CrossMAE, the encoder. Square images only; needs
              the package transformers.
safetensors   all weights under their own names; the metadata describes the model.
onnx          imgs (B, C, H, W) with a dynamic batch -> logits (B, K); of a pre-training checkpoint,
              or with --features, -> cls (B, D), mean (B, D), patches (B, L, D). Needs the packages
              onnx and onnxscript, and onnxruntime to compare the outputs.

Shapes: B images, C channels, H height, W width, L patches, D encoder width, K classes.
"""

import argparse
import importlib.util
import json
import logging
import sys
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.layers import to_2tuple
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # when run by its path

from tools.formats.checks import (
    TOLERANCE,
    check_close,
    check_empty,
    crop_ratio,
    example_images,
    label_names,
)
from tools.formats.timm_model import to_timm
from tools.formats.transformers_model import write_transformers
from util.build import CLASSIFIER_DEFAULTS, PRETRAIN_DEFAULTS, SHARED_DEFAULTS, load_trained
from util.io.errors import UserError
from util.io.files import atomic_write
from util.run.flags import FlagParser, add_flag
from util.run.launch import launch

logger = logging.getLogger(__name__)

ONNX_TOLERANCE = 1e-4  # other kernels sum in another order
SINGLE_FILE_LIMIT = 1_800_000_000  # bytes of weights; an ONNX file cannot exceed 2 GiB


def write_timm(model: nn.Module, trained, args) -> None:
    """Write config.json and model.safetensors, after a comparison of the outputs."""
    check_empty(args.out)
    timm_model, name, options = to_timm(model)
    imgs = example_images(model, 2)
    with torch.no_grad():
        expected = model(imgs) if model.kind == "classifier" else model.forward_features(imgs).cls
        check_close(timm_model(imgs), expected, TOLERANCE, "timm")
    config, weights = args.out / "config.json", args.out / "model.safetensors"
    with atomic_write(weights) as tmp_weights, atomic_write(config) as tmp_config:
        save_file(timm_model.state_dict(), tmp_weights, metadata={"format": "pt"})
        text = json.dumps(timm_config(trained, name, options, timm_model), indent=2)
        tmp_config.write_text(text + "\n", encoding="utf-8")
    call = ", ".join([f'"{name}"', *(f"{k}={v!r}" for k, v in options.items())])
    logger.info("Wrote %s and %s, the weights of timm.create_model(%s)", config, weights, call)


def timm_config(trained, name: str, options: dict, timm_model: nn.Module) -> dict:
    """timm's config.json: how to build the model and how to preprocess its images."""
    num_classes = timm_model.num_classes
    config = dict(
        architecture=name,
        num_classes=num_classes,
        num_features=timm_model.num_features,
        global_pool=timm_model.global_pool,
        # num_classes is above; transformers passes it on and would meet it twice
        model_args={k: v for k, v in options.items() if k != "num_classes"},
        pretrained_cfg=dict(
            num_classes=num_classes,
            input_size=[trained.in_chans, *to_2tuple(trained.input_size)],
            fixed_input_size=True,
            crop_pct=crop_ratio(trained),
            crop_mode="center",
            interpolation="bicubic",
            mean=trained.mean,
            std=trained.std,
            first_conv="patch_embed.proj",
            classifier="head",
        ),
    )
    if num_classes:
        config["label_names"] = label_names(trained)
    return config


def write_safetensors(model: nn.Module, trained, args) -> None:
    """Write all weights, with `describe` as metadata."""
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    with atomic_write(args.out) as tmp_path:
        save_file(tensors, tmp_path, metadata=describe(model, trained))
    logger.info("Wrote %d tensors of %s to %s", len(tensors), trained.model, args.out)


def describe(model: nn.Module, trained) -> dict[str, str]:
    """Description of the model as strings, lists and numbers as JSON; no paths of the user."""
    is_classifier = model.kind == "classifier"
    defaults = CLASSIFIER_DEFAULTS if is_classifier else PRETRAIN_DEFAULTS
    names = ["model", *SHARED_DEFAULTS, *defaults] + ["nb_classes"] * is_classifier
    names.remove("grad_checkpointing")
    values = {
        "format": "pt",
        "model": trained.model,
        "kind": "fine-tuned" if is_classifier else "pre-training",
        "input_size": list(to_2tuple(trained.input_size)),
        "patch_size": model.patch_embed.patch_size,
        "in_chans": trained.in_chans,
        "mean": trained.mean,
        "std": trained.std,
        "crop_pct": crop_ratio(trained),
        "interpolation": "bicubic",
        "class_names": trained.class_names,
        "args": {name: getattr(trained, name) for name in names},
    }
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}


class FeaturesOnly(nn.Module):
    """imgs (B, C, H, W) -> cls (B, D), mean (B, D), patches (B, L, D)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, imgs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.model.forward_features(imgs)
        return features.cls, features.mean, features.patches


def write_onnx(model: nn.Module, trained, args) -> None:
    """Write the graph, then compare its outputs for two batch sizes."""
    missing = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(
            f"--to onnx needs {' and '.join(missing)}: "
            "pip install onnx onnxscript onnxruntime (the last to check the result)."
        )
    network, names = model, ["logits"]
    if args.features or model.kind != "classifier":
        network, names = FeaturesOnly(model).eval(), ["cls", "mean", "patches"]
    program = trace_onnx(network, example_images(model, 2), names)
    program.model.metadata_props.update(describe(model, trained))
    if sum(p.numel() * p.element_size() for p in model.parameters()) > SINGLE_FILE_LIMIT:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        program.save(str(args.out), external_data=True)  # the graph holds the second file's name
    else:
        with atomic_write(args.out) as tmp_path:
            program.save(str(tmp_path), external_data=False)
    for count in (1, 3):
        check_onnx(network, example_images(model, count), names, args.out)
    logger.info("Wrote %s: imgs -> %s", args.out, ", ".join(names))


def trace_onnx(network: nn.Module, imgs: Tensor, names: list[str]):
    """The network as an ONNX program whose batch dimension is dynamic and called "batch"."""
    for library in ("onnxscript", "onnx_ir"):
        logging.getLogger(library).setLevel(logging.WARNING)
    shapes = {"imgs": {0: torch.export.Dim("batch", min=1)}}
    with torch.no_grad():  # strict, because non-strict tracing fixes the batch size
        graph = torch.export.export(network, (imgs,), dynamic_shapes=shapes, strict=True)
        program = torch.onnx.export(
            graph, input_names=["imgs"], output_names=names, dynamo=True, verbose=False
        )
    for value in (*program.model.graph.inputs, *program.model.graph.outputs):
        if isinstance(value.shape[0], int):
            raise RuntimeError(f"The batch of {value.name} was exported as {value.shape[0]}.")
        value.shape = type(value.shape)(["batch", *value.shape[1:]])
    return program


def check_onnx(network: nn.Module, imgs: Tensor, names: list[str], path: Path) -> None:
    """Run the file with onnxruntime, if it is installed, and compare."""
    if not importlib.util.find_spec("onnxruntime"):
        logger.warning("Not checked: onnxruntime is not installed (pip install onnxruntime)")
        return
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = network(imgs)
    expected = (expected,) if isinstance(expected, Tensor) else expected
    outputs = map(torch.from_numpy, session.run(names, {"imgs": imgs.numpy()}))
    for name, *pair in zip(names, outputs, expected, strict=True):
        check_close(*pair, ONNX_TOLERANCE, f"onnxruntime ({name}, {len(imgs)} images)")


def fold_probe(model: nn.Module) -> None:
    """Replace a linear probe's BatchNorm and linear layer by one equivalent linear layer."""
    norm, linear = model.head
    with torch.no_grad():
        scale = (norm.running_var + norm.eps).rsqrt()  # (D,)
        linear.bias -= linear.weight @ (norm.running_mean * scale)
        linear.weight *= scale
    model.head = linear


WRITERS = {
    "timm": write_timm,
    "transformers": write_transformers,
    "safetensors": write_safetensors,
    "onnx": write_onnx,
}


def get_args_parser() -> FlagParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = FlagParser("python -m tools.export", description=__doc__, formatter_class=layout)
    flag = partial(add_flag, parser)
    text = "of main_pretrain.py or main_finetune.py: file or URL"
    flag("--checkpoint", str, None, text, required=True)
    flag("--to", str, None, "format to write", required=True, choices=sorted(WRITERS))
    flag("--out", Path, None, "folder for timm and transformers, else a file", required=True)
    text = "onnx, transformers: the encoder's features instead of logits or MAE's decoder"
    flag("--features", bool, False, text)
    flag("--model", str, None, "name of the model, if the checkpoint does not hold it")
    flag("--model_ema", bool, False, "export the average that main_finetune.py --model_ema kept")
    return parser


def main(args: argparse.Namespace) -> None:
    if args.features and args.to not in ("onnx", "transformers"):
        raise UserError("--features belongs to --to onnx or transformers; leave it out.")
    model, trained = load_trained(args.checkpoint, model=args.model, model_ema=args.model_ema)
    if model.kind == "classifier" and isinstance(model.head, nn.Sequential):
        fold_probe(model)
        trained.linear_probe = False
    WRITERS[args.to](model, trained, args)


if __name__ == "__main__":
    launch(main, get_args_parser().parse_args())
