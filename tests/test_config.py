"""--config: flags from YAML, JSON and run.json; what is refused."""

import json

import pytest

import main_finetune
import main_pretrain
from util.io.errors import UserError
from util.run.checks import given_flags
from util.run.flags import parse_flags

WORDS = "--model mae_vit_mini_patch4 --cross_mae --batch_size 8 --input_size 32 48 --amp off"
WORDS = f"{WORDS} --blr 1e-3 --mean -0.1 0.2 0.3 --no_pin_mem --use_fm -1 --data_path a=b".split()
CONTENT = dict(model="mae_vit_mini_patch4", cross_mae=True, batch_size=8, input_size=[32, 48])
CONTENT |= dict(amp="off", blr=1e-3, mean=[-0.1, 0.2, 0.3], no_pin_mem=True, use_fm=[-1])
CONTENT |= dict(data_path="a=b", weight_fm=False, resume=None)
YAML = """
# a comment
model: mae_vit_mini_patch4
cross_mae: true
batch_size: 8
input_size: [32, 48]
amp: off
blr: 1e-3
mean:
- -0.1
- 0.2
- 0.3
no_pin_mem: true
use_fm: -1
data_path: a=b
weight_fm: false
resume: null
"""


def parse(*words):
    return parse_flags(main_pretrain.get_args_parser(), list(map(str, words)))


def flags_of(args) -> dict:
    return {name: value for name, value in vars(args).items() if name[0] != "_"}


@pytest.mark.parametrize("name", ["flags.yaml", "flags.json"])
@pytest.mark.parametrize("flag", ["--config={}", "--config {}", "--conf {}"])
def test_equals_the_command_line(name, flag, tmp_path):
    file = tmp_path / name
    file.write_text(YAML if name.endswith("yaml") else json.dumps(CONTENT))
    args, typed = parse(*flag.format(file).split()), parse(*WORDS)
    assert flags_of(args) == flags_of(typed)
    parser = main_pretrain.get_args_parser()
    assert given_flags(args, parser) == given_flags(typed, parser) >= {"batch_size", "pin_mem"}


def test_command_line_wins(tmp_path):
    file = tmp_path / "flags.yaml"
    file.write_text(YAML)
    for words in (["--batch_size", 4, "--config", file], ["--config", file, "--batch_size=4"]):
        args = parse(*words, "--input_size", 64)
        assert args.batch_size == 4 and args.input_size == 64 and args.amp == "off"


def test_switches_that_change_defaults(tmp_path):
    """--linear_probe in the file changes the defaults, not what the file says."""
    file = tmp_path / "flags.yaml"
    file.write_text("linear_probe: true\nepochs: 7\naa: ''\ncls_token: true\n")
    args = main_finetune.parse_args(["--config", str(file)])
    assert args.linear_probe and args.epochs == 7 and args.blr == 0.1 and args.warmup_epochs == 10
    assert args.aa == "" and args.global_pool is False


def test_run_json_of_an_earlier_run(image_folder, tmp_path, monkeypatch):
    """Also of a run that had a file itself; another run then needs no other flags."""
    flags = "--model mae_vit_mini_patch4 --input_size 16 --epochs 1 --num_workers 0 --device cpu"
    file = tmp_path / "flags.yaml"
    file.write_text("batch_size: 4\nwarmup_epochs: 0\ncross_mae: true\ndecoder_depth: 1\n")
    words = [*flags.split(), "--config", file, "--data_path", image_folder]
    first, again = tmp_path / "first", tmp_path / "again"
    main_pretrain.main(parse(*words, "--output_dir", first))
    file.unlink()
    args = parse("--config", first / "run.json", "--output_dir", again)
    main_pretrain.main(args)
    one, other = (json.loads((folder / "run.json").read_text()) for folder in (first, again))
    assert one["args"] | {"output_dir": "", "log_dir": ""} == other["args"] | {
        "output_dir": "",
        "log_dir": "",
    }
    assert "--config" not in other["command"]
    assert (first / "log.txt").read_text() == (again / "log.txt").read_text()


MISTAKES = {
    "batch: 3": "there is no flag batch",
    "batchsize: 3": "there is no flag batchsize, but batch_size",
    "help: true": "there is no flag help",
    "config: other.yaml": "there is no flag config",
    "cross_mae: 3": "cross_mae is a switch, true or false, not '3'",
    "batch_size: {a: 1}": "batch_size is {'a': '1'}, not a value",
    "- batch_size": "it must map flags to values",
    "": "it must map flags to values",
    "a: [": "it is not YAML (line",
    "batch_size: x": "argument --batch_size: invalid int value: 'x'",
    "amp: fast": "argument --amp: invalid choice: 'fast'",
    "batch_size: [1, 2]": "unrecognized arguments: 2",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_give_one_line(text, tmp_path, capsys):
    (tmp_path / "flags.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        parse("--config", tmp_path / "flags.yaml", "--data_path", "x")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 1
    assert MISTAKES[text] in error


def test_missing_and_damaged_files(tmp_path, capsys):
    (tmp_path / "damaged.json").write_text("{")
    for name, text in (("none.yaml", "No such file"), ("damaged.json", "it is not JSON")):
        with pytest.raises(SystemExit):
            parse("--config", tmp_path / name)
        error = capsys.readouterr().err
        assert f"--config {tmp_path / name}: {text}" in error and len(error.splitlines()) == 1


def test_a_file_that_was_not_read_is_refused():
    """By a launcher that parses the flags itself."""
    args = main_pretrain.get_args_parser().parse_args(["--config", "x", "--data_path", "d"])
    with pytest.raises(UserError, match="--config x was not read"):
        main_pretrain.check_args(args)
