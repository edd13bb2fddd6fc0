"""Parameter groups: their order determines the tensor indices of a saved optimizer state."""

import importlib

import pytest
import torch
from parity_data import assert_match_relative, parity_cases, record

from util.lr_decay import param_groups_lrd, param_groups_weight_decay


def describe_groups(model, groups, *entries: str) -> list[dict]:
    """These entries of each group, and the names of its parameters."""
    names = {id(param): name for name, param in model.named_parameters()}
    return [
        {entry: group[entry] for entry in entries}
        | {"params": [names[id(param)] for param in group["params"]]}
        for group in groups
    ]


def build_on_meta(module: str, case: dict):
    with torch.device("meta"):
        return getattr(importlib.import_module(module), case["factory"])(**case["kwargs"])


@pytest.mark.parametrize("case", parity_cases("schedules", "lrd"))
def test_layer_decay_groups(case):
    """28 groups of ViT-B: lr_scale, weight decay and parameters, in order."""
    model = build_on_meta("models_vit", case)
    assert set(model.no_weight_decay()) <= set(case["no_weight_decay_names"])
    assert {"cls_token", "pos_embed"} <= set(model.no_weight_decay())
    groups = param_groups_lrd(
        model, case["weight_decay"], model.no_weight_decay(), case["layer_decay"]
    )
    assert len(groups) == case["num_groups"]
    described = describe_groups(model, groups, "lr_scale", "weight_decay")
    for group, expected in zip(described, case["groups"], strict=True):
        assert_match_relative(
            group.pop("lr_scale"), expected.pop("lr_scale"), "lr_scale of a group"
        )
        assert group == expected
        record("members of a group, in order")


@pytest.mark.parametrize("case", parity_cases("schedules", "wd"))
def test_weight_decay_groups(case):
    """Two groups in pre-training; frozen position embeddings are in neither."""
    model = build_on_meta(case["module"], case)
    groups = param_groups_weight_decay(model, case["groups"][1]["weight_decay"])
    assert describe_groups(model, groups, "weight_decay") == case["groups"]
    record("weight decay groups, in order")


def test_every_trainable_parameter_is_in_exactly_one_group(tiny_vit, tiny_cross):
    vit, cross = tiny_vit(), tiny_cross()
    for model, groups in (
        (vit, param_groups_lrd(vit, 0.05, vit.no_weight_decay(), 0.5)),
        (cross, param_groups_weight_decay(cross, 0.05)),
    ):
        grouped = [id(param) for group in groups for param in group["params"]]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
