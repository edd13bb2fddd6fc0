"""Start of a run: peak learning rates of the published recipes, and their log lines."""

import logging
from argparse import Namespace

import pytest
import torch
from parity_data import assert_match_relative, read_json
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from main_pretrain import lr_scale
from util.run import setup
from util.run.checks import set_mean_std
from util.run.setup import set_lr
from util.run.startup import log_summary, startup_summary

SCHEDULES = read_json("schedules")
SCALING = [(f"scaling {i}", entry) for i, entry in enumerate(SCHEDULES["effective_lr"])]
CASES = SCALING + [(recipe["name"], recipe) for recipe in SCHEDULES["recipes"]]


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES])
def test_peak_learning_rate(case, tiny_cross, caplog):
    """blr * effective batch size / 256, times kept/mask ratio in pre-training; --lr overrides."""
    caplog.set_level(logging.INFO)
    switches = dict(inverse_lr=False, no_lr_scale=False, lr_flag=None, epochs=800, warmup_epochs=40)
    model = dict(model="tiny", input_size=32, in_chans=3, amp="off", device=torch.device("cpu"))
    args = Namespace(**(switches | model | dict(output_dir="", dist_backend=None, rank=0) | case))
    args.lr = args.lr_flag
    text = set_lr(args, *(lr_scale(args) if args.mask_ratio else ()))
    assert_match_relative(args.lr, case["lr"], "peak learning rate")
    log_summary(args, startup_summary(args, tiny_cross(), text, "sdpa", None, "no data"))
    for line in (
        f"base lr: {case['printed_base_lr']}",
        f"actual lr: {case['printed_actual_lr']}",
        f"accumulate grad iterations: {case['accum_iter']}",
        f"effective batch size: {case['effective_batch']}",
    ):
        assert line in caplog.messages


@pytest.mark.parametrize("rank, level", [(0, logging.INFO), (1, logging.WARNING)])
def test_other_ranks_log_warnings_only(rank, level, monkeypatch):
    """Also those whose rank only the process group knows, as under mpirun."""
    logger = logging.getLogger()
    before = list(logger.handlers), logger.level

    def init(args):
        args.rank, args.distributed, args.device = rank, True, torch.device("cpu")

    monkeypatch.setattr(setup.distributed, "init_distributed_mode", init)
    try:
        setup.start_run(Namespace(device="cpu", seed=0))
        assert logger.level == level
    finally:
        logger.handlers[:], logger.level = before


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_mean_and_std_without_flags(in_chans):
    """ImageNet's for 3 channels, else 0.5 for each channel."""
    args = Namespace(in_chans=in_chans, mean=None, std=None)
    set_mean_std(args)
    expected = [IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD]
    if in_chans != 3:
        expected = [[0.5] * in_chans] * 2
    assert [args.mean, args.std] == [list(values) for values in expected]
