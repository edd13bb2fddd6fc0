"""Who imports whom: read from the source, so that a wrong import fails here and not in a review.

Imports point downwards: main and tools -> engines, models -> rooms of util -> files of util's root.
A room is a folder; what it may import is one line below.
"""

import ast
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# room -> rooms it may import from, besides itself; "util" is the files at util's root
ROOMS = {
    "util.io": "",
    "util": "util.io",
    "util.layers": "util.io util",
    "models": "util.io util util.layers",
    "util.run": "util.io util",
    "util.data": "util.io util util.run",
    "util.datasets": "util.io util util.data",
    "engine": "util.io util util.run",
    "util.build": "util.io util util.layers util.run models",
    "util.hub": "util.io util util.layers util.build models",
    "hubconf": "util.hub",
    "util.vis": "util.io util util.layers util.data",
    "util.eval": "util.io util util.run util.data util.datasets util.build util.vis",
    "tools.formats": "util.io util util.layers util.run util.data util.build models",
    "tools.bench": "util.io util util.layers util.run util.build models",
    "tools": "util.io util util.layers util.run util.data util.datasets util.build util.vis "
    "util.eval models tools.formats tools.bench",
    "main": "util.io util util.layers util.run util.data util.datasets util.build util.vis "
    "util.eval engine",
}
# At util's root, because users of the MAE family import them by name; above the rest of it.
OWN_ROOM = {"util.datasets", "util.build", "util.hub"}
MODEL_ROOMS = ("models", "util.layers")
NOT_FOR_MODELS = {"argparse", "os", "sys", "pathlib", "subprocess", "torch.distributed"}


def modules() -> dict[str, ast.Module]:
    """Every module of the project, {name: syntax tree}, for example "util.layers.masking"."""
    paths = [*ROOT.glob("*.py"), *(ROOT / "util").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    return {
        name: ast.parse(path.read_text(), str(path))
        for name, path in sorted(names.items())
        if not name.endswith("__init__")
    }


def imported(tree: ast.Module) -> set[str]:
    """Dotted names a module imports anywhere, with what `from a import b` may mean: a and a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "the project writes its imports in full, not relatively"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(name: str) -> str:
    """Key of ROOMS that a module belongs to."""
    if name in OWN_ROOM:
        return name
    if "." in name:
        return name.rpartition(".")[0]
    return name.split("_")[0]


MODULES = modules()
IMPORTS = {name: imported(tree) for name, tree in MODULES.items()}
OWN_IMPORTS = {name: (names & MODULES.keys()) - {name} for name, names in IMPORTS.items()}


def test_every_room_has_its_sentence():
    rooms = {path.parent for room in ("util", "tools") for path in (ROOT / room).glob("*/*.py")}
    for folder in rooms | {ROOT / "tools"}:
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert text and len(text.splitlines()) <= 2, folder


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downwards(name):
    room = room_of(name)
    allowed = {room, *ROOMS[room].split()}
    for other in OWN_IMPORTS[name]:
        assert room_of(other) in allowed, f"{name} imports {other}, which its room may not"


def test_no_circles_between_files():
    order = list(TopologicalSorter(OWN_IMPORTS).static_order())  # raises CycleError naming a circle
    assert set(order) == set(OWN_IMPORTS)


def test_no_circles_between_rooms():
    rooms = {room: below.split() for room, below in ROOMS.items()}
    assert set(TopologicalSorter(rooms).static_order()) == set(ROOMS)  # raises CycleError


def test_commands_are_imported_by_nothing():
    """A module that is run is no library; the one exception is what a tool's tests import."""
    commands = {name for name in MODULES if room_of(name) == "main"}
    for name, others in OWN_IMPORTS.items():
        assert not others & commands, name


def test_engines_know_no_model():
    for name in MODULES:
        if room_of(name) == "engine":
            assert not [x for x in OWN_IMPORTS[name] if room_of(x) in MODEL_ROOMS], name


@pytest.mark.parametrize("name", [name for name in MODULES if room_of(name) in MODEL_ROOMS])
def test_models_know_no_flags_files_or_processes(name):
    assert not IMPORTS[name] & NOT_FOR_MODELS
    root = {other for other in OWN_IMPORTS[name] if room_of(other) in ("util", "util.io")}
    assert root <= {"util.casts", "util.pos_embed", "util.io.errors"}


def test_only_attention_knows_flash_attn():
    for name, names in IMPORTS.items():
        if name != "util.layers.attention":
            assert not [other for other in names if other.split(".")[0].startswith("flash_attn")]


def test_matplotlib_is_imported_by_figures_only():
    """Training imports it only for --log_images, and then through util.vis."""
    for name, names in IMPORTS.items():
        if any(other.split(".")[0] == "matplotlib" for other in names):
            assert room_of(name) in ("util.vis", "tools"), name


def test_nothing_of_the_project_imports_the_tests():
    for name, names in IMPORTS.items():
        assert not [other for other in names if other.split(".")[0] in ("tests", "pytest")], name


def test_imported_packages_are_declared():
    """Besides the standard library and the optional packages."""
    optional = "flash_attn onnxruntime sklearn submitit torchcodec transformers wandb".split()
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    declared = {re.split(r"[^\w-]", line)[0].lower() for line in lines if line[:1].isalpha()}
    own_names = {"PIL": "pillow", "yaml": "pyyaml"}
    roots = {name.split(".")[0] for names in IMPORTS.values() for name in names}
    roots -= {name.split(".")[0] for name in MODULES} | sys.stdlib_module_names | set(optional)
    assert {own_names.get(root, root) for root in roots} <= declared
