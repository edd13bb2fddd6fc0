"""The classifier against stored logits, losses, gradients and timm; loading of encoders."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from parity_data import (
    assert_gradients_match,
    assert_match,
    assert_match_relative,
    build_model,
    build_with_weights,
    find_case,
    load_tensors,
    parity_cases,
    read_json,
    record,
    select,
)
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer as TimmViT

from util.checkpoint import load_encoder
from util.layers.blocks import DropPath


@pytest.mark.parametrize("case", parity_cases("vit", "vit"))
def test_logits_losses_and_gradients_match_stored_values(case):
    """Both heads; the losses used in fine-tuning; gradients of the label-smoothing loss."""
    tensors = load_tensors(case)
    model = build_with_weights(case, tensors)
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


def test_initialization_matches_timm(tiny_vit):
    """Mean and std of every parameter of 40 models, in units of what 40 models of timm have."""
    options = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5)
    options |= dict(global_pool="avg", fc_norm=True)
    ours, timms = {}, {}
    for seed in range(40):
        torch.manual_seed(1000 + seed)
        for values, model in ((timms, TimmViT(**options)), (ours, tiny_vit(seed))):
            for name, param in model.named_parameters():
                values.setdefault(name, []).append(param.detach().flatten())
    assert ours.keys() == timms.keys()
    for name in ours:
        own, expected = torch.cat(ours[name]), torch.cat(timms[name])
        count, std = len(own), expected.std()
        assert abs(own.mean() - expected.mean()) <= 6 * std / count**0.5, name
        assert abs(own.std() / std - 1) <= 8 / count**0.5 if std else own.std() == 0, name


def test_head_for_a_pretrained_encoder(tiny_vit):
    """Weights of std 2e-5; of a linear probe 0.01."""
    model = tiny_vit(num_classes=1000)
    model.init_head()
    assert abs(model.head.weight.std() / 2e-5 - 1) < 0.03
    model.freeze_for_probe()
    model.init_head()
    assert abs(model.head[1].weight.std() / 0.01 - 1) < 0.03


def test_drop_path_rates(tiny_vit):
    """Linear from 0 over depth, equal in both branches of a block."""
    expected = read_json("vit")["drop_path"]
    model = tiny_vit(depth=expected["depth"], drop_path_rate=expected["rate"])
    for block, rates in zip(model.blocks, expected["per_block_attn_and_mlp"], strict=True):
        drop_probs = {m.drop_prob for m in block.modules() if isinstance(m, DropPath)} or {0.0}
        assert len(drop_probs) == 1
        assert_match_relative([*drop_probs] * 2, rates, "drop path rate", 1e-6)


@pytest.mark.parametrize("case", parity_cases("vit", "load"))
def test_load_encoder_matches_stored_values(case):
    """Interpolated pos_embed, missing and unexpected keys; logits after filling missing keys."""
    tensors = load_tensors(case)
    source = build_model(case["src_module"], case["src_ctor"])
    source.load_state_dict(select(tensors, "src"), strict=True)
    model = build_model(case["module"], case["ctor"])
    result = load_encoder(model, dict(source.state_dict()))
    assert sorted(result.missing_keys) == sorted(case["missing_keys"])
    assert sorted(result.unexpected_keys) == sorted(case["unexpected_keys"])
    record("missing and unexpected keys")
    assert_match(model.pos_embed, tensors["pos_embed_after"], "pos_embed")
    fill = select(tensors, "fill")
    assert fill.keys() == set(case["missing_keys"])
    model.load_state_dict(fill, strict=False)
    assert_match(model(tensors["imgs"]), tensors["logits"], "logits")


@pytest.mark.parametrize("num_classes, missing", [(5, []), (6, ["head.bias", "head.weight"])])
def test_head_of_another_size_is_dropped(tiny_vit, num_classes, missing):
    """A classifier loads completely, or without its head."""
    source, model = tiny_vit(seed=1), tiny_vit(seed=2, num_classes=num_classes)
    result = load_encoder(model, source.state_dict())
    assert sorted(result.missing_keys) == missing and not result.unexpected_keys
    assert model.cls_token.equal(source.cls_token)


@pytest.mark.parametrize("global_pool", [True, False])
def test_matches_timm_with_the_same_weights(global_pool):
    """Same names in the same order, same logits."""
    case = find_case("vit", "avg" if global_pool else "cls")
    tensors = load_tensors(case)
    model = build_with_weights(case, tensors).eval()
    ctor = dict(case["ctor"], global_pool="avg" if global_pool else "token")
    norm = partial(torch.nn.LayerNorm, eps=ctor.pop("norm_eps"))
    timm_model = TimmViT(**ctor, qkv_bias=True, norm_layer=norm).eval()
    assert list(model.state_dict()) == list(timm_model.state_dict())
    timm_model.load_state_dict(select(tensors, "w"))
    with torch.no_grad():
        torch.testing.assert_close(
            model(tensors["imgs"]), timm_model(tensors["imgs"]), rtol=0, atol=1e-6
        )
