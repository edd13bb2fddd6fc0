"""The MAE baseline against stored values and the formula of the paper."""

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
    run_pretraining_model,
)

from util.layers.masking import num_visible_and_predicted, random_masking
from util.layers.patchify import normalize_patches, patchify

CASES = [c for c in parity_cases("forward", "forward") if c.values[0]["module"] == "models_mae"]


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients_match_stored_values(case):
    """Loss, prediction and target of all patches, mask, block outputs, gradients."""
    model, computed, tensors = run_pretraining_model(case)
    assert_match(computed["loss"].item(), case["loss"], "loss", 1e-5, 0)
    for name in ("pred", "target", "mask"):
        assert_match(computed[name], tensors[name], name)
    assert_encoder_matches(case, computed, tensors)
    assert_gradients_match(model, tensors, case["params_without_grad"])


@pytest.mark.parametrize("case", CASES)
def test_masking_matches_stored_values(case):
    """Set sizes, patch indices and inverse permutation for the stored noise."""
    tensors = load_tensors(case)
    ratio = case["call"]["mask_ratio"]
    sizes = num_visible_and_predicted(case["num_patches"], ratio, ratio)
    assert sizes == (case["num_visible"], case["num_predicted"])
    masking = random_masking(tensors["noise"], *sizes)
    assert masking.ids_keep.equal(tensors["noise"].argsort(dim=1)[:, : sizes[0]])
    assert masking.ids_restore.equal(tensors["ids_restore"].long())
    assert masking.mask.equal(tensors["mask"])


def test_initialization():
    assert_initialization_matches(find_case("forward", "init_mae"), num_models=200)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_loss_is_the_mean_over_masked_patches(tiny_mae, norm_pix_loss):
    """The formula of the paper; kept_mask_ratio has no effect."""
    model = tiny_mae(norm_pix_loss=norm_pix_loss)
    imgs, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    loss, pred, target, mask = model(imgs, mask_ratio=0.5, vis=True, noise=noise)
    patches = patchify(imgs, 8)
    torch.testing.assert_close(target, normalize_patches(patches) if norm_pix_loss else patches)
    assert mask.sum(1).tolist() == [8, 8]
    expected = sum(((pred - target) ** 2).mean(-1)[mask == 1]) / 16
    torch.testing.assert_close(loss, expected)
    ignored = model(imgs, mask_ratio=0.5, kept_mask_ratio=0.25, noise=noise)
    torch.testing.assert_close(ignored, loss)


def test_default_noise_is_one_torch_rand_call(tiny_mae):
    """Without noise, the model draws torch.rand(B, L) and nothing else."""
    model, imgs = tiny_mae(), torch.randn(2, 3, 32, 32)
    torch.manual_seed(7)
    loss = model(imgs)
    torch.manual_seed(7)
    assert loss.equal(model(imgs, noise=torch.rand(2, 16)))


def test_every_trainable_parameter_gets_a_gradient(tiny_mae):
    model = tiny_mae()
    model(torch.randn(2, 3, 32, 32)).backward()
    for name, param in model.named_parameters():
        assert (param.grad is not None) == param.requires_grad, name
        assert param.grad is None or param.grad.abs().max() > 0, name
