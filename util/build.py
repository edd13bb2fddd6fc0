"""From flags, or from the arguments inside a checkpoint, to a model."""

import argparse
from pathlib import Path

from torch import nn

import models_cross
import models_mae
import models_vit
from util.checkpoint import load_strict
from util.io.checkpoint_file import checkpoint_type, read_checkpoint, weights_of
from util.io.errors import CheckpointError, UserError
from util.layers.masking import num_visible_and_predicted
from util.run.flags import set_mean_std

PRETRAIN_DEFAULTS = dict(
    cross_mae=False,
    decoder_depth=8,
    decoder_embed_dim=None,
    weight_fm=False,
    use_fm=[-1],
    use_input=False,
    self_attn=False,
    mask_ratio=0.75,
    kept_mask_ratio=0.75,
    norm_pix_loss=False,
)
CLASSIFIER_DEFAULTS = dict(drop_path=0.0, global_pool=True)
SHARED_DEFAULTS = dict(
    input_size=224, patch_size=None, in_chans=3, mean=None, std=None, grad_checkpointing=False
)


def build_pretrain_model(args, attention_backend=None) -> nn.Module:
    """The MAE or CrossMAE that the flags describe.

    Raises:
        UserError: unknown name, or flags that do not go together.
    """
    module = models_cross if args.cross_mae else models_mae
    options = dict(
        img_size=args.input_size,
        in_chans=args.in_chans,
        decoder_depth=args.decoder_depth,
        norm_pix_loss=args.norm_pix_loss,
        attention_backend=attention_backend,
    )
    for name in ("patch_size", "decoder_embed_dim"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    if args.cross_mae:
        for name in ("weight_fm", "use_fm", "use_input", "self_attn"):
            options[name] = getattr(args, name)
    model = find_factory(module, "mae_vit_", args.model)(**options)
    model.grad_checkpointing = args.grad_checkpointing
    kept_mask_ratio = args.kept_mask_ratio if args.cross_mae else args.mask_ratio
    num_visible_and_predicted(model.patch_embed.num_patches, args.mask_ratio, kept_mask_ratio)
    return model


def build_classifier(args, attention_backend=None) -> nn.Module:
    """The classifier that the flags describe.

    Raises:
        UserError: unknown name, or sizes that do not fit.
    """
    options = {} if args.patch_size is None else {"patch_size": args.patch_size}
    model = find_factory(models_vit, "vit_", args.model)(
        img_size=args.input_size,
        in_chans=args.in_chans,
        num_classes=args.nb_classes,
        drop_path_rate=args.drop_path,
        global_pool=args.global_pool,
        attention_backend=attention_backend,
        **options,
    )
    model.grad_checkpointing = args.grad_checkpointing
    return model


def find_factory(module, prefix: str, name: str):
    """The factory of that name.

    Raises:
        UserError: there is none; lists those there are.
    """
    names = sorted(n for n in vars(module) if n.startswith(prefix))
    if name not in names:
        raise UserError(f"There is no --model {name}; choose one of {', '.join(names)}.")
    return getattr(module, name)


def load_trained(
    source: str | Path, attention_backend=None, **changes
) -> tuple[nn.Module, argparse.Namespace]:
    """Model of a checkpoint in evaluation mode on the CPU, and the arguments it was made with.

    Everything is read from the file: kind, size, patch, channels, mean and deviation.

    Args:
        changes: arguments to set where the file does not say, such as model="mae_vit_base_patch16".

    Raises:
        CheckpointError: the file cannot be read, or does not say which model it holds.
    """
    checkpoint = read_checkpoint(source)
    weights = weights_of(checkpoint, str(source))
    kind = checkpoint_type(weights)
    if kind not in ("pre-training", "fine-tuned"):
        raise CheckpointError(
            f"{source} is a checkpoint of kind {kind!r}; one written by main_pretrain.py or "
            "main_finetune.py is needed."
        )
    is_classifier = kind == "fine-tuned"
    known = {k: v for k, v in changes.items() if v is not None}
    known |= {k: v for k, v in checkpoint.get("args", {}).items() if v is not None}
    if "model" not in known:
        raise CheckpointError(f"{source} does not say which model it holds; name it with --model.")
    defaults = SHARED_DEFAULTS | (CLASSIFIER_DEFAULTS if is_classifier else PRETRAIN_DEFAULTS)
    args = argparse.Namespace(**{**defaults, **known, "grad_checkpointing": False})
    if isinstance(args.input_size, list):
        args.input_size = tuple(args.input_size)
    set_mean_std(args)
    args.class_names = checkpoint.get("class_names", [])
    if is_classifier:
        is_probe = "head.1.bias" in weights
        args.nb_classes = len(weights["head.1.bias" if is_probe else "head.bias"])
        args.global_pool = "fc_norm.weight" in weights
    model = (build_classifier if is_classifier else build_pretrain_model)(args, attention_backend)
    if is_classifier and is_probe:
        model.freeze_for_probe()
    load_strict(model, weights, str(source))
    return model.eval(), args
