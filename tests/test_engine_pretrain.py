"""Pre-training loop: stored runs, accumulation, non-finite losses, logged lines."""

import logging
import re
from argparse import Namespace

import pytest
import torch
from parity_data import (
    assert_match,
    assert_match_relative,
    build_with_weights,
    load_tensors,
    parity_cases,
    read_json,
    select,
)
from torch import nn

from engine_pretrain import train_one_epoch
from util.io.errors import NonFiniteLoss
from util.lr_decay import param_groups_weight_decay
from util.optim import NativeScalerWithGradNormCount
from util.run.train_log import TrainLog

CPU = torch.device("cpu")


class ModelWithNoise(nn.Module):
    """Passes the next stored noise to the model; records each loss and the learning rates."""

    def __init__(self, model: nn.Module, noise, optimizer):
        super().__init__()
        self.model, self.optimizer = model, optimizer
        self.noise = iter(noise)
        self.losses, self.lrs = [], []

    def forward(self, imgs, **ratios):
        self.lrs.append([group["lr"] for group in self.optimizer.param_groups])
        loss = self.model(imgs, noise=next(self.noise), **ratios)
        self.losses.append(loss.item())
        return loss


def make_optimizer(case: dict, model: nn.Module) -> torch.optim.Optimizer:
    groups = param_groups_weight_decay(model, case["weight_decay"])
    if case["optimizer"] == "sgd":
        return torch.optim.SGD(groups, lr=case["args"]["lr"])
    return torch.optim.AdamW(groups, lr=case["args"]["lr"], betas=case["betas"])


def make_args(**changes) -> Namespace:
    """A constant learning rate, so that nothing depends on the length of an epoch."""
    constant = dict(lr=0.1, min_lr=0.1, warmup_epochs=0, epochs=2, accum_iter=1)
    return Namespace(**(constant | dict(mask_ratio=0.75, kept_mask_ratio=0.5) | changes))


@pytest.mark.parametrize("case", parity_cases("trajectory", "trajectory_pretrain"))
def test_run_matches_stored_values(case):
    """Loss and learning rate of every iteration, epoch means, final weights if stored."""
    tensors, args = load_tensors(case), Namespace(**case["args"])
    model = build_with_weights(case, tensors)
    optimizer = make_optimizer(case, model)
    wrapped = ModelWithNoise(model, tensors["noise"], optimizer)
    scaler, steps = NativeScalerWithGradNormCount(), case["iters_per_epoch"]
    for epoch, batches in enumerate(case["batches"]):
        loader = [(tensors["imgs"][batch], torch.zeros(len(batch))) for batch in batches]
        stats = train_one_epoch(wrapped, loader, optimizer, CPU, epoch, scaler, args=args)
        this_epoch = slice(epoch * steps, (epoch + 1) * steps)
        mean_loss, mean_lr = (sum(case[k][this_epoch]) / steps for k in ("losses", "lrs"))
        assert_match(stats["loss"], mean_loss, "mean loss of an epoch", 1e-5, 0)
        assert_match_relative(stats["lr"], mean_lr, "mean learning rate of an epoch", 1e-6)
    assert_match(wrapped.losses, case["losses"], "loss of every iteration", 1e-5, 0)
    for lrs, expected in zip(wrapped.lrs, case["lrs"], strict=True):
        assert_match_relative(lrs, [expected] * len(lrs), "learning rate of every iteration")
    state, final = model.state_dict(), select(tensors, "final")
    for name, expected in final.items():
        actual = state[name]
        if name.endswith(("qkv.bias", "kv.bias")):  # gradient of the key bias is rounding noise
            actual, expected = (without_key(t, "qkv" in name) for t in (actual, expected))
        assert_match(actual, expected, f"final weight: {name}", atol=5e-5, rtol=0)


def without_key(bias: torch.Tensor, fused_qkv: bool) -> torch.Tensor:
    """A qkv bias without its middle third, or a kv bias without its first half."""
    if fused_qkv:
        query, _, value = bias.chunk(3)
        return torch.cat([query, value])
    return bias.chunk(2)[1]


def build_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def train(optimizer, model, batches, noise, epoch=0, **changes) -> None:
    """Train an epoch on these batches with this noise."""
    wrapped = ModelWithNoise(model, noise, optimizer)
    loader = [(imgs, torch.zeros(len(imgs))) for imgs in batches]
    scaler = NativeScalerWithGradNormCount()
    train_one_epoch(wrapped, loader, optimizer, CPU, epoch, scaler, args=make_args(**changes))


def assert_same_weights(model: nn.Module, expected: nn.Module, atol: float = 1e-6) -> None:
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=atol, rtol=0, msg=name)


@pytest.mark.parametrize("factory", ["tiny_cross", "tiny_mae"])
def test_accumulation_matches_large_batch(request, factory):
    """Two optimizer steps from four small batches each equal two from large batches."""
    build = request.getfixturevalue(factory)
    imgs, noise = torch.randn(16, 3, 32, 32), torch.rand(16, 16)
    accumulated, large = build(), build()
    train(build_sgd(accumulated), accumulated, imgs.split(2), noise.split(2), accum_iter=4)
    train(build_sgd(large), large, imgs.split(8), noise.split(8))
    assert_same_weights(accumulated, large)
    assert not accumulated.decoder_pred.weight.equal(build().decoder_pred.weight)


def test_incomplete_accumulation_is_discarded(tiny_cross):
    """The incomplete third batch of epoch 0 changes neither the weights nor epoch 1."""
    imgs, noise = torch.randn(5, 2, 3, 32, 32), torch.rand(5, 2, 16)
    with_incomplete, without = tiny_cross(), tiny_cross()
    for model, first in ((with_incomplete, [0, 1, 2]), (without, [0, 1])):
        optimizer = build_sgd(model)
        for epoch, ids in enumerate((first, [3, 4])):
            train(optimizer, model, imgs[ids], noise[ids], epoch, accum_iter=2)
    assert_same_weights(with_incomplete, without, atol=0)


def test_nonfinite_loss_stops_the_run(tiny_cross):
    """With the error message of the public code, and unchanged weights."""
    imgs = torch.full((2, 3, 32, 32), float("nan"))
    model = tiny_cross()
    with pytest.raises(NonFiniteLoss, match="Loss is nan, stopping training"):
        train(build_sgd(model), model, [imgs], [torch.rand(2, 16)])
    assert_same_weights(model, tiny_cross(), atol=0)


def test_logged_lines(tiny_cross, caplog):
    """Progress every 20 iterations and at the end, then the averages of the epoch, as published."""
    caplog.set_level(logging.INFO)
    model = tiny_cross()
    train(build_sgd(model), model, torch.randn(23, 1, 3, 32, 32), torch.rand(23, 1, 16), epoch=1)
    lines = [record.getMessage() for record in caplog.records]
    progress = re.compile(read_json("formats")["train_lines"]["regex"])
    found = [match for line in lines if (match := progress.search(line))]
    assert [(m[1], m[2], m[3]) for m in found] == [("1", str(i), "23") for i in (0, 20, 22)]
    assert any(
        re.search(r"Epoch: \[1\] Total time: \d:\d\d:\d\d \([\d.]+ s / it\)", s) for s in lines
    )
    averaged = r"Averaged stats: lr: 0\.100000  loss: [\d.]+ \(([\d.]+)\)"
    assert sum(bool(re.search(averaged, line)) for line in lines) == 1


@pytest.mark.parametrize("bad", [0, 1])
def test_nonfinite_batch_skips_one_optimizer_step(tiny_cross, bad):
    """With accumulation, any non-finite batch of an optimizer step counts as one skipped step."""
    imgs, noise = torch.randn(4, 2, 3, 32, 32), torch.rand(4, 2, 16)
    imgs[bad] = float("nan")
    model = tiny_cross()
    train(build_sgd(model), model, imgs, noise, accum_iter=2, skip_nonfinite=1)
    assert not model.decoder_pred.weight.equal(tiny_cross().decoder_pred.weight)
    assert all(p.isfinite().all() for p in model.parameters())
    with pytest.raises(NonFiniteLoss):
        train(build_sgd(model), model, imgs, noise, accum_iter=2, skip_nonfinite=0)


def test_gradient_norms_of_overflows_are_not_averaged():
    """A step skipped by the fp16 loss scaler has no gradient norm."""
    scaler = NativeScalerWithGradNormCount(torch.float16, "cpu")
    log = TrainLog(0, range(2), "loss", None, scaler, make_args())
    for iteration, norm in enumerate((float("inf"), 3.0)):
        log.add(iteration, build_sgd(nn.Linear(1, 1)), torch.tensor(1.0), torch.tensor(norm))
    assert log.metrics.averages()["grad_norm"] == 3


class Writer:
    """A TensorBoard writer that keeps (tag, step) of what it gets."""

    def __init__(self):
        self.points, self.log_dir = [], "curves"

    def add_scalar(self, tag, value, step):
        self.points.append((tag, step))


def test_tensorboard_gets_optimizer_steps_alone():
    """With accumulation no point for the other iterations; the axis is epoch x 1000."""
    writer, scaler = Writer(), NativeScalerWithGradNormCount(None, "cpu")
    log = TrainLog(2, range(4), "train_loss", writer, scaler, make_args(accum_iter=2))
    for iteration in range(4):
        norm = torch.tensor(3.0) if iteration % 2 else None
        log.add(iteration, build_sgd(nn.Linear(1, 1)), torch.tensor(1.0), norm)
    tags = ("train_loss", "lr", "grad_norm")
    assert writer.points == [(tag, step) for step in (2250, 2750) for tag in tags]
