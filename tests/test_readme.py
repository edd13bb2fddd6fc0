"""README.md promises commands, files and links: every one of them is looked at here.

A command is parsed by the parser that would parse it for real: torchrun's own, then that of
main_pretrain, main_finetune or the tool. Nothing is started.
"""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SEED_COMMANDS = json.loads((ROOT / "tests/parity/cli.json").read_text())["seed_commands"]


def shell_commands(text: str) -> list[list[str]]:
    """The commands in the ```sh blocks of a Markdown text, as words, without VAR=value in front."""
    commands = []
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*", words[0]):
                words.pop(0)
            if words:
                commands.append(words)
    return commands


def program_and_arguments(words: list[str]) -> tuple[str, list[str]] | None:
    """(script or module, its arguments) of a torchrun or python command; None for another one."""
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        launch = get_args_parser().parse_args(words[1:])
        return launch.training_script, launch.training_script_args
    if words[0] == "python":
        return (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
    return None


def parse(program: str, arguments: list[str]):
    """The arguments as the program's own parser reads them."""
    module = importlib.import_module(program.removesuffix(".py"))
    return module.get_args_parser().parse_args(arguments)


COMMANDS = shell_commands(README)
PROGRAMS = [found for found in map(program_and_arguments, COMMANDS) if found is not None]
OURS = [
    (program, arguments)
    for program, arguments in PROGRAMS
    if program.endswith(".py") or program.startswith("util.")
]


def test_there_is_something_to_check():
    assert len(OURS) >= 8
    assert {"main_pretrain.py", "main_finetune.py"} <= {program for program, _ in OURS}


@pytest.mark.parametrize(
    ("program", "arguments"), OURS, ids=[f"{i}-{program}" for i, (program, _) in enumerate(OURS)]
)
def test_readme_command_parses(program, arguments):
    args = parse(program, arguments)
    if "--epoch" in arguments:  # the prefix that the published commands use
        assert args.epochs == int(arguments[arguments.index("--epoch") + 1])


@pytest.mark.parametrize("name", SEED_COMMANDS)
def test_seed_command_parses(name):
    arguments = shlex.split(re.sub(r"\(.*\)", "", SEED_COMMANDS[name]))
    program = "main_pretrain.py" if name.startswith("pretrain") else "main_finetune.py"
    args = parse(program, arguments)
    if name.startswith("pretrain"):
        assert (args.epochs, args.warmup_epochs, args.decoder_depth) == (800, 40, 12)
        assert args.cross_mae and args.weight_fm and args.use_input and args.norm_pix_loss
    elif name.startswith("finetune"):
        assert (args.epochs, args.layer_decay, args.mixup, args.cutmix) == (100, 0.65, 0.8, 1.0)
        assert args.finetune == "CKPT" and args.dist_eval
    else:
        assert args.eval and args.resume == "CKPT" and args.batch_size == 16


@pytest.mark.parametrize("name", SEED_COMMANDS)
def test_seed_command_stands_in_the_readme(name):
    """Flag for flag in the same order; only folders and file names are free."""
    places = {"--data_path", "--output_dir", "--finetune", "--resume"}

    def without_places(arguments):
        pairs = zip([None, *arguments], arguments, strict=False)
        return ["PLACE" if before in places else word for before, word in pairs]

    wanted = without_places(shlex.split(re.sub(r"\(.*\)", "", SEED_COMMANDS[name])))
    assert wanted in [without_places(arguments) for _, arguments in OURS]


def test_programs_in_commands_exist():
    for words in COMMANDS:
        if words[0] == "bash":
            assert (ROOT / words[1]).is_file(), words
    for program, _ in OURS:
        path = program if program.endswith(".py") else program.replace(".", "/") + ".py"
        assert (ROOT / path).is_file(), program


def test_requirement_files_in_commands_exist():
    for words in COMMANDS:
        for flag, value in zip(words, words[1:], strict=False):
            if words[0] == "pip" and flag == "-r":
                assert (ROOT / value).is_file(), words


def test_files_in_running_text_exist():
    """`path/file.ext` in back quotes is a file of the repository."""
    for name in re.findall(r"`([\w./-]+\.(?:py|sh|toml|txt|md|png))`", README):
        if name not in ("log.txt",):  # written by a run
            assert (ROOT / name).is_file(), name


def heading_anchors(text: str) -> set[str]:
    """The #anchors that a Markdown page gives its headings."""
    titles = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.strip().replace(" ", "-") for title in plain}


def test_links_inside_the_repository_resolve():
    text = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:href|src)=[\"']([^\"']+)", text)
    assert links
    for link in links:
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = ROOT / path if path else ROOT / "README.md"
        assert target.exists(), link
        if anchor:
            assert anchor in heading_anchors(target.read_text(encoding="utf-8")), link


def test_published_accuracies_are_the_published_ones():
    for value in ("79.318", "83.722", "84.598", "85.432", "86.256", "79.462"):
        assert value in README
    assert "* Acc@1 83.722 Acc@5 96.686 loss 0.729" in README
