"""Optimizer steps: fused AdamW, clipping, non-finite steps, LARS, choice of the amp dtype."""

import math

import pytest
import torch

from util.optim import (
    NativeScalerWithGradNormCount,
    build_adamw,
    build_lars,
    choose_amp_dtype,
    propagate_nonfinite,
)


def make_problem():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3), torch.randn(5, 4)


def test_fused_adamw_matches_plain_adamw():
    (model, x), (plain, _) = make_problem(), make_problem()
    groups = [{"params": model.parameters(), "weight_decay": 0.1}]
    fused_adamw = build_adamw(groups, 0.01, (0.9, 0.95))
    adamw = torch.optim.AdamW(
        plain.parameters(), 0.01, betas=(0.9, 0.95), weight_decay=0.1, foreach=False
    )
    scaler = NativeScalerWithGradNormCount()
    for _ in range(5):
        norm = scaler(model(x).square().mean(), fused_adamw)
        plain(x).square().mean().backward()
        expected = sum(p.grad.square().sum() for p in plain.parameters()).sqrt()
        torch.testing.assert_close(norm, expected)
        adamw.step()
        for optimizer in (fused_adamw, adamw):
            optimizer.zero_grad()
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), atol=1e-7, rtol=1e-6)


def test_float16_scaling_matches_a_plain_gradscaler():
    """Steps, norms and the scale, also over a step with infinite gradients: scale halved, skipped;
    and one more after growth_interval steps: scale doubled.
    """
    (model, x), (plain, _) = make_problem(), make_problem()
    sgd, plain_sgd = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, plain))
    scaler = NativeScalerWithGradNormCount(torch.float16, "cpu")
    expected = torch.amp.GradScaler("cpu")
    for gradscaler in (scaler.scaler, expected):
        gradscaler.set_growth_interval(3)
    scales = []
    for step in range(6):
        factor = torch.tensor(math.inf if step == 1 else 1.0)
        norm = scaler(model(x).square().mean() * factor, sgd)
        (expected.scale(plain(x).square().mean() * factor)).backward()
        expected.unscale_(plain_sgd)
        expected_norm = torch.cat([p.grad.flatten() for p in plain.parameters()]).norm()
        torch.testing.assert_close(norm, expected_norm, equal_nan=True)
        expected.step(plain_sgd)
        expected.update()
        scales.append(scaler.loss_scale)
        assert scaler.loss_scale == expected.get_scale()
        for optimizer in (sgd, plain_sgd):
            optimizer.zero_grad()
    assert scales == [65536.0, 32768.0, 32768.0, 32768.0, 65536.0, 65536.0]
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)
    resumed = NativeScalerWithGradNormCount(torch.float16, "cpu")
    resumed.load_state_dict(scaler.state_dict())
    assert resumed.state_dict() == scaler.state_dict()


def test_clipping_scales_gradients_to_the_maximum_norm():
    model, x = make_problem()
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    norm = NativeScalerWithGradNormCount()(100 * model(x).square().sum(), sgd, clip_grad=0.5)
    clipped = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
    assert norm > 10 and abs(clipped - 0.5) < 1e-4


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("fused", [True, False])
def test_nonfinite_step_changes_nothing(value, fused):
    model, x = make_problem()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    scaler = NativeScalerWithGradNormCount()
    scaler(model(x).square().mean(), optimizer)
    optimizer.zero_grad()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    moments = optimizer.state[model.weight]["exp_avg"].clone()
    norm = scaler(model(x).square().mean() + value, optimizer)  # gradients are finite
    assert not norm.isfinite()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], moments)
    optimizer.zero_grad()
    assert scaler(model(x).square().mean(), optimizer).isfinite()
    assert not torch.equal(model.weight, before["weight"])


def test_propagate_nonfinite_keeps_finite_loss():
    x = torch.tensor(3.0, requires_grad=True)
    loss = propagate_nonfinite(x * 2)
    assert loss == 6 and torch.autograd.grad(loss, x)[0] == 2


def test_lars_step_matches_formula():
    model, x = make_problem()
    lars = build_lars(model.parameters(), lr=0.3, weight_decay=0.0)
    model(x).square().mean().backward()
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    weight_grad, bias_grad = model.weight.grad.clone(), model.bias.grad.clone()
    trust = 0.001 * weight.norm() / weight_grad.norm()
    lars.step()  # some timm versions modify the gradients
    torch.testing.assert_close(model.weight, weight - 0.3 * trust * weight_grad)
    torch.testing.assert_close(model.bias, bias - 0.3 * bias_grad)


def test_amp_dtype_on_cpu():
    cpu = torch.device("cpu")
    assert choose_amp_dtype("auto", cpu) is None and choose_amp_dtype("off", cpu) is None
    assert choose_amp_dtype("bf16", cpu) is torch.bfloat16
