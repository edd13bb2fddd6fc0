"""CrossMAE against stored values and the formulas of the paper."""

import pytest
import torch
from parity_data import (
    assert_encoder_matches,
    assert_gradients_match,
    assert_initialization_matches,
    assert_match,
    find_case,
    load_tensors,
    parity_cases,
    record,
    run_pretraining_model,
)

from util.layers.masking import num_visible_and_predicted, random_masking

CASES = [c for c in parity_cases("forward", "forward") if c.values[0]["module"] == "models_cross"]


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients_match_stored_values(case):
    """Loss, prediction and target of the predicted patches, mask, block outputs, gradients."""
    model, computed, tensors = run_pretraining_model(case)
    assert_match(computed["loss"].item(), case["loss"], "loss", 1e-5, 0)
    assert computed["mask"].equal(tensors["mask"])
    record("mask")
    predicted = tensors["mask"].bool()
    for name in ("pred", "target"):
        rows = computed[name][predicted].unflatten(0, tensors[name].shape[:2])
        assert_match(rows, tensors[name], name)
        assert computed[name][~predicted].eq(0).all()
        if f"vis_{name}" in tensors:
            assert_match(computed[name], tensors[f"vis_{name}"], f"vis_{name}")
    assert_encoder_matches(case, computed, tensors)
    assert_gradients_match(model, tensors, case["params_without_grad"])


@pytest.mark.parametrize("case", CASES)
def test_masking_matches_stored_values(case):
    """Set sizes, patch indices and inverse permutation for the stored noise."""
    tensors = load_tensors(case)
    sizes = num_visible_and_predicted(case["num_patches"], **case["call"])
    assert sizes == (case["num_visible"], case["num_predicted"])
    masking = random_masking(tensors["noise"], *sizes)
    assert masking.ids_keep.equal(tensors["noise"].argsort(dim=1)[:, : sizes[0]])
    assert masking.ids_pred.flatten().equal(tensors["mask"].nonzero()[:, 1])  # raster order
    assert masking.ids_restore.equal(tensors["ids_restore"].long())
    assert masking.mask.equal(tensors["mask"])


def test_initialization():
    assert_initialization_matches(find_case("forward", "init_cross"), num_models=200)


def test_loss_is_the_mean_over_predicted_patches(tiny_cross):
    """The formula of the paper, with a subset of the masked patches predicted."""
    model = tiny_cross()
    imgs = torch.randn(2, 3, 32, 32)
    loss, pred, target, mask = model(imgs, mask_ratio=0.75, kept_mask_ratio=0.25, vis=True)
    assert mask.sum(1).tolist() == [4, 4]
    torch.testing.assert_close(loss, ((pred - target)[mask == 1] ** 2).mean())
    torch.testing.assert_close(target[mask == 1], model.patchify(imgs)[mask == 1])


def test_default_noise_is_one_torch_rand_call(tiny_cross):
    """Without noise, the model draws torch.rand(B, L) and nothing else."""
    model, imgs = tiny_cross(), torch.randn(2, 3, 32, 32)
    torch.manual_seed(7)
    loss = model(imgs)
    torch.manual_seed(7)
    assert loss.equal(model(imgs, noise=torch.rand(2, 16)))


@pytest.mark.parametrize("self_attn", [False, True])
def test_predictions_are_independent_without_self_attention(tiny_cross, self_attn):
    """The prediction of a patch does not depend on which others are predicted."""
    model = tiny_cross(self_attn=self_attn).eval()
    imgs, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    _, all_pred, _, _ = model(imgs, 0.75, 0.75, vis=True, noise=noise)
    _, few_pred, _, mask = model(imgs, 0.75, 0.25, vis=True, noise=noise)
    same = torch.allclose(all_pred[mask == 1], few_pred[mask == 1], atol=1e-5)
    assert same != self_attn


@pytest.mark.parametrize(
    "options", [dict(), dict(use_input=False), dict(self_attn=True), dict(weight_fm=False)], ids=str
)
def test_every_trainable_parameter_gets_a_gradient(tiny_cross, options):
    """Includes weight_fm=False, which the public code cannot run."""
    if options.get("weight_fm") is False:
        options = options | {"use_input": False}
    model = tiny_cross(**options)
    model(torch.randn(2, 3, 32, 32)).backward()
    for name, param in model.named_parameters():
        assert (param.grad is not None) == param.requires_grad, name
        assert param.grad is None or param.grad.abs().max() > 0, name


@pytest.mark.parametrize("use_fm", [[0, 0], [1, -1], [2], [-3, 0]])
def test_invalid_feature_maps_are_refused(tiny_cross, use_fm):
    """Duplicates and indices outside the two blocks."""
    with pytest.raises(ValueError):
        tiny_cross(use_fm=use_fm)


@pytest.mark.parametrize("kept_mask_ratio", [0, 0.8])
def test_invalid_ratios_are_refused(tiny_cross, kept_mask_ratio):
    """Nothing to predict, or more to predict than is masked."""
    with pytest.raises(ValueError, match="kept_mask_ratio"):
        tiny_cross()(torch.randn(1, 3, 32, 32), 0.75, kept_mask_ratio)
