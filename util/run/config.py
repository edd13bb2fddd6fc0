"""--config FILE: flags from a YAML or JSON file, or from run.json of an earlier run."""

import argparse
import difflib
import json
from pathlib import Path

import yaml

SWITCHES = {"true": True, "false": False}


def expand_config(parser: argparse.ArgumentParser, words: list[str]) -> list[str]:
    """Words of a command line, those of its --config first: later ones win.

    Leaves the process with the parser's one-line error if the file cannot be used.
    """
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--config", default="")
    found, rest = own.parse_known_args(words)
    if not found.config:
        return words
    try:
        content = read_config(Path(found.config))
        if isinstance(content, dict) and isinstance(content.get("command"), list):
            return [*expand_config(parser, content["command"][1:]), *rest]  # run.json
        if not isinstance(content, dict):
            raise ValueError("it must map flags to values, as in `batch_size: 64`")
        return [word for item in content.items() for word in to_words(parser, *item)] + rest
    except (OSError, ValueError) as error:
        parser.error(f"--config {found.config}: {getattr(error, 'strerror', None) or error}")


def read_config(path: Path):
    """Content of a file, with every scalar as the text that is written there.

    YAML's own types would turn the value of `amp: off` into False and 1e-3 into text.

    Raises:
        OSError: it cannot be read.
        ValueError: it is neither YAML nor JSON.
    """
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json":
            return json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
        return yaml.load(text, yaml.BaseLoader)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error})") from error
    except yaml.YAMLError as error:
        where = f"line {error.problem_mark.line + 1}" if hasattr(error, "problem_mark") else "?"
        raise ValueError(f"it is not YAML ({where})") from error


def to_words(parser: argparse.ArgumentParser, name: str, value) -> list[str]:
    """One entry as words of a command line; null leaves a flag at its default.

    Raises:
        ValueError: there is no such flag, or it does not take such a value.
    """
    names = [x.removeprefix("--") for x in parser._option_string_actions if x.startswith("--")]
    if name not in names or name in ("help", "config"):
        close = difflib.get_close_matches(str(name), names, n=1)
        raise ValueError(f"there is no flag {name}{f', but {close[0]}' if close else ''}")
    flag, action = f"--{name}", parser._option_string_actions[f"--{name}"]
    if value is None or value == "null":
        return []
    if action.nargs == 0 and str(value).lower() not in SWITCHES:
        raise ValueError(f"{name} is a switch, true or false, not {value!r}")
    if action.nargs in (0, "?") and str(value).lower() in SWITCHES:  # "?": --compile
        return [flag] if SWITCHES[str(value).lower()] else []
    values = value if isinstance(value, list) else [value]
    if isinstance(value, dict) or not all(isinstance(x, str) for x in values):
        raise ValueError(f"{name} is {value!r}, not a value that the flag takes")
    if len(values) == 1 and action.nargs is None:
        return [f"{flag}={values[0]}"]
    return [flag, *values]
