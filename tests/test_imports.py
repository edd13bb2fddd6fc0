"""Who imports whom: read from the source, so that a wrong import fails here and not in a review.

Imports point downwards only: main -> engine, models, util; engine -> util; models -> util; inside
util by the layers below, where a module may also use another one of its own layer. Tools (what a
user runs with `python -m util.NAME`) stand beside the mains: they import downwards and nothing
imports them.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

UTIL_LAYERS = [
    set(layer.split())
    for layer in (
        "attention masking patches pos_embed lr_sched lr_decay optim cli distributed download "
        "errors files images pictures rng recompute signals textbook transforms",
        "blocks metrics checkpoint_file checkpoint datasets loaders run shards start_block state "
        "train_log views",
        "vit compile measure evaluation report decoder_attention board",
    )
]
MAIN = len(UTIL_LAYERS) + 2  # and tools
ABOVE_MODELS = {"build"}  # of util: makes models from flags, for the scripts and the tools
# Parts of util that models are made of: as strict as models_*.
MODEL_PARTS = {"vit", "blocks", "masking", "patches", "pos_embed", "recompute", "errors"}
NOT_FOR_MODELS = {"argparse", "os", "sys", "pathlib", "subprocess", "torch.distributed"}


def modules() -> dict[str, ast.Module]:
    """Every module of the project, {name: syntax tree}, for example "util.masking"."""
    paths = {path.stem: path for path in ROOT.glob("*.py")}
    paths |= {f"util.{path.stem}": path for path in (ROOT / "util").glob("*.py")}
    paths.pop("util.__init__", None)
    return {name: ast.parse(path.read_text(), str(path)) for name, path in sorted(paths.items())}


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


def is_tool(tree: ast.Module) -> bool:
    """Does the module have an `if __name__ == "__main__"`?"""
    return any(
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        for node in tree.body
    )


MODULES = modules()
IMPORTS = {name: imported(tree) for name, tree in MODULES.items()}
OWN_IMPORTS = {name: (names & MODULES.keys()) - {name} for name, names in IMPORTS.items()}


def level(name: str) -> int:
    """Height of a module: an import must lead to a lower one, or to one of the same util layer."""
    if name.startswith("util."):
        short = name.removeprefix("util.")
        for height, layer in enumerate(UTIL_LAYERS):
            if short in layer:
                return height
        if short in ABOVE_MODELS:
            return len(UTIL_LAYERS) + 1
        assert is_tool(MODULES[name]), f"{name}: give it a layer in UTIL_LAYERS"
        return MAIN
    kind = name.split("_")[0]
    assert kind in ("models", "engine", "main"), f"{name}: not a name the layout knows"
    return {"models": len(UTIL_LAYERS), "engine": len(UTIL_LAYERS), "main": MAIN}[kind]


def is_main(name: str) -> bool:
    return level(name) == MAIN


def test_the_modules_were_found():
    assert {"main_pretrain", "models_cross", "engine_finetune", "util.blocks"} <= MODULES.keys()


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downwards(name):
    for other in OWN_IMPORTS[name]:
        same_layer = level(other) == level(name) < len(UTIL_LAYERS)
        allowed = level(other) < level(name) or same_layer
        assert allowed, f"{name} imports {other}, which stands above or beside it"


def test_no_circles():
    order = list(TopologicalSorter(OWN_IMPORTS).static_order())  # raises CycleError naming a circle
    assert set(order) == set(OWN_IMPORTS)


def test_mains_and_tools_are_imported_by_nothing():
    for name, others in OWN_IMPORTS.items():
        assert not [other for other in others if is_main(other)], name


def test_engines_know_no_model():
    for name in MODULES:
        if name.startswith("engine_"):
            known = {other for other in OWN_IMPORTS[name] if other.startswith("models_")}
            assert not known | (OWN_IMPORTS[name] & {"util.vit", "util.blocks"}), name


@pytest.mark.parametrize(
    "name",
    [name for name in MODULES if name.startswith("models_")]
    + [f"util.{part}" for part in sorted(MODEL_PARTS) if f"util.{part}" in MODULES],
)
def test_models_know_no_flags_files_or_processes(name):
    assert not IMPORTS[name] & NOT_FOR_MODELS
    assert OWN_IMPORTS[name] <= {f"util.{part}" for part in MODEL_PARTS | {"attention"}}


def test_only_attention_knows_flash_attn():
    for name, names in IMPORTS.items():
        if name != "util.attention":
            assert not [other for other in names if other.split(".")[0].startswith("flash_attn")]


def test_nothing_of_the_project_imports_the_tests():
    for name, names in IMPORTS.items():
        assert not [other for other in names if other.split(".")[0] in ("tests", "pytest")], name
