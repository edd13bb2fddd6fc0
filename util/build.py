"""From flags, or from the arguments inside a checkpoint, to a model; from flags to a loss."""

import argparse
import logging
from pathlib import Path

import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import nn

import models_cross
import models_mae
import models_vit
from util.checkpoint import load_strict
from util.io.checkpoint_file import checkpoint_type, read_checkpoint, weights_of
from util.io.errors import CheckpointError, UserError
from util.layers.masking import num_visible_and_predicted
from util.run.checks import is_mixing, set_mean_std
from util.run.ema import with_ema_weights

logger = logging.getLogger(__name__)

SHARED_DEFAULTS = dict(
    input_size=224, patch_size=None, in_chans=3, mean=None, std=None, grad_checkpointing=False
)
CROSS_DEFAULTS = dict(weight_fm=False, use_fm=[-1], use_input=False, self_attn=False)
PRETRAIN_DEFAULTS = dict(
    cross_mae=False,
    decoder_depth=8,
    decoder_embed_dim=None,
    **CROSS_DEFAULTS,
    mask_ratio=0.75,
    kept_mask_ratio=0.75,
    norm_pix_loss=False,
)
CLASSIFIER_DEFAULTS = dict(drop_path=0.0, global_pool=True)


def build_pretrain_model(args, attention_backend=None, **sizes) -> nn.Module:
    """The MAE or CrossMAE that the flags describe.

    Args:
        sizes: arguments of the model that replace its own, such as embed_dim.

    Raises:
        UserError: unknown name, or flags that do not fit together.
    """
    options = dict(
        patch_size=args.patch_size,
        decoder_embed_dim=args.decoder_embed_dim,
        decoder_depth=args.decoder_depth,
        norm_pix_loss=args.norm_pix_loss,
    )
    if args.cross_mae:
        options |= {name: getattr(args, name) for name in CROSS_DEFAULTS}
    module = models_cross if args.cross_mae else models_mae
    options |= sizes
    model = build(find_factory(module, "mae_vit_", args.model), args, options, attention_backend)
    kept_mask_ratio = args.kept_mask_ratio if args.cross_mae else args.mask_ratio
    # For its error: ratios that leave no patch to see or to predict end here, not in training.
    num_visible_and_predicted(model.patch_embed.num_patches, args.mask_ratio, kept_mask_ratio)
    return model


def build_classifier(args, attention_backend=None) -> nn.Module:
    """The classifier that the flags describe.

    Raises:
        UserError: unknown name, or sizes that do not fit.
    """
    options = dict(
        patch_size=args.patch_size,
        num_classes=args.nb_classes,
        drop_path_rate=args.drop_path,
        global_pool=args.global_pool,
    )
    return build(find_factory(models_vit, "vit_", args.model), args, options, attention_backend)


def build_criterion(args, samples):
    """(loss, mixup function or None); with mixup, label smoothing goes into the mixed targets.

    Args:
        samples: (path, class index) of every training image.
    """
    if is_mixing(args):
        logger.info("Mixup is activated!")
        mixup_fn = Mixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=args.nb_classes,
        )
        return SoftTargetCrossEntropy(), mixup_fn
    weight = None
    if args.class_weights == "balanced":
        labels = torch.tensor([label for _, label in samples])
        counts = labels.bincount(minlength=args.nb_classes)
        weight = (len(labels) / (args.nb_classes * counts)).to(args.device)
    return nn.CrossEntropyLoss(weight, label_smoothing=args.smoothing), None


def build(factory, args, options: dict, attention_backend) -> nn.Module:
    """Call a factory; options that are None keep its defaults."""
    model = factory(
        img_size=args.input_size,
        in_chans=args.in_chans,
        attention_backend=attention_backend,
        **{name: value for name, value in options.items() if value is not None},
    )
    model.set_recompute("blocks" if args.grad_checkpointing else args.recompute)
    return model


def find_factory(module, prefix: str, name: str):
    """The factory of that name.

    Raises:
        UserError: there is none; lists the names.
    """
    names = sorted(n for n in vars(module) if n.startswith(prefix))
    if name not in names:
        raise UserError(f"There is no --model {name}; choose one of {', '.join(names)}.")
    return getattr(module, name)


def load_trained(
    source: str | Path, attention_backend=None, model_ema: bool = False, **fallbacks
) -> tuple[nn.Module, argparse.Namespace]:
    """Model of a checkpoint in evaluation mode on the CPU, and the arguments it was trained with.

    Model, input size, patch size, channels, mean and std all come from the file.

    Args:
        source: path, https:// or hf:// URL.
        model_ema: the moving average that --model_ema kept, instead of the weights.
        fallbacks: arguments that count where the file does not say them, such as
            model="mae_vit_base_patch16".

    Raises:
        CheckpointError: the file cannot be read, or does not say which model it holds.
    """
    checkpoint = read_checkpoint(source)
    if model_ema:
        checkpoint = with_ema_weights(checkpoint, str(source))
    return build_trained(checkpoint, str(source), attention_backend, **fallbacks)


def build_trained(
    checkpoint: dict, source: str, attention_backend=None, **fallbacks
) -> tuple[nn.Module, argparse.Namespace]:
    """As load_trained, of a checkpoint that was read already."""
    weights = weights_of(checkpoint, source)
    found = checkpoint_type(weights)
    if found not in ("pre-training", "fine-tuned"):
        raise CheckpointError(
            f"{source} is a checkpoint of type {found!r}; one written by main_pretrain.py or "
            "main_finetune.py is needed."
        )
    is_classifier = found == "fine-tuned"
    known = {k: v for k, v in fallbacks.items() if v is not None}
    known |= {k: v for k, v in checkpoint.get("args", {}).items() if v is not None}
    if "model" not in known:
        raise CheckpointError(f"{source} does not say which model it holds; name it with --model.")
    defaults = SHARED_DEFAULTS | (CLASSIFIER_DEFAULTS if is_classifier else PRETRAIN_DEFAULTS)
    args = argparse.Namespace(
        **{**defaults, **known, "grad_checkpointing": False, "recompute": "none"}
    )
    if isinstance(args.input_size, list):
        args.input_size = tuple(args.input_size)
    set_mean_std(args)
    args.class_names = checkpoint.get("class_names", [])
    if is_classifier:
        is_probe = "head.1.bias" in weights
        args.nb_classes = len(weights["head.1.bias" if is_probe else "head.bias"])
        args.global_pool = "fc_norm.weight" in weights
        model = build_classifier(args, attention_backend)
        if is_probe:
            model.freeze_for_probe()
    else:
        model = build_pretrain_model(args, attention_backend)
    load_strict(model, weights, source)
    return model.eval(), args
