"""Models for torch.hub: torch.hub.load(REPOSITORY, NAME, weights=..., checkpoint=..., OPTIONS).

NAME is crossmae_SIZE or mae_SIZE (pre-training: `forward` returns the loss), SIZE (classifier:
logits) or SIZE_encoder (Features: cls, patches and their mean), as in vit_base_patch16_encoder.
"""

import pathlib
import sys

dependencies = ["torch", "torchvision", "timm", "numpy", "PIL", "safetensors", "tqdm"]

_KINDS = {  # of a model, with the pattern of its name
    "crossmae": "crossmae_{}",
    "mae": "mae_{}",
    "classifier": "{}",
    "encoder": "{}_encoder",
}
_SIZES = (
    "vit_mini_patch4",
    "vit_small_patch16",
    "vit_base_patch16",
    "vit_large_patch16",
    "vit_huge_patch14",
)


def _refuse_other_util() -> None:
    """Raises ImportError if the caller has imported another module named util."""
    root = pathlib.Path(__file__).resolve().parent
    other = getattr(sys.modules.get("util"), "__file__", None)
    if other and root not in pathlib.Path(other).resolve().parents:
        raise ImportError(
            f"{other} is imported as util, the name of a package of {root}; load the model in "
            "another process, or rename that module."
        )


def _entry(kind: str, size: str):
    def load(weights: str = "", checkpoint: str = "", **options):
        _refuse_other_util()
        from util.hub import load_model

        return load_model(kind, size, weights, checkpoint, options)

    load.__name__ = _KINDS[kind].format(size)
    load.__doc__ = f"""The {kind} of size {size}, in evaluation mode if it has weights.

    Args:
        weights: short name of a published checkpoint, such as "vitb-kmr0.75".
        checkpoint: path, https:// or hf:// URL of another one. Without both, the model is newly
            initialized. A classifier takes the encoder of a pre-training checkpoint and gets a new
            head.
        options: arguments of the model, such as num_classes, drop_path_rate or img_size; those of
            pre-training models and encoders come from the checkpoint.
    """
    return load


globals().update(
    {_KINDS[kind].format(size): _entry(kind, size) for kind in _KINDS for size in _SIZES}
)
