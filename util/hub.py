"""What the entries of hubconf.py do: a model by kind and size, with or without weights."""

from torch import nn

import models_cross
import models_mae
import models_vit
from util.build import build_trained
from util.checkpoint import load_encoder, stored_grid
from util.io.checkpoint_file import checkpoint_type, read_checkpoint, weights_of
from util.io.errors import CheckpointError, UserError
from util.io.published import published_url
from util.layers.vit import Encoder

MODULES = dict(crossmae=models_cross, mae=models_mae, classifier=models_vit, encoder=models_vit)


def load_model(kind: str, size: str, weights: str, checkpoint: str, options: dict) -> nn.Module:
    """A model, newly initialized or with the weights of a checkpoint.

    Args:
        kind: "crossmae", "mae", "classifier" or "encoder".
        size: name of the classifier of that size, such as vit_base_patch16.
        weights: short name of a published checkpoint, or ''.
        checkpoint: path or URL of another one, or ''.
        options: arguments of the model.

    Raises:
        UserError: weights and checkpoint are both given, or options that do not act.
        CheckpointError: the checkpoint holds a model of another kind or size.
    """
    if weights and checkpoint:
        raise UserError("weights names a published checkpoint, checkpoint another: give one.")
    source = published_url(weights, kind == "classifier") if weights else str(checkpoint)
    factory = getattr(MODULES[kind], size if MODULES[kind] is models_vit else f"mae_{size}")
    if kind == "classifier":
        options = {"global_pool": True} | options  # the default of main_finetune.py
    if not source:
        model = factory(**options)
        return Encoder(model) if kind == "encoder" else model
    content = read_checkpoint(source)
    stored = weights_of(content, source)
    found = checkpoint_type(stored)
    if kind == "classifier" and (found != "fine-tuned" or options != {"global_pool": True}):
        return fill_classifier(factory, options, content, stored, source)
    if options and kind != "classifier":
        raise UserError(f"{', '.join(options)}: the checkpoint decides this; leave it out.")
    model, args = build_trained(
        content, source, model=size if found == "fine-tuned" else f"mae_{size}"
    )
    expected = getattr(MODULES[model.kind], size if found == "fine-tuned" else f"mae_{size}")
    if kind not in (model.kind, "encoder") or getattr(MODULES[model.kind], args.model) != expected:
        raise CheckpointError(
            f"{source} holds a {model.kind} model, {args.model}, not the {kind} of size {size}; "
            "load it by its own name."
        )
    return Encoder(model) if kind == "encoder" else model


def fill_classifier(factory, options: dict, checkpoint: dict, weights: dict, source: str):
    """A classifier with these options and the encoder of a checkpoint; its head too if it fits."""
    if "head.bias" in weights:
        options = {"num_classes": len(weights["head.bias"])} | options
    model = factory(**options)
    grid = stored_grid(checkpoint, weights, model.patch_embed.patch_size)
    if "head.weight" in load_encoder(model, weights, grid).missing_keys:
        model.init_head()
    return model.eval()
