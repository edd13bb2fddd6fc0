"""The command line: every flag of the public code with its type and default, and its commands."""

import importlib
import re

import pytest
from parity_data import note, read_json

CLI = read_json("cli")
MAINS = ("main_pretrain", "main_finetune")
FLAGS = [pytest.param(m, e, id=f"{m}:{e['flag']}") for m in MAINS for e in CLI[m]]

# Where our default differs, and why.
OTHER_DEFAULTS = {
    "device": None,  # CUDA if there is one, else the CPU
    "nb_classes": None,  # counted from the folders
}
SAMPLES = {"int": "3", "float": "0.25", "str": "text"}
TYPES = {"int": int, "float": float, "str": str}
CHOICES = {"mixup_mode": "pair", "remode": "const"}  # flags that take certain words only


def parser_of(main: str):
    return importlib.import_module(main).get_args_parser()


@pytest.mark.parametrize("main, entry", FLAGS)
def test_flag(main, entry):
    """The flag exists, sets its name, has the type and the default."""
    parser, dest = parser_of(main), entry["dest"]
    assert entry["flag"] in parser.format_help()
    default = vars(parser.parse_args([]))[dest]
    assert default == OTHER_DEFAULTS.get(dest, entry["default_in_reference"])
    note(f"type and default of flags: {entry['flag']}")
    if entry["kind"] == "value":
        text = CHOICES.get(dest, SAMPLES[entry["type"]])
        value = vars(parser.parse_args([entry["flag"], text]))[dest]
        if entry["nargs"] == "+":
            (value,) = value
        assert value == TYPES[entry["type"]](text) and type(value) is TYPES[entry["type"]]
    else:
        assert vars(parser.parse_args([entry["flag"]]))[dest] is (entry["kind"] == "switch on")


@pytest.mark.parametrize("name", CLI["seed_commands"])
def test_published_commands(name, caplog):
    """The commands of the public README parse, mean what they say, and pass without a warning."""
    command = re.split(r"\s{2,}\(", CLI["seed_commands"][name])[0].split()
    main = "main_pretrain" if "pretrain" in name else "main_finetune"
    args = parser_of(main).parse_args(command)
    flags = {word.removeprefix("--") for word in command if word.startswith("--")}
    assert all(getattr(args, flag) is not False for flag in flags - {"epoch"})
    if "epoch" in flags:
        assert args.epochs == 100
    importlib.import_module(main).check_args(args)
    assert not caplog.records


@pytest.mark.parametrize("main", MAINS)
def test_epoch_is_short_for_epochs(main):
    """--epoch 100 means --epochs, and no other option may begin like it."""
    parser = parser_of(main)
    assert parser.parse_args(["--epoch", "100"]).epochs == 100
    options = [option for action in parser._actions for option in action.option_strings]
    assert [option for option in options if option.startswith("--epoch")] == ["--epochs"]


@pytest.mark.parametrize("main", MAINS)
def test_help(main, capsys):
    """-h and --help print the options and leave with status 0."""
    for option in ("-h", "--help"):
        with pytest.raises(SystemExit) as stop:
            parser_of(main).parse_args([option])
        assert stop.value.code == 0
        assert "--batch_size" in capsys.readouterr().out


@pytest.mark.parametrize("main", MAINS)
def test_unknown_flag_is_refused(main, capsys):
    with pytest.raises(SystemExit) as stop:
        parser_of(main).parse_args(["--no_such_flag"])
    assert stop.value.code == 2
    assert "--no_such_flag" in capsys.readouterr().err
