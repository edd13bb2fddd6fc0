"""How many planted faults does the test suite notice?

    python scripts/plant_faults.py --count 150 --seed 1 --jobs 2 [FILE ...]

Draws places in the source files at random and changes one at a time: a comparison, an operator, a
number, a condition is turned around, or a call is left out. The tests of that file then run until
the first one fails: the test file with its name, then those that import it directly or through
another file. A fault that none notices is printed as SURVIVED; not all are real faults (an equal
result, a default that nobody uses, the place of a label), so judge each.

Works in clones of the last commit; the libraries are imported once and every fault gets a fork.
"""

import argparse
import ast
import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("*.py", "util/**/*.py", "tools/**/*.py")
TIMEOUT = 300  # seconds for the tests of one fault; a hang counts as noticed
MAX_TEST_FILES = 6
LIBRARIES = "torch torchvision timm numpy PIL matplotlib.figure pytest safetensors.torch".split()
OPPOSITE = {
    **{ast.Lt: ast.GtE, ast.GtE: ast.Gt, ast.Gt: ast.GtE, ast.LtE: ast.Lt, ast.Eq: ast.NotEq},
    **{ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn},
    **{ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div},
    **{ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.And: ast.Or},
    ast.Or: ast.And,
}


class Fault(NamedTuple):
    file: str
    line: int
    before: str
    after: str
    start: int  # in bytes
    end: int


def change(node: ast.AST) -> ast.AST | None:
    """The node with a fault, None where this script knows none."""
    match node:
        case ast.Compare(left, [op], right) if type(op) in OPPOSITE:
            return ast.Compare(left, [OPPOSITE[type(op)]()], right)
        case ast.BinOp(left, op, right) if type(op) in OPPOSITE:
            return ast.BinOp(left, OPPOSITE[type(op)](), right)
        case ast.BoolOp(op, values):
            return ast.BoolOp(OPPOSITE[type(op)](), values)
        case ast.UnaryOp(ast.Not(), operand):
            return ast.Call(ast.Name("bool"), [operand], [])
        case ast.IfExp(test, body, orelse):
            return ast.IfExp(test, orelse, body)
        case ast.Constant(bool() as value):
            return ast.Constant(not value)
        case ast.Constant(int() | float() as value):
            return ast.Constant(value + 1)
        case ast.Expr(ast.Call()):
            return ast.Constant(None)
    return None


def find_faults(file: str) -> list[Fault]:
    """All faults for a file, except in messages and docstrings."""
    source = (ROOT / file).read_bytes()
    starts = [0]  # of the lines
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    tree = ast.parse(source)
    messages = [x for x in ast.walk(tree) if isinstance(x, ast.Raise | ast.JoinedStr)]
    skipped = {id(inner) for x in messages for inner in ast.walk(x)}
    faults = []
    for node in ast.walk(tree):
        changed = None if id(node) in skipped else change(node)
        if changed is not None:
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            before, after = source[start:end].decode(), f"({ast.unparse(changed)})"
            faults.append(Fault(file, node.lineno, before, after, start, end))
    return faults


@functools.cache
def tests_of(file: str) -> list[str]:
    """Test files of a source file: the one with its name, those that import it, and those that
    import a source file which imports it.
    """
    tests = sorted((ROOT / "tests").glob("test_*.py"), key=lambda test: test.stat().st_size)
    own = [test for test in tests if test.stem == f"test_{Path(file).stem}"]
    users = [ROOT / other for other in list_sources() if imports(ROOT / other, file)]
    direct = [test for test in tests if imports(test, file)]
    indirect = [test for test in tests for user in users if imports(test, user.relative_to(ROOT))]
    found = dict.fromkeys([*own, *direct, *indirect])
    return [f"tests/{test.name}" for test in found][:MAX_TEST_FILES]


@functools.cache
def list_sources() -> list[str]:
    found = [path.relative_to(ROOT) for pattern in SOURCES for path in ROOT.glob(pattern)]
    return sorted(map(str, dict.fromkeys(found)))


@functools.cache
def imports(path: Path, file: str | Path) -> bool:
    """Whether a Python file imports a source file."""
    module = str(file).removesuffix(".py").replace("/", ".")
    package, _, name = module.rpartition(".")
    pattern = rf"from {re.escape(module)} import|import {re.escape(module)}\b"
    if package:
        pattern += rf"|from {re.escape(package)} import [^\n]*\b{name}\b"
    return re.search(pattern, path.read_text()) is not None


def run_tests(copy: str, tests: list[str]) -> None:
    """In a process of its own: exit status 0 if all tests pass."""
    os.setpgrp()
    os.chdir(copy)
    sys.path.insert(0, copy)
    log = os.open("tests.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import pytest

    options = "-x -q -p no:cacheprovider -p no:xdist -m".split()
    os._exit(pytest.main([*options, "not slow", *tests]))


def try_fault(fault: Fault, copies: SimpleQueue, context) -> dict:
    """Plant it in a free copy, run the tests, take it out."""
    copy = copies.get()
    path, began = Path(copy, fault.file), time.monotonic()
    source = path.read_bytes()
    path.write_bytes(source[: fault.start] + fault.after.encode() + source[fault.end :])
    process = context.Process(target=run_tests, args=(copy, tests_of(fault.file)))
    process.start()
    process.join(TIMEOUT)
    outcome = "SURVIVED" if process.exitcode == 0 else "noticed"
    try:
        os.killpg(process.pid, signal.SIGKILL)  # also what the tests have left running
    except ProcessLookupError:
        pass
    process.join()
    path.write_bytes(source)
    copies.put(copy)
    seconds = round(time.monotonic() - began)
    print(outcome, f"{fault.file}:{fault.line}", fault.before, "->", fault.after, f"{seconds} s")
    sys.stdout.flush()
    return fault._asdict() | {"outcome": outcome, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="JSON file for the outcomes")
    parser.add_argument("files", nargs="*", help="source files (default: all with tests)")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    for library in LIBRARIES:
        __import__(library)
    files = args.files or [file for file in list_sources() if tests_of(file)]
    faults = [fault for file in files for fault in find_faults(file)]
    chosen = random.Random(args.seed).sample(faults, min(args.count, len(faults)))
    print(f"{len(faults)} places in {len(files)} files, {len(chosen)} drawn with seed {args.seed}")
    copies, context = SimpleQueue(), get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        for job in range(args.jobs):
            subprocess.run(["git", "clone", "-q", ROOT, f"{folder}/{job}"], check=True)
            copies.put(f"{folder}/{job}")
        with ThreadPoolExecutor(args.jobs) as pool:
            results = list(pool.map(lambda fault: try_fault(fault, copies, context), chosen))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    counts = Counter(result["outcome"] for result in results)
    print(f"{counts['noticed']} of {len(results)} planted faults were noticed")


if __name__ == "__main__":
    main()
