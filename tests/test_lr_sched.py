"""The learning rate of the public code at many points, group by group."""

from argparse import Namespace

import pytest
import torch
from parity_data import assert_rates_match, find_case, parity_cases, read_json

from util.lr_sched import adjust_learning_rate


def optimizer_of(scales) -> torch.optim.Optimizer:
    """An optimizer with one group per lr_scale; None: a group without that entry."""
    entries = [{} if scale is None else {"lr_scale": scale} for scale in scales]
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} | entry for entry in entries]
    return torch.optim.SGD(groups, lr=1.0)


def test_rates_of_all_groups():
    """The stored rows: rate returned, and rate times lr_scale set in each group."""
    case = find_case("schedules", "adjust_learning_rate")
    optimizer = optimizer_of(case["group_lr_scales"])
    for row in case["rows"]:
        lr = adjust_learning_rate(optimizer, row["epoch"], Namespace(**row["args"]))
        rates = [group["lr"] for group in optimizer.param_groups]
        assert_rates_match([lr, *rates], [row["lr"], *row["group_lrs"]], "rates of all groups")


@pytest.mark.parametrize("case", parity_cases("schedules", "lr_sequence"))
def test_sequence_with_accumulation(case):
    """Set on iterations that divide by accum_iter, kept in between."""
    args, steps = Namespace(**case["args"]), case["iters_per_epoch"]
    optimizer = optimizer_of([None])
    for epoch, expected in enumerate(case["lr_by_epoch"]):
        rates = []
        for step in range(steps):
            if step % args.accum_iter == 0:
                adjust_learning_rate(optimizer, step / steps + epoch, args)
            rates.append(optimizer.param_groups[0]["lr"])
        assert_rates_match(rates, expected, "rate of every iteration")


@pytest.mark.parametrize("recipe", read_json("schedules")["recipes"], ids=lambda r: r["name"])
def test_published_recipes(recipe):
    """Rates over the four published recipes, from their effective peak rate."""
    optimizer = optimizer_of([None])
    for epoch, step, expected in recipe["points_epoch_iter_lr"]:
        lr = adjust_learning_rate(
            optimizer, step / recipe["iters_per_epoch"] + epoch, Namespace(**recipe)
        )
        assert_rates_match(lr, expected, "rate of a published recipe")


@pytest.mark.parametrize(
    "epoch, expected",
    [(0, 0), (1, 0.5), (2, 1), (4, 0.1 + 0.9 * (2 + 2**0.5) / 4), (6, 0.55), (10, 0.1)],
)
def test_points_by_hand(epoch, expected):
    """Half the warm-up, its end, a quarter and the middle of the cosine, and the end."""
    args = Namespace(lr=1.0, min_lr=0.1, warmup_epochs=2, epochs=10)
    assert adjust_learning_rate(optimizer_of([None]), epoch, args) == pytest.approx(expected)
