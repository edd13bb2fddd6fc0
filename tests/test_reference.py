"""Loss and every gradient against the reference implementation."""

import itertools

import pytest
import torch

from tools.bench.reference import reference_loss
from util.layers.vit import compile_model

VARIANTS = [
    dict(weight_fm=weight_fm, use_input=use_input, use_fm=use_fm, self_attn=self_attn)
    for weight_fm, use_input, use_fm, self_attn in itertools.product(
        [True, False], [True, False], [[-1], [0], [-1, -2]], [True, False]
    )
    if weight_fm or (not use_input and use_fm == [-1])
]


def perturb(model):
    """Randomize biases and norm scales, so that the tests notice a missing one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=generator)
    return model


def loss_and_gradients(model, compute):
    model.zero_grad(set_to_none=True)
    loss = compute()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_matches_reference(model, ratios, size=(32, 32), channels=3):
    imgs = torch.randn(3, channels, *size, generator=torch.Generator().manual_seed(2))
    noise = torch.rand(3, model.patch_embed.num_patches, generator=torch.Generator().manual_seed(3))
    loss, grads = loss_and_gradients(model, lambda: model(imgs, *ratios, noise=noise))
    expected, expected_grads = loss_and_gradients(
        model, lambda: reference_loss(model, imgs, *ratios, noise)
    )
    assert abs(loss - expected) <= 1e-6
    for name, grad in grads.items():
        assert (grad - expected_grads[name]).abs().max() <= 1e-6, name
    # The reference also runs blocks with unused outputs; their gradients are zero.
    for name in expected_grads.keys() - grads.keys():
        assert not expected_grads[name].any(), name


@pytest.mark.parametrize("kept", [0.75, 0.25])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_cross_mae_matches_reference(tiny_cross, options, kept):
    model = perturb(tiny_cross(norm_pix_loss=True, **options))
    assert_matches_reference(model, (0.75, kept))


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_mae_matches_reference(tiny_mae, norm_pix_loss):
    assert_matches_reference(perturb(tiny_mae(norm_pix_loss=norm_pix_loss)), (0.75, 0.75))


@pytest.mark.parametrize("factory", ["tiny_cross", "tiny_mae"])
def test_other_sizes_and_channels_match_reference(factory, request):
    build = request.getfixturevalue(factory)
    model = perturb(build(img_size=(16, 48), in_chans=5))
    assert_matches_reference(model, (0.75, 0.5 if factory == "tiny_cross" else 0.75), (16, 48), 5)


@pytest.mark.parametrize("factory", ["tiny_cross", "tiny_mae"])
def test_grad_checkpointing_matches_reference(factory, request):
    model = perturb(request.getfixturevalue(factory)())
    model.set_recompute("blocks")
    assert_matches_reference(model, (0.75, 0.75))


def test_compiled_blocks_keep_names_and_loss(tiny_cross):
    model = perturb(tiny_cross())
    names = list(model.state_dict())
    compile_model(model, backend="aot_eager")
    assert list(model.state_dict()) == names
    assert_matches_reference(model, (0.75, 0.25))


@pytest.mark.parametrize("factory", ["tiny_cross", "tiny_mae"])
def test_bf16_error_is_that_of_the_reference(factory, request):
    """Recomputed tensors are rounded as in the forward pass."""
    model = perturb(request.getfixturevalue(factory)())
    imgs, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)

    def under_autocast(compute):
        def run():
            with torch.autocast("cpu", torch.bfloat16):
                return compute()

        return run

    exact, exact_grads = loss_and_gradients(
        model, lambda: reference_loss(model, imgs, 0.75, 0.75, noise)
    )
    loss, grads = loss_and_gradients(
        model, under_autocast(lambda: model(imgs, 0.75, 0.75, noise=noise))
    )
    expected, expected_grads = loss_and_gradients(
        model, under_autocast(lambda: reference_loss(model, imgs, 0.75, 0.75, noise))
    )

    def distance(grads):
        error = sum((grads[n].float() - g).square().sum() for n, g in exact_grads.items())
        return (error / sum(g.square().sum() for g in exact_grads.values())).sqrt()

    assert abs(loss - exact) <= 1.5 * abs(expected - exact) + 1e-3
    assert distance(grads) <= 1.2 * distance(expected_grads)
    assert all(g.dtype == torch.float32 for g in grads.values())


def test_frozen_modules_get_no_gradient(tiny_cross):
    """Freezing blocks, norms or layers does not change the other gradients."""
    model, partly_frozen = tiny_cross(), tiny_cross()
    blocks, decoder_blocks = partly_frozen.blocks, partly_frozen.decoder_blocks
    for module in (blocks[0], blocks[1].norm1, decoder_blocks[0].mlp.fc1):
        module.requires_grad_(False)
    imgs, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    for m in (model, partly_frozen):
        m(imgs, noise=noise).backward()
    expected = dict(model.named_parameters())
    for name, p in partly_frozen.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[name].grad, msg=name)
        else:
            assert p.grad is None, name
