"""Every numeric flag with extreme values: accepted and usable, or refused in one line."""

import argparse
import math

import pytest
import torch

import main_finetune
import main_pretrain
from util.build import build_classifier, build_pretrain_model
from util.data.checks import check_augmentation, check_classes, drop_default_policy
from util.data.loaders import build_train_loader
from util.datasets import build_dataset, build_pretrain_dataset
from util.io.errors import UserError
from util.optim import build_adamw
from util.run.checks import set_mean_std
from util.run.finetune_flags import check_cutmix

VALUES = ["0", "-1", "0.5", "nan", "inf", "-inf", "1e30", "18446744073709551616", "1" * 40]
BASE = "--input_size 32 --patch_size 16 --num_workers 0 --device cpu --batch_size 2".split()
PRETRAIN = [*BASE, *"--model mae_vit_mini_patch4 --cross_mae --decoder_depth 1".split()]
FINETUNE = [*BASE, "--model", "vit_mini_patch4", "--aa", "", "--reprob", "1", "--mixup", "0.8"]
NO_EFFECT = {"world_size", "local_rank"}  # accepted for older launchers


def numeric_flags(module) -> list[str]:
    return [
        action.dest
        for action in module.get_args_parser()._actions
        if action.type in (int, float) and action.dest not in NO_EFFECT
    ]


def set_up_pretraining(args) -> None:
    """All that a run does before its first step, and one image."""
    main_pretrain.check_args(args)
    set_mean_std(args)
    start(args)
    dataset = build_pretrain_dataset(args)
    build_train_loader(dataset, args)
    model = build_pretrain_model(args)
    dataset[0, 0]
    build_adamw([{"params": list(model.parameters())}], args.lr or args.blr, (0.9, 0.95))


def set_up_finetuning(args) -> None:
    main_finetune.check_args(args)
    set_mean_std(args)
    start(args)
    check_cutmix(args)
    drop_default_policy(args)
    check_augmentation(args)
    check_classes(args)
    dataset = build_dataset(True, args)
    build_train_loader(dataset, args)
    model = build_classifier(args)
    image, label = dataset[0, 0]
    _, mixup = main_finetune.build_criterion(args, [("", 0), ("", 1)])
    if mixup is not None and args.batch_size < 1000:
        mixup(torch.stack([image, image]), torch.tensor([label, label]))
    main_finetune.build_optimizer(argparse.Namespace(**{**vars(args), "lr": 1e-3}), model)


def start(args) -> None:
    args.rank, args.world_size, args.device = 0, 1, torch.device("cpu")
    torch.manual_seed(args.seed)


CASES = [
    pytest.param(module, set_up, base, name, id=f"{module.__name__}-{name}")
    for module, set_up, base in (
        (main_pretrain, set_up_pretraining, PRETRAIN),
        (main_finetune, set_up_finetuning, FINETUNE),
    )
    for name in numeric_flags(module)
]


@pytest.mark.parametrize("module, set_up, base, name", CASES)
def test_extreme_values(module, set_up, base, name, image_folder, capsys):
    data = ["--data_path", str(image_folder), "--output_dir", "out"]
    for value in VALUES:
        try:
            args = module.get_args_parser().parse_args([*base, *data, f"--{name}={value}"])
        except SystemExit:  # argparse: not an integer
            assert f"--{name}" in capsys.readouterr().err
            continue
        try:
            set_up(args)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
        else:
            assert math.isfinite(float(value)), f"--{name} {value} was accepted"


MORE = {
    "--cutmix_minmax .5 .5": "cuts from 16 to 16 of 32 pixels",
    "--cutmix_minmax .3 .31": "cuts from 9 to 9",
    "--cutmix_minmax 0 0": "cuts from 0 to 0",
    "--cutmix_minmax 1 1": "cuts from 32 to 32",
    "--recount -1": "--recount is -1; it must be in",
    "--color_jitter -1": "--color_jitter is -1.0; it must be in",
    "--color_jitter nan": "--color_jitter is nan",
    "--seed 18446744073709551616": "--seed is 18446744073709551616",
}


@pytest.mark.parametrize("flags", MORE)
def test_found_by_attack(flags, image_folder):
    parser = main_finetune.get_args_parser()
    data = ["--data_path", str(image_folder), "--output_dir", ""]
    with pytest.raises(UserError, match=MORE[flags]):
        set_up_finetuning(parser.parse_args([*FINETUNE, *data, *flags.split()]))


@pytest.mark.parametrize("width", ["0", "-4"])
def test_decoder_width(width):
    args = main_pretrain.get_args_parser().parse_args(
        ["--data_path", "x", "--decoder_embed_dim", width]
    )
    with pytest.raises(UserError, match=f"--decoder_embed_dim is {width}; it must be in"):
        main_pretrain.check_args(args)
