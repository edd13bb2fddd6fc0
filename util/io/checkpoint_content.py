"""What a checkpoint may contain: one check of types and ranges before anything is used.

Weights are checked against the model, optimizer tensors against their parameters (util/checkpoint);
here are the entries around them.
"""

import math
import random

import numpy as np
import torch
from torch import Tensor

from util.io.errors import CheckpointError

LIMIT = 10**9  # epochs, iterations, images
MAX_SIDE = 2**15  # pixels


def is_count(value, low: int = 0, high: int = LIMIT) -> bool:
    return type(value) is int and low <= value <= high


def is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def is_ratio(value) -> bool:
    return is_number(value) and 0 < value < 1


def is_size(value) -> bool:
    sides = value if isinstance(value, (list, tuple)) else [value]
    return len(sides) in (1, 2) and all(is_count(side, 1, MAX_SIDE) for side in sides)


def is_numbers(value) -> bool:
    return isinstance(value, (list, tuple)) and all(map(is_number, value))


def is_names(value) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


def is_dict(value) -> bool:
    return isinstance(value, dict)


def is_state_dict(value) -> bool:
    return is_dict(value) and all(isinstance(x, Tensor) for x in value.values())


def is_optimizer(value) -> bool:
    groups = value.get("param_groups") if is_dict(value) else None
    return (
        isinstance(groups, list)
        and all(map(is_group, groups))
        and is_dict(value.get("state"))
        and all(map(is_dict, value["state"].values()))
    )


def is_group(value) -> bool:
    if not is_dict(value) or not isinstance(value.get("params"), list):
        return False
    return all(map(is_count, value["params"])) and is_number(value.get("lr"))


def is_meters(value) -> bool:
    return is_dict(value) and all(
        is_numbers(meter) and len(meter) == 2 and meter[1] >= 0 for meter in value.values()
    )


def are_random_states(value) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(is_random_state, value))


def is_random_state(state) -> bool:
    """Whether util.rng.set_random_state will accept it; tried on generators of its own."""
    try:
        version, numbers, gauss = state["python"]
        random.Random().setstate((version, tuple(numbers.tolist()), gauss))
        name, keys, *rest = state["numpy"]
        np.random.RandomState().set_state((name, keys.numpy().astype(np.uint32), *rest))
        torch.Generator().set_state(state["torch"])
    except Exception:  # anything else than a state fails in one of many ways
        return False
    return "cuda" not in state or isinstance(state["cuda"], Tensor)


ENTRIES = {
    "epoch": (lambda x: is_count(x, -1), "an epoch from -1"),
    "optimizer": (is_optimizer, "an optimizer's state dict"),
    "scaler": (lambda x: is_dict(x) and all(map(is_number, x.values())), "a dict of numbers"),
    "model_ema": (is_state_dict, "a dict of tensors"),
    "args": (is_dict, "a dict"),
    "class_names": (is_names, "a list of names"),
    "state": (is_dict, "a dict"),
}
STATE = {
    "iteration": (is_count, "an iteration from 0"),
    "meters": (is_meters, "totals and counts by name"),
    "best": (lambda x: x is None or is_number(x), "a number or None"),
    "best_by": (lambda x: x is None or isinstance(x, str), "the name of an accuracy or None"),
    "num_images": (lambda x: x is None or is_count(x, 1), "a positive count or None"),
    "random": (are_random_states, "random states, one per rank"),
    **dict.fromkeys(
        ("world_size", "batch_size", "accum_iter"), (lambda x: is_count(x, 1), "a positive count")
    ),
    "seed": (lambda x: is_count(x, 0, 2**64 - 1), "a seed"),
}
FLAG = (lambda x: type(x) is bool, "True or False")
SIDE = (lambda x: x is None or is_count(x, 1, MAX_SIDE), "a positive count or None")
RATIO = (is_ratio, "a ratio between 0 and 1")
NUMBERS = (lambda x: x is None or is_numbers(x), "a list of numbers or None")
ARGS = {  # those that a model is built from
    "model": (lambda x: isinstance(x, str), "a name"),
    "input_size": (is_size, f"a side, or height and width, from 1 to {MAX_SIDE}"),
    **dict.fromkeys(("patch_size", "decoder_embed_dim", "nb_classes"), SIDE),
    **dict.fromkeys(("in_chans", "decoder_depth"), (lambda x: is_count(x, 1, 4096), "a count")),
    **dict.fromkeys(("mean", "std"), NUMBERS),
    "use_fm": (is_numbers, "a list of encoder blocks"),
    "drop_path": (lambda x: is_number(x) and 0 <= x < 1, "in [0, 1)"),
    **dict.fromkeys(("mask_ratio", "kept_mask_ratio"), RATIO),
    **dict.fromkeys(
        ("cross_mae", "weight_fm", "use_input", "self_attn", "norm_pix_loss", "global_pool"), FLAG
    ),
}


def check_content(checkpoint: dict, source) -> None:
    """Raises CheckpointError for an entry of the wrong type or range: its name, value, remedy."""
    check_entries(checkpoint, ENTRIES, "", source)
    check_entries(checkpoint.get("state", {}), STATE, "state.", source)
    check_entries(checkpoint.get("args", {}), ARGS, "args.", source)


def check_entries(entries: dict, expected: dict, prefix: str, source) -> None:
    for name, (is_valid, description) in expected.items():
        if name in entries and not is_valid(entries[name]):
            text = " ".join(repr(entries[name]).split())
            raise CheckpointError(
                f"{source} is not a valid checkpoint: {prefix}{name} is {text[:60]}, expected "
                f"{description}; use another copy, or take its weights alone (entry 'model')."
            )
