"""A checkpoint's input (channels, size, patch, mean, std, classes) is the default."""

import shutil

import pytest
from PIL import Image

import main_finetune
import main_pretrain
from util.io.checkpoint_file import read_checkpoint
from util.io.errors import UserError
from util.run.checks import adopt_input, is_different
from util.run.flags import parse_flags

RUN = "--num_workers 0 --batch_size 4 --epochs 1 --warmup_epochs 0 --device cpu".split()
INPUT = "--in_chans 1 --mean 0.1 --std 0.9 --input_size 48 32 --patch_size 16".split()
PRETRAIN = ["--model", "mae_vit_mini_patch4", "--cross_mae", "--weight_fm", "--decoder_depth", "1"]
FINETUNE = ["--model", "vit_mini_patch4"]


def pretrain(*flags) -> None:
    parser = main_pretrain.get_args_parser()
    main_pretrain.main(parse_flags(parser, [*PRETRAIN, *RUN, *map(str, flags)]))


def finetune(*flags) -> None:
    main_finetune.main(main_finetune.parse_args([*FINETUNE, *RUN, *map(str, flags)]))


def stored_input(path) -> tuple:
    args = read_checkpoint(path)["args"]
    size = tuple(args["input_size"])
    return args["in_chans"], size, args["patch_size"], args["mean"], args["std"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, image_folder):
    """A gray, oblong pre-training run with its own statistics, and a fine-tuning run after it."""
    folder = tmp_path_factory.mktemp("input")
    pretrain(*INPUT, "--data_path", image_folder, "--output_dir", folder / "pre")
    source = ["--finetune", folder / "pre/checkpoint.pth", "--data_path", image_folder]
    finetune(*source, "--output_dir", folder / "fine")
    return folder


def test_finetuning_takes_the_input_of_the_encoder(runs):
    """Without one of its flags on the command line."""
    expected = (1, (48, 32), 16, [0.1], [0.9])
    assert stored_input(runs / "pre/checkpoint.pth") == expected
    assert stored_input(runs / "fine/checkpoint.pth") == expected


def test_evaluation_takes_the_input_of_the_classifier(runs, image_folder, capsys):
    """Its result is that of the run's own evaluation."""
    log = (runs / "fine/log.txt").read_text()
    finetune("--eval", "--resume", runs / "fine/checkpoint.pth", "--data_path", image_folder)
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "* Acc@1" in line]
    assert f'"test_acc1": {float(line.split()[3])}' in log
    assert "does nothing here" not in out


DIFFERENT = {
    "mean": ["--mean", 0.2],
    "std": ["--std", 0.3],
    "in_chans": ["--in_chans", 3],
    "input_size": ["--input_size", 32],
    "patch_size": ["--patch_size", 8],
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_flag_that_differs_is_refused(name, runs, image_folder):
    common = ["--data_path", image_folder, *DIFFERENT[name]]
    message = f"^--{name} is .*checkpoint.pth was trained with .*; leave the flag out.$"
    with pytest.raises(UserError, match=message):
        finetune("--eval", "--resume", runs / "fine/checkpoint.pth", *common)
    with pytest.raises(UserError, match=message):
        pretrain("--resume", runs / "pre/checkpoint.pth", "--output_dir", "", *common)


def test_another_model_names_the_flags_it_was_trained_with(runs, image_folder):
    source = ["--resume", runs / "pre/checkpoint.pth", "--data_path", image_folder]
    with pytest.raises(UserError, match="it was trained with --decoder_depth 1: use the same"):
        pretrain(*source, "--output_dir", "", "--decoder_depth", 2)


def test_a_flag_that_agrees_passes(runs, image_folder, capsys):
    source = ["--resume", runs / "fine/checkpoint.pth", "--data_path", image_folder]
    finetune("--eval", *source, *INPUT)
    assert "* Acc@1" in capsys.readouterr().out


def test_in_finetuning_a_flag_wins_with_a_line(runs, image_folder, tmp_path, capsys):
    source = ["--finetune", runs / "pre/checkpoint.pth", "--data_path", image_folder]
    finetune(*source, "--mean", 0.5, "--output_dir", tmp_path)
    assert stored_input(tmp_path / "checkpoint.pth")[3:] == ([0.5], [0.9])
    out = capsys.readouterr().out
    assert "--mean is [0.5], " in out and "was trained with [0.1]" in out


def test_mean_in_0_to_255_is_refused(image_folder):
    """For images; arrays of floats keep their own units."""
    for name, value in (("mean", 127), ("std", 58), ("mean", -0.4)):
        with pytest.raises(UserError, match=f"--{name} holds {value}.*in 0..1"):
            pretrain("--data_path", image_folder, f"--{name}", value, "--output_dir", "")
        with pytest.raises(UserError, match=f"--{name} holds {value}.*in 0..1"):
            finetune("--data_path", image_folder, f"--{name}", value, "--output_dir", "")


def test_other_classes_are_refused_with_both_counts(runs, image_folder, tmp_path):
    shutil.copytree(image_folder / "val", tmp_path / "val")
    (tmp_path / "val/c").mkdir()
    Image.new("L", (48, 48)).save(tmp_path / "val/c/0.png")
    message = "was trained on 2 classes, .* has 3 .they differ in c.; use the data set"
    with pytest.raises(UserError, match=message):
        finetune("--eval", "--resume", runs / "fine/checkpoint.pth", "--data_path", tmp_path)


def test_training_from_random_weights_says_so(image_folder, capsys):
    flags = ["--input_size", 32, "--patch_size", 16, "--output_dir", ""]
    finetune("--data_path", image_folder, *flags)
    assert "No --finetune: training from random weights" in capsys.readouterr().out


def test_older_files_leave_the_defaults():
    parser = main_finetune.get_args_parser()
    args = parse_flags(parser, [])
    adopt_input(args, parser, {"model": "vit_base_patch16", "input_size": 448}, "x.pth")
    assert (args.input_size, args.mean) == (448, None)


@pytest.mark.parametrize(
    "given, stored, expected",
    [
        (224, 224, False),
        (224, (224, 224), False),
        (224, [224, 192], True),
        ([0.5], [0.5] * 3, False),
    ]
    + [([0.5, 0.4, 0.5], [0.5] * 3, True)],
)
def test_one_value_stands_for_all(given, stored, expected):
    assert is_different(given, stored) is expected
