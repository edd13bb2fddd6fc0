"""Learning rates against values stored from the public code, per parameter group."""

from argparse import Namespace

import pytest
import torch
from parity_data import assert_match_relative, find_case, parity_cases, read_json

from util.lr_sched import adjust_learning_rate


def make_optimizer(scales) -> torch.optim.Optimizer:
    """An optimizer with one group per lr_scale; None means a group without lr_scale."""
    entries = [{} if scale is None else {"lr_scale": scale} for scale in scales]
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} | entry for entry in entries]
    return torch.optim.SGD(groups, lr=1.0)


def test_learning_rates_of_all_groups():
    """Stored rows: the returned learning rate, and times lr_scale in each group."""
    case = find_case("schedules", "adjust_learning_rate")
    optimizer = make_optimizer(case["group_lr_scales"])
    for row in case["rows"]:
        lr = adjust_learning_rate(optimizer, row["epoch"], Namespace(**row["args"]))
        lrs = [group["lr"] for group in optimizer.param_groups]
        expected = [row["lr"], *row["group_lrs"]]
        assert_match_relative([lr, *lrs], expected, "learning rates of all groups")


@pytest.mark.parametrize("case", parity_cases("schedules", "lr_sequence"))
def test_learning_rate_is_set_per_optimizer_step(case):
    """Set at every iteration divisible by accum_iter, constant in between."""
    args, steps = Namespace(**case["args"]), case["iters_per_epoch"]
    optimizer = make_optimizer([None])
    for epoch, expected in enumerate(case["lr_by_epoch"]):
        lrs = []
        for step in range(steps):
            if step % args.accum_iter == 0:
                adjust_learning_rate(optimizer, step / steps + epoch, args)
            lrs.append(optimizer.param_groups[0]["lr"])
        assert_match_relative(lrs, expected, "learning rate of every iteration")


@pytest.mark.parametrize("recipe", read_json("schedules")["recipes"], ids=lambda r: r["name"])
def test_published_recipes(recipe):
    """Learning rates over the four published recipes, from their effective peak value."""
    optimizer = make_optimizer([None])
    for epoch, step, expected in recipe["points_epoch_iter_lr"]:
        lr = adjust_learning_rate(
            optimizer, step / recipe["iters_per_epoch"] + epoch, Namespace(**recipe)
        )
        assert_match_relative(lr, expected, "learning rate of a published recipe")


@pytest.mark.parametrize(
    "epoch, expected",
    [(0, 0), (1, 0.5), (2, 1), (4, 0.1 + 0.9 * (2 + 2**0.5) / 4), (6, 0.55), (10, 0.1)],
)
def test_hand_computed_points(epoch, expected):
    """Start, middle and end of the warm-up; a quarter, the middle and the end of the cosine."""
    args = Namespace(lr=1.0, min_lr=0.1, warmup_epochs=2, epochs=10)
    assert adjust_learning_rate(make_optimizer([None]), epoch, args) == pytest.approx(expected)
