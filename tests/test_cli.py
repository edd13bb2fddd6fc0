"""Command line: flags, types, defaults and README commands of the public CrossMAE code."""

import contextlib
import importlib
import os
import re

import pytest
from parity_data import read_json, record

from util.build import build_pretrain_model
from util.io.errors import UserError

CLI = read_json("cli")
MAINS = ("main_pretrain", "main_finetune")
FLAGS = [pytest.param(m, e, id=f"{m}:{e['flag']}") for m in MAINS for e in CLI[m]]

# Defaults that differ from the public code, with the reason.
CHANGED_DEFAULTS = {
    "num_workers": min(10, os.cpu_count() or 1),  # at most one per core
    "device": None,  # CUDA if available, else CPU
    "nb_classes": None,  # inferred from the class folders
}
SAMPLES = {"int": "3", "float": "0.25", "str": "text"}
TYPES = {"int": int, "float": float, "str": str}
CHOICES = {"mixup_mode": "pair", "remode": "const"}  # flags with fixed choices


def get_parser(main: str):
    return importlib.import_module(main).get_args_parser()


@pytest.mark.parametrize("main, entry", FLAGS)
def test_flag(main, entry):
    """The flag exists with the stored destination, type and default."""
    parser, dest = get_parser(main), entry["dest"]
    assert entry["flag"] in parser.format_help()
    default = vars(parser.parse_args([]))[dest]
    assert default == CHANGED_DEFAULTS.get(dest, entry["default_in_reference"])
    record(f"type and default of flags: {entry['flag']}")
    if entry["kind"] == "value":
        text = CHOICES.get(dest, SAMPLES[entry["type"]])
        value = vars(parser.parse_args([entry["flag"], text]))[dest]
        if entry["nargs"] == "+":
            (value,) = value
        assert value == TYPES[entry["type"]](text) and type(value) is TYPES[entry["type"]]
    else:
        assert vars(parser.parse_args([entry["flag"]]))[dest] is (entry["kind"] == "switch on")


@pytest.mark.parametrize("name", CLI["seed_commands"])
def test_published_commands_parse_without_warnings(name, caplog):
    """The commands of the public README parse and set their flags."""
    command = re.split(r"\s{2,}\(", CLI["seed_commands"][name])[0].split()
    main = "main_pretrain" if "pretrain" in name else "main_finetune"
    args = get_parser(main).parse_args(command)
    flags = {word.removeprefix("--") for word in command if word.startswith("--")}
    assert all(getattr(args, flag) is not False for flag in flags - {"epoch"})
    if "epoch" in flags:
        assert args.epochs == 100
    importlib.import_module(main).check_args(args)
    assert not caplog.records


@pytest.mark.parametrize("main", MAINS)
def test_epoch_abbreviates_epochs(main):
    """--epoch 100 means --epochs 100; no other option may start with --epoch."""
    parser = get_parser(main)
    assert parser.parse_args(["--epoch", "100"]).epochs == 100
    options = [option for action in parser._actions for option in action.option_strings]
    assert [option for option in options if option.startswith("--epoch")] == ["--epochs"]


@pytest.mark.parametrize("main", MAINS)
def test_help_exits_with_status_0(main, capsys):
    """-h and --help print the options and exit with status 0."""
    for option in ("-h", "--help"):
        with pytest.raises(SystemExit) as stop:
            get_parser(main).parse_args([option])
        assert stop.value.code == 0
        assert "--batch_size" in capsys.readouterr().out


@pytest.mark.parametrize("main", MAINS)
def test_unknown_flag_is_refused(main, capsys):
    with pytest.raises(SystemExit) as stop:
        get_parser(main).parse_args(["--no_such_flag"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "--no_such_flag" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("main", MAINS)
def test_older_launchers_pass_local_rank(main):
    """In both spellings, of which --help shows one."""
    for flag in ("--local_rank", "--local-rank"):
        assert get_parser(main).parse_args([f"{flag}=3"]).local_rank == 3
    assert "--local-rank" not in get_parser(main).format_help()


@pytest.mark.parametrize("main", MAINS)
def test_typo_names_the_closest_flag(main, capsys):
    with pytest.raises(SystemExit):
        get_parser(main).parse_args(["--batchsize", "3"])
    error = capsys.readouterr().err
    assert "--batchsize" in error and "did you mean --batch_size?" in error
    for argv in (["--zzzzzzzz"], ["--batch_size", "many"]):  # nothing is close; the flag is right
        with pytest.raises(SystemExit):
            get_parser(main).parse_args(argv)
        error = capsys.readouterr().err
        assert "; see --help" in error and "did you mean" not in error


@pytest.mark.parametrize("main", MAINS)
def test_negative_number_in_scientific_notation_is_a_value(main):
    """It is then refused with its range, not with "expected one argument"."""
    args = get_parser(main).parse_args(["--lr", "-1e-3", "--data_path", "x"])
    assert args.lr == -1e-3
    with pytest.raises(UserError, match="--lr is -0.001; it must be at least 0"):
        importlib.import_module(main).check_args(args)


@pytest.mark.parametrize("main", MAINS)
def test_missing_data_path_is_named(main):
    with pytest.raises(UserError, match="--data_path is missing"):
        importlib.import_module(main).check_args(get_parser(main).parse_args([]))


@pytest.mark.parametrize("flags, is_refused", [(["--cross_mae"], True), ([], False)])
def test_kept_mask_ratio_is_checked_where_it_acts(flags, is_refused):
    """When the model is built, so before the first step; an MAE ignores it."""
    flags = [*flags, *"--model mae_vit_mini_patch4 --input_size 32 --mask_ratio 0.5".split()]
    args = get_parser("main_pretrain").parse_args([*flags, "--kept_mask_ratio", "0.75"])
    with pytest.raises(UserError, match="exceeds") if is_refused else contextlib.nullcontext():
        build_pretrain_model(args)


@pytest.mark.parametrize(
    "tool, required",
    {
        "data_stats": "PATH",
        "demo_data": "OUT_DIR",
        "export": "--checkpoint, --to, --out",
        "extract": "--data, --out, --checkpoint",
        "knn": "--data_path, --checkpoint",
        "plot_log": "DIR, --out",
        "submit": "--job_dir, SCRIPT",
        "visualize": "--checkpoint, --out",
    }.items(),
)
def test_tools_name_what_is_missing(tool, required, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"tools.{tool}").get_args_parser().parse_args([])
    assert stop.value.code == 2
    assert f"the following arguments are required: {required}" in capsys.readouterr().err


@pytest.mark.parametrize("main", ["main_pretrain", "main_finetune"])
def test_nothing_is_skipped_unless_asked(main):
    args = get_parser(main).parse_args([])
    assert args.skip_bad_images is False and args.skip_nonfinite == 0
