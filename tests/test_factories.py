"""Full-size models with weights made by a formula: losses, outputs, first blocks alone."""

import importlib

import numpy as np
import pytest
import torch
from parity_data import assert_match, formula_weights, parity_cases, uniform

ATOL = 1e-4


def factory_of(case):
    return getattr(importlib.import_module(case["module"]), case["factory"])


def build_by_formula(case):
    """The model of a case; the frozen position tables stay as constructed."""
    model = factory_of(case)(**case["kwargs"]).eval()
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    result = model.load_state_dict(formula_weights(trainable, case["seed"]), strict=False)
    assert set(result.missing_keys) <= {"pos_embed", "decoder_pos_embed"}
    return model


@pytest.mark.parametrize("case", parity_cases("factories", "factory"))
@torch.no_grad()
def test_full_size_output(case):
    """One picture through a public model: loss and predictions, or logits."""
    model = build_by_formula(case)
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
    """The first encoder and decoder block of every factory: fixes its heads, mlp ratio and eps."""
    with torch.device("meta"):
        model = factory_of(case)(**case["kwargs"])
    lists = {"encoder": "blocks", "decoder": "decoder_blocks"}
    for part, expected in case["blocks"].items():
        prefix = f"{lists[part]}.0."
        block = getattr(model, lists[part])[0].to_empty(device="cpu").eval()
        named = [(prefix + name, tensor) for name, tensor in block.state_dict().items()]
        weights = formula_weights(named, case["seed"])
        block.load_state_dict({name.removeprefix(prefix): w for name, w in weights.items()})
        inputs = [uniform(case["seed"] + 5, -2, 2, expected["x_shape"]) * 0.003]
        if part == "decoder" and case["module"] == "models_cross":
            width = model.pos_embed.shape[-1]
            inputs.append(uniform(case["seed"] + 6, -2, 2, (1, 5, width)))
        out = block(*inputs)[0]
        first = torch.tensor(expected["out_first"])
        rows, columns = first.shape
        assert_match(out[:rows, :columns], first, f"{part} block", ATOL, 0)
        check_mean_and_std(out, expected["out_mean"], expected["out_std"])


def check_mean_and_std(values, mean: float, std: float) -> None:
    assert_match(values.mean().item(), mean, "mean of the output", ATOL, 0)
    # The stored value does not say which of the two it is.
    deviations = [values.std(correction=correction).item() for correction in (0, 1)]
    assert min(abs(deviation - std) for deviation in deviations) <= ATOL
