"""Full-size models with formula weights: losses, outputs, and first blocks separately."""

import importlib

import numpy as np
import pytest
import torch
from parity_data import assert_match, make_formula_weights, parity_cases, uniform

ATOL = 1e-4


def get_factory(case):
    return getattr(importlib.import_module(case["module"]), case["factory"])


def build_with_formula_weights(case):
    """The model of a case; frozen position embeddings stay as constructed."""
    model = get_factory(case)(**case["kwargs"]).eval()
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    result = model.load_state_dict(make_formula_weights(trainable, case["seed"]), strict=False)
    assert set(result.missing_keys) <= {"pos_embed", "decoder_pos_embed"}
    return model


@pytest.mark.parametrize("case", parity_cases("factories", "factory"))
@torch.no_grad()
def test_full_size_output(case):
    """Loss and predictions, or logits, of one image."""
    model = build_with_formula_weights(case)
    side = model.patch_embed.img_size[0]
    imgs = uniform(case["seed"], -2, 2, (1, 3, side, side))
    if case["call"] is None:
        logits = model(imgs)[0]
        assert_match(logits[:16], torch.tensor(case["logits_first"]), "logits", ATOL, 0)
        check_mean_and_std(logits, case["logits_mean"], case["logits_std"])
        return
    noise = np.random.RandomState(case["seed"] + 1).random_sample(
        (1, model.patch_embed.num_patches)
    )
    loss, pred, _, mask = model(
        imgs, **case["call"], vis=True, noise=torch.from_numpy(noise).float()
    )
    predicted = mask[0].bool()
    assert_match(loss.item(), case["loss"], "loss", ATOL, 0)
    assert predicted.nonzero().flatten()[:12].tolist() == case["mask_first_masked"]
    pred = pred[0, predicted] if case["module"] == "models_cross" else pred[0]
    assert list(pred.shape) == case["pred_rows"]
    assert_match(pred[:4, :4], torch.tensor(case["pred_first"]), "pred", ATOL, 0)
    check_mean_and_std(pred, case["pred_mean"], case["pred_std"])


@pytest.mark.parametrize("case", parity_cases("factories", "factory_block"))
@torch.no_grad()
def test_first_block(case):
    """First encoder and decoder block of every factory: determines heads, mlp ratio and eps."""
    with torch.device("meta"):
        model = get_factory(case)(**case["kwargs"])
    lists = {"encoder": "blocks", "decoder": "decoder_blocks"}
    for name, expected in case["blocks"].items():
        prefix = f"{lists[name]}.0."
        block = getattr(model, lists[name])[0].to_empty(device="cpu").eval()
        named = [(prefix + key, tensor) for key, tensor in block.state_dict().items()]
        weights = make_formula_weights(named, case["seed"])
        block.load_state_dict({key.removeprefix(prefix): w for key, w in weights.items()})
        inputs = [uniform(case["seed"] + 5, -2, 2, expected["x_shape"]) * 0.003]
        if name == "decoder" and case["module"] == "models_cross":
            width = model.pos_embed.shape[-1]
            inputs.append(uniform(case["seed"] + 6, -2, 2, (1, 5, width)))
        out = block(*inputs)[0]
        first = torch.tensor(expected["out_first"])
        rows, columns = first.shape
        assert_match(out[:rows, :columns], first, f"{name} block", ATOL, 0)
        check_mean_and_std(out, expected["out_mean"], expected["out_std"])


def check_mean_and_std(values, mean: float, std: float) -> None:
    assert_match(values.mean().item(), mean, "mean of the output", ATOL, 0)
    # Whether the stored std is the biased or the unbiased one is unknown.
    stds = [values.std(correction=correction).item() for correction in (0, 1)]
    assert min(abs(actual - std) for actual in stds) <= ATOL


@pytest.mark.parametrize("num_images", [1, 2])
@pytest.mark.parametrize("kind", ["cross", "mae", "vit"])
def test_gradients_are_laid_out_like_parameters(kind, num_images, tiny_cross, tiny_mae, tiny_vit):
    """DDP copies gradients of other strides, and warns: that of the class token for one image."""
    model = {"cross": tiny_cross, "mae": tiny_mae, "vit": tiny_vit}[kind]()
    model(torch.randn(num_images, 3, 32, 32)).sum().backward()
    for name, param in model.named_parameters():
        assert param.grad is None or param.grad.stride() == param.stride(), name


@pytest.mark.parametrize("name", ["models_cross", "models_mae", "models_vit"])
def test_default_arguments_build_a_model(name):
    """The classifier's are those of ViT-Base; every number of heads divides its width."""
    module = importlib.import_module(name)
    with torch.device("meta"):
        if name != "models_vit":
            module.MaskedAutoencoderViT()
            return
        model, base = module.VisionTransformer(), module.vit_base_patch16()
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (model, base)]
    assert shapes[0] == shapes[1]
    assert model.blocks[0].attn.num_heads == base.blocks[0].attn.num_heads == 12
