"""Parameter groups: weight decay in pre-training, layer-wise learning rates in fine-tuning.

The order of groups and of parameters inside them numbers the tensors of a saved optimizer state, so
it is part of the checkpoint format.
"""

from torch import nn


def param_groups_weight_decay(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: tensors of at most one dimension without decay, then the rest with it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
    ]


def get_layer_id_for_vit(name: str, num_layers: int) -> int:
    """Layer id of a parameter: 0 for the embedding, i + 1 for blocks.i, num_layers for the rest.

    Args:
        num_layers: number of blocks + 1.
    """
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return num_layers


def param_groups_lrd(
    model: nn.Module, weight_decay: float, no_weight_decay_list=(), layer_decay: float = 0.75
) -> list[dict]:
    """One group per (layer, decayed or not), lr_scale = layer_decay ** (num_layers - layer id).

    Layer-wise decay of the learning rate as in BEiT (arXiv 2106.08254), section on fine-tuning.
    """
    num_layers = len(model.blocks) + 1
    groups: dict[tuple[int, bool], dict] = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        layer = get_layer_id_for_vit(name, num_layers)
        decayed = param.ndim > 1 and name not in no_weight_decay_list
        group = groups.setdefault(
            (layer, decayed),
            {
                "lr_scale": layer_decay ** (num_layers - layer),
                "weight_decay": weight_decay if decayed else 0.0,
                "params": [],
            },
        )
        group["params"].append(param)
    return list(groups.values())
