"""Fine-tuning loop and evaluation: stored runs, accumulation, mixup, accuracies."""

import logging
import re
from argparse import Namespace

import numpy as np
import pytest
import torch
from parity_data import (
    assert_match,
    assert_match_relative,
    build_with_weights,
    find_case,
    load_tensors,
    parity_cases,
    read_json,
    select,
)
from sklearn.metrics import balanced_accuracy_score
from sklearn.utils.class_weight import compute_class_weight
from timm.loss import LabelSmoothingCrossEntropy
from torch import nn

import main_finetune
from engine_finetune import evaluate, train_one_epoch
from util.lr_decay import param_groups_lrd
from util.optim import NativeScalerWithGradNormCount

CPU = torch.device("cpu")


class RecordingCriterion(nn.Module):
    """A criterion that records each loss and the current learning rates."""

    def __init__(self, criterion: nn.Module, optimizer):
        super().__init__()
        self.criterion, self.optimizer = criterion, optimizer
        self.losses, self.lrs = [], []

    def forward(self, logits, targets):
        self.lrs.append([group["lr"] for group in self.optimizer.param_groups])
        loss = self.criterion(logits, targets)
        self.losses.append(loss.item())
        return loss


@pytest.mark.parametrize("case", parity_cases("trajectory", "trajectory_finetune"))
def test_run_matches_stored_values(case):
    """Loss, largest and smallest lr of every iteration, epoch means, final weights if stored."""
    tensors, args = load_tensors(case), Namespace(**case["args"])
    model = build_with_weights(case, tensors)
    groups = param_groups_lrd(
        model, case["weight_decay"], model.no_weight_decay(), case["layer_decay"]
    )
    assert len(groups) == case["num_groups"]
    optimizer = torch.optim.AdamW(groups, lr=args.lr)
    criterion = RecordingCriterion(LabelSmoothingCrossEntropy(case["smoothing"]), optimizer)
    scaler, steps = NativeScalerWithGradNormCount(), case["iters_per_epoch"]
    imgs, labels = tensors["imgs"], tensors["labels"].long()
    for epoch, batches in enumerate(case["batches"]):
        loader = [(imgs[batch], labels[batch]) for batch in batches]
        stats = train_one_epoch(
            *(model, criterion, loader, optimizer, CPU, epoch, scaler, case["clip_grad"]), args=args
        )
        this_epoch = slice(epoch * steps, (epoch + 1) * steps)
        mean_loss, mean_lr = (sum(case[k][this_epoch]) / steps for k in ("losses", "lr_max"))
        assert_match(stats["loss"], mean_loss, "mean loss of an epoch", 1e-5, 0)
        assert_match_relative(stats["lr"], mean_lr, "mean learning rate of an epoch", 1e-6)
    assert_match(criterion.losses, case["losses"], "loss of every iteration", 1e-5, 0)
    assert_match_relative(
        [max(lrs) for lrs in criterion.lrs], case["lr_max"], "largest learning rate"
    )
    assert_match_relative(
        [min(lrs) for lrs in criterion.lrs], case["lr_min"], "smallest learning rate"
    )
    state = model.state_dict()
    for name, expected in select(tensors, "final").items():
        actual = state[name]
        if name.endswith("qkv.bias"):  # the gradient of the key bias is rounding noise
            actual, expected = (torch.cat(t.chunk(3)[::2]) for t in (actual, expected))
        assert_match(actual, expected, f"final weight: {name}", atol=5e-5, rtol=0)


def train(optimizer, model, batches, epoch=0, accum_iter=1, max_norm=None) -> None:
    """Train an epoch at a constant learning rate on batches of (images, labels)."""
    args = Namespace(
        lr=0.1, min_lr=0.1, warmup_epochs=0, epochs=2, accum_iter=accum_iter, clip_grad=max_norm
    )
    scaler, criterion = NativeScalerWithGradNormCount(), nn.CrossEntropyLoss()
    train_one_epoch(
        *(model, criterion, batches, optimizer, CPU, epoch, scaler, max_norm), args=args
    )


def make_batches(*sizes: int) -> list:
    """Batches of random images of the given sizes, with labels 0-4."""
    return [(torch.randn(size, 3, 32, 32), torch.arange(size) % 5) for size in sizes]


def assert_same_weights(model: nn.Module, expected: nn.Module, atol: float) -> None:
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=atol, rtol=0, msg=name)


def build_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_accumulation_matches_large_batch(tiny_vit, max_norm):
    """With and without clipping, which acts on the accumulated gradient."""
    batches = make_batches(2, 2, 2, 2)
    large = [tuple(torch.cat(parts) for parts in zip(*batches, strict=True))]
    accumulated, model = tiny_vit(), tiny_vit()
    train(build_sgd(accumulated), accumulated, batches, accum_iter=4, max_norm=max_norm)
    train(build_sgd(model), model, large, max_norm=max_norm)
    assert_same_weights(accumulated, model, atol=1e-6)
    assert not accumulated.head.weight.equal(tiny_vit().head.weight)


def test_incomplete_accumulation_is_discarded(tiny_vit):
    """The incomplete third batch of epoch 0 changes neither the weights nor epoch 1."""
    batches = make_batches(2, 2, 2, 2, 2)
    with_incomplete, without = tiny_vit(), tiny_vit()
    for model, first in ((with_incomplete, batches[:3]), (without, batches[:2])):
        optimizer = build_sgd(model)
        train(optimizer, model, first, epoch=0, accum_iter=2)
        train(optimizer, model, batches[3:], epoch=1, accum_iter=2)
    assert_same_weights(with_incomplete, without, atol=0)


def test_mixup_fn_is_applied(tiny_vit):
    """mixup_fn transforms images and labels before model and criterion."""
    model, seen = tiny_vit(), []

    def halve(imgs, labels):
        return imgs / 2, torch.full((len(labels), 5), 0.2)

    def criterion(logits, targets):
        seen.append((logits.detach(), targets))
        return -(targets * logits.log_softmax(-1)).sum(-1).mean()

    batches = make_batches(4)
    expected = model(batches[0][0] / 2)
    optimizer = build_sgd(model.eval())
    args = Namespace(lr=0.1, min_lr=0.1, warmup_epochs=0, epochs=1, accum_iter=1)
    scaler = NativeScalerWithGradNormCount()
    train_one_epoch(
        *(model, criterion, batches, optimizer, CPU, 0, scaler, None), mixup_fn=halve, args=args
    )
    torch.testing.assert_close(seen[0][0], expected.detach())
    assert seen[0][1].eq(0.2).all()
    assert model.training  # train_one_epoch sets train mode


def test_evaluate_matches_stored_values(caplog):
    """Unequal batches: accuracy averaged over images; the result line of the public code."""
    caplog.set_level(logging.INFO)
    case = find_case("vit", "evaluate")
    tensors, formats = load_tensors(case), read_json("formats")["eval_lines"]
    model = build_with_weights(case, tensors)
    sizes = case["batch_sizes"]
    loader = list(
        zip(tensors["imgs"].split(sizes), tensors["labels"].long().split(sizes), strict=True)
    )
    stats = evaluate(loader, model, CPU)
    assert {"acc1", "acc5", "loss"} <= stats.keys()
    assert_match_relative(stats["acc1"], case["acc1"], "Acc@1", 1e-6)
    assert_match_relative(stats["acc5"], case["acc5"], "Acc@5", 1e-6)
    lines = [record.getMessage() for record in caplog.records]
    results = [match for line in lines if (match := re.search(formats["result_regex"], line))]
    assert len(results) == 1
    assert results[0][0].startswith("* Acc@1 33.333 Acc@5 80.952 loss ")
    # The mean over batches, as in the public code, or the mean over images.
    means = (case["loss"], case["loss_mean_over_images"])
    assert min(abs(stats["loss"] - mean) for mean in means) < 1e-5
    assert results[0][3] == f"{stats['loss']:.3f}"
    assert any(re.search(r"Test:  \[0/3\]  eta: \S+  loss: .* acc1: .* acc5: ", s) for s in lines)
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("num_classes, acc1, acc5", [(7, 100 / 7, 500 / 7), (3, 100 / 3, 100)])
def test_hand_computed_accuracies(num_classes, acc1, acc5):
    """The label of image i has the i-th largest logit; with fewer than 5 classes Acc@5 is 100."""
    logits = torch.arange(num_classes, 0.0, -1).expand(num_classes, -1)
    labels = torch.arange(num_classes)
    model = nn.Identity().train()
    stats = evaluate(list(zip(logits.split(2), labels.split(2), strict=True)), model, CPU)
    assert not model.training
    assert (stats["acc1"], stats["acc5"]) == pytest.approx((acc1, acc5))
    assert stats["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item())


def test_mean_per_class_accuracy():
    """scikit-learn's balanced accuracy; classes without images do not count."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 6, generator=random)
    labels = torch.randint(0, 4, (50,), generator=random).clamp(min=1)  # unequal, none of 0, 4, 5
    logits[range(50), labels] += 1.0
    stats = evaluate(list(zip(logits.split(7), labels.split(7), strict=True)), nn.Identity(), CPU)
    expected = balanced_accuracy_score(labels, logits.argmax(1))
    assert stats["mean_class"] == pytest.approx(100 * expected)
    assert stats["mean_class"] != pytest.approx(stats["acc1"])


def test_balanced_class_weights():
    """The weights of scikit-learn's "balanced", in PyTorch's weighted mean with label smoothing."""
    labels = [0, 0, 0, 0, 0, 1, 2, 2]
    flags = ["--class_weights", "balanced", "--smoothing", "0.2", "--nb_classes", "3"]
    args = main_finetune.parse_args([*flags, "--data_path", "x"])
    args.device = CPU
    criterion, mixup_fn = main_finetune.build_criterion(args, [("", label) for label in labels])
    weights = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    logits = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    target = torch.tensor(labels)
    log_probs = logits.log_softmax(1) * torch.tensor(weights).float()
    smooth = -(0.8 * log_probs[range(8), target] + 0.2 * log_probs.mean(1))
    expected = smooth.sum() / torch.tensor(weights).float()[target].sum()
    assert criterion(logits, target).item() == pytest.approx(expected.item(), rel=1e-6)
    assert mixup_fn is None
    args.class_weights = "none"
    assert main_finetune.build_criterion(args, [("", label) for label in labels])[0].weight is None
