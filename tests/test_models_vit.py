"""The classifier: stored logits, losses and gradients, loading, and timm's own class."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from parity_data import (
    assert_gradients_match,
    assert_match,
    assert_rates_match,
    build,
    build_loaded,
    find_case,
    note,
    parity_cases,
    part,
    read_json,
    tensors_of,
)
from timm.layers import DropPath
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer as TimmViT

from util.checkpoint import load_encoder


@pytest.mark.parametrize("case", parity_cases("vit", "vit"))
def test_logits_losses_and_gradients(case):
    """Both heads; the losses used in fine-tuning; gradients of the label-smoothing loss."""
    tensors = tensors_of(case)
    model = build_loaded(case, tensors)
    logits = model(tensors["imgs"])
    assert_match(logits, tensors["logits"], "logits")
    labels, smoothed = tensors["labels"].long(), LabelSmoothingCrossEntropy(0.1)
    loss = smoothed(logits, labels)
    soft = SoftTargetCrossEntropy()(logits, tensors["soft_targets"])
    assert_match(loss.item(), case["loss_label_smoothing_0p1"], "loss, smoothed labels", 1e-5, 0)
    assert_match(soft.item(), case["loss_soft_target"], "loss, soft targets", 1e-5, 0)
    plain = F.cross_entropy(logits, labels).item()
    assert_match(plain, case["loss_cross_entropy"], "loss, cross-entropy", 1e-5, 0)
    loss.backward()
    assert_gradients_match(model, tensors)


def test_drop_path_rates(tiny_vit):
    """Linear from 0 over depth, both branches of a block alike."""
    expected = read_json("vit")["drop_path"]
    model = tiny_vit(depth=expected["depth"], drop_path_rate=expected["rate"])
    for block, rates in zip(model.blocks, expected["per_block_attn_and_mlp"], strict=True):
        found = {m.drop_prob for m in block.modules() if isinstance(m, DropPath)} or {0.0}
        assert len(found) == 1
        assert_rates_match([*found] * 2, rates, "drop path rate", 1e-6)


@pytest.mark.parametrize("case", parity_cases("vit", "load"))
def test_loading_a_pretrained_file(case):
    """Interpolated table, missing and unexpected names, logits once the missing ones are given."""
    tensors = tensors_of(case)
    source = build(case["src_module"], case["src_ctor"])
    source.load_state_dict(part(tensors, "src"), strict=True)
    model = build(case["module"], case["ctor"])
    result = load_encoder(model, dict(source.state_dict()))
    assert sorted(result.missing) == sorted(case["missing_keys"])
    assert sorted(result.unexpected) == sorted(case["unexpected_keys"])
    note("missing and unexpected names")
    assert_match(model.pos_embed, tensors["pos_embed_after"], "pos_embed")
    fill = part(tensors, "fill")
    assert fill.keys() == set(case["missing_keys"])
    model.load_state_dict(fill, strict=False)
    assert_match(model(tensors["imgs"]), tensors["logits"], "logits")


@pytest.mark.parametrize("num_classes, missing", [(5, []), (6, ["head.bias", "head.weight"])])
def test_a_head_of_another_size_is_dropped(tiny_vit, num_classes, missing):
    """A classifier file loads whole, or without its head."""
    source, model = tiny_vit(seed=1), tiny_vit(seed=2, num_classes=num_classes)
    result = load_encoder(model, source.state_dict())
    assert sorted(result.missing) == missing and not result.unexpected
    assert model.cls_token.equal(source.cls_token)


@pytest.mark.parametrize("global_pool", [True, False])
def test_equals_timm_on_the_same_weights(global_pool):
    """Same ordered names, same logits as timm's stock class."""
    case = find_case("vit", "avg" if global_pool else "cls")
    tensors = tensors_of(case)
    ours = build_loaded(case, tensors).eval()
    ctor = dict(case["ctor"], global_pool="avg" if global_pool else "token")
    norm = partial(torch.nn.LayerNorm, eps=ctor.pop("norm_eps"))
    theirs = TimmViT(**ctor, qkv_bias=True, norm_layer=norm).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(part(tensors, "w"))
    with torch.no_grad():
        torch.testing.assert_close(
            ours(tensors["imgs"]), theirs(tensors["imgs"]), rtol=0, atol=1e-6
        )
