"""README.md and docs/*.md: every command, file, link and cited test is checked.

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
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
README = TEXTS["README.md"]
SEED_COMMANDS = json.loads((ROOT / "tests/parity/cli.json").read_text())["seed_commands"]
WRITTEN_BY_A_RUN = ("log.txt", "wandb_id.txt", "features.txt", "confusion.png")


def shell_commands(text: str) -> list[list[str]]:
    """Commands of a Markdown text as words: ```sh blocks, and `python ...` or `bash ...` inline.

    VAR=value and srun in front of a command are removed, and & behind it.
    """
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`((?:python|bash) [^`…]*)`", outside_of_blocks(text))
    commands = []
    for block in [*blocks, *inline]:
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and (words[0] == "srun" or re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*", words[0])):
                words.pop(0)
            if words and words[-1] == "&":
                words.pop()
            if words:
                commands.append(words)
    return commands


def outside_of_blocks(text: str) -> str:
    """A Markdown text without its ``` blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def program_and_arguments(words: list[str]) -> tuple[str, list[str]] | None:
    """(script or module, its arguments) of a torchrun or python command; None for another one."""
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        parser = get_args_parser()
        if "--shutdown-timeout" in words and "--shutdown-timeout" not in parser.format_help():
            i = words.index("--shutdown-timeout")  # PyTorch 2.11 does not know it
            words = words[:i] + words[i + 2 :]
        launch = parser.parse_args(words[1:])
        return launch.training_script, launch.training_script_args
    if words[0] == "python":
        if words[1] == "-m":
            return words[2], words[3:]
        return words[1].removeprefix("PATH/"), words[2:]  # PATH: this repository
    return None


def has_parser(program: str) -> bool:
    """Whether the program is a main script or a tool; `tools.NAME` stands for all tools."""
    return re.fullmatch(r"main_\w+\.py|tools\.[a-z_]+", program) is not None


def parse(program: str, arguments: list[str]):
    """The arguments as the program's own parser reads them."""
    module = importlib.import_module(program.removesuffix(".py"))
    return module.get_args_parser().parse_args(arguments)


COMMANDS = {page: shell_commands(text) for page, text in TEXTS.items()}
PROGRAMS = {
    page: [found for found in map(program_and_arguments, commands) if found is not None]
    for page, commands in COMMANDS.items()
}
PARSED = [
    pytest.param(program, arguments, id=f"{page}-{i}-{program}")
    for page, programs in PROGRAMS.items()
    for i, (program, arguments) in enumerate(programs)
    if has_parser(program) and arguments != ["--help"]
]
README_PROGRAMS = [
    (program, arguments) for program, arguments in PROGRAMS["README.md"] if has_parser(program)
]


def test_there_is_something_to_check():
    assert len(README_PROGRAMS) >= 6
    assert len(PARSED) >= 40
    assert {"main_pretrain.py", "main_finetune.py"} <= {program for program, _ in README_PROGRAMS}


@pytest.mark.parametrize(("program", "arguments"), PARSED)
def test_command_parses(program, arguments):
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
def test_seed_command_is_in_the_readme(name):
    """Flag for flag in the same order; only paths may differ."""
    path_flags = {"--data_path", "--output_dir", "--finetune", "--resume"}

    def without_paths(arguments):
        pairs = zip([None, *arguments], arguments, strict=False)
        return ["PATH" if before in path_flags else word for before, word in pairs]

    expected = without_paths(shlex.split(re.sub(r"\(.*\)", "", SEED_COMMANDS[name])))
    assert expected in [without_paths(arguments) for _, arguments in README_PROGRAMS]


@pytest.mark.parametrize("page", TEXTS)
def test_programs_in_commands_exist(page):
    for words in COMMANDS[page]:
        if words[0] == "bash":
            assert (ROOT / words[1]).is_file(), words
    for program, _ in PROGRAMS[page]:
        if program.endswith(".py"):
            assert (ROOT / program).is_file(), program
        elif has_parser(program):
            assert (ROOT / (program.replace(".", "/") + ".py")).is_file(), program


@pytest.mark.parametrize("page", TEXTS)
def test_requirement_files_in_commands_exist(page):
    files = re.findall(r"pip install -r ([\w./-]+)", TEXTS[page])
    for file in files:
        assert (ROOT / file).is_file(), file


@pytest.mark.parametrize("page", TEXTS)
def test_files_in_running_text_exist(page):
    """`path/file.ext` in back quotes is a file of the repository; `test_x.py` is one of tests/."""
    for name in re.findall(r"`([\w./-]+\.(?:py|sh|toml|txt|md|png))`", TEXTS[page]):
        if name not in WRITTEN_BY_A_RUN:
            assert (ROOT / name).is_file() or (ROOT / "tests" / name).is_file(), name


@pytest.mark.parametrize("page", TEXTS)
def test_cited_tests_exist(page):
    for file, function in re.findall(r"`(test_\w+\.py)::(\w+)`", TEXTS[page]):
        assert f"\ndef {function}(" in (ROOT / "tests" / file).read_text(), (file, function)


def heading_anchors(text: str) -> set[str]:
    """The #anchors that a Markdown page gives its headings."""
    titles = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.strip().replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", TEXTS)
def test_links_inside_the_repository_resolve(page):
    text = outside_of_blocks(TEXTS[page])
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:href|src)=[\"']([^\"']+)", text)
    assert links or page != "README.md"
    for link in links:
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in heading_anchors(target.read_text(encoding="utf-8")), link


def test_every_page_is_linked_from_the_readme():
    for page in TEXTS:
        assert page == "README.md" or f"({page}" in README, page


def test_published_accuracies_are_the_published_ones():
    for value in ("79.318", "83.722", "84.598", "85.432", "86.256", "79.462"):
        assert value in README
    assert "* Acc@1 83.722 Acc@5 96.686 loss 0.729" in README
