"""hubconf.py through torch.hub, and scripts and tools run by their path, from another folder."""

import hashlib
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import hubconf
from models_cross import mae_vit_mini_patch4, mae_vit_small_patch16
from models_mae import mae_vit_mini_patch4 as plain_mae_mini
from models_vit import vit_mini_patch4
from util.io.errors import CheckpointError, UserError
from util.io.published import FILES, published_url

ROOT = Path(__file__).resolve().parent.parent
SIZES = dict(img_size=32)
CROSS = dict(weight_fm=True, use_input=True, decoder_depth=2)
IMGS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def load(name: str, **options):
    return torch.hub.load(str(ROOT), name, source="local", **options)


def save(path: Path, module, **args) -> Path:
    args = dict(model="mae_vit_mini_patch4", input_size=32) | args
    torch.save({"model": module.state_dict(), "args": args}, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Namespace:
    """Checkpoints of a small CrossMAE, MAE and classifier, and the models they hold."""
    folder = tmp_path_factory.mktemp("checkpoints")
    cross = mae_vit_mini_patch4(**SIZES, **CROSS).eval()
    mae = plain_mae_mini(**SIZES, decoder_depth=2).eval()
    vit = vit_mini_patch4(**SIZES, global_pool=True, num_classes=5).eval()
    return Namespace(
        cross=cross,
        mae=mae,
        vit=vit,
        cross_file=save(folder / "cross.pth", cross, cross_mae=True, **CROSS),
        mae_file=save(folder / "mae.pth", mae, decoder_depth=2),
        vit_file=save(folder / "vit.pth", vit, model="vit_mini_patch4"),
    )


def test_readme_links_are_those_of_the_table():
    links = re.findall(r"https://huggingface\.co/\S+?\.pth", (ROOT / "README.md").read_text())
    urls = [published_url(name, tuned) for name in FILES for tuned in (False, True)]
    assert len(links) == 12 and sorted(links) == sorted(urls)


IN_ANOTHER_FOLDER = """
import sys, torch
root, file = sys.argv[1:]
assert root not in sys.path
hub = lambda name, **options: torch.hub.load(root, name, source="local", **options)
imgs = torch.rand(2, 3, 32, 32)
model = hub("crossmae_vit_mini_patch4", checkpoint=file)
assert model(imgs).ndim == 0 and not model.training
features = hub("vit_mini_patch4_encoder", checkpoint=file)(imgs)
torch.testing.assert_close(features.mean, model.forward_features(imgs).mean, rtol=0, atol=0)
assert hub("vit_small_patch16", num_classes=7)(torch.rand(1, 3, 224, 224)).shape == (1, 7)
small = hub("crossmae_vit_small_patch16", weights="vits-kmr0.75")  # found in torch.hub's folder
assert len(small.decoder_blocks) == 12 and small.cls_token.max() == small.cls_token.min() == 0.25
print("fine")
"""


def test_from_another_folder(files, tmp_path):
    """In a process that knows nothing of the repository; the published file is a stand-in."""
    model = mae_vit_small_patch16(decoder_depth=12, weight_fm=True, use_input=True)
    torch.nn.init.constant_(model.cls_token, 0.25)
    url = published_url("vits-kmr0.75")
    key = hashlib.sha256(url.encode()).hexdigest()[:12]
    cached = tmp_path / "hub" / "checkpoints" / f"{key}-{url.rpartition('/')[2]}"
    cached.parent.mkdir(parents=True)
    options = dict(cross_mae=True, weight_fm=True, use_input=True, decoder_depth=12)
    save(cached, model, model="mae_vit_small_patch16", input_size=224, **options)
    done = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_FOLDER, str(ROOT), str(files.cross_file)],
        cwd=tmp_path,
        env={"TORCH_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("fine\n"), done.stderr


def test_entries():
    """What torch.hub.list shows: models alone, each with a text."""
    entries = {n: f for n, f in vars(hubconf).items() if callable(f) and not n.startswith("_")}
    assert len(entries) == 20
    for name, entry in entries.items():
        assert entry.__name__ == name and "short name" in entry.__doc__


@pytest.mark.parametrize("kind", ["cross", "mae"])
def test_pretraining_models_have_the_weights_of_the_file(kind, files):
    name = {"cross": "crossmae_vit_mini_patch4", "mae": "mae_vit_mini_patch4"}[kind]
    model = load(name, checkpoint=getattr(files, f"{kind}_file"))
    noise = torch.rand(2, 64)
    assert torch.equal(model(IMGS, noise=noise), getattr(files, kind)(IMGS, noise=noise))


def test_classifier_has_the_weights_of_the_file(files):
    assert torch.equal(load("vit_mini_patch4", checkpoint=files.vit_file)(IMGS), files.vit(IMGS))
    options = dict(**SIZES, drop_path_rate=0.5)  # in evaluation mode without effect
    again = load("vit_mini_patch4", checkpoint=files.vit_file, **options)
    assert torch.equal(again(IMGS), files.vit(IMGS))


@pytest.mark.parametrize("kind", ["cross", "mae", "vit"])
def test_a_new_head_on_the_encoder_of_the_file(kind, files):
    file = getattr(files, f"{kind}_file")
    model = load("vit_mini_patch4", checkpoint=file, num_classes=7, **SIZES)
    assert model(IMGS).shape == (2, 7) and 0 < model.head.weight.abs().max() < 1e-3
    expected = getattr(files, kind)
    assert torch.equal(model.blocks[5].mlp.fc2.weight, expected.blocks[5].mlp.fc2.weight)


@pytest.mark.parametrize("kind", ["cross", "mae", "vit"])
def test_encoder_gives_the_features_of_the_model(kind, files):
    encoder = load("vit_mini_patch4_encoder", checkpoint=getattr(files, f"{kind}_file"))
    expected = getattr(files, kind).forward_features(IMGS)
    assert torch.equal(encoder(IMGS).cls, expected.cls)
    assert torch.equal(encoder(IMGS).patches, expected.patches)
    assert not [n for n in encoder.state_dict() if n.startswith(("decoder", "head", "mask"))]


def test_mistakes_are_named(files):
    with pytest.raises(UserError, match="did you mean vitb-kmr0.75..; choose one of vits"):
        load("crossmae_vit_base_patch16", weights="vitb-kmr0.7")
    with pytest.raises(UserError, match="give one"):
        load("vit_base_patch16", weights="vitb-kmr0.75", checkpoint="x.pth")
    with pytest.raises(CheckpointError, match="holds a mae model, .* not the crossmae of size"):
        load("crossmae_vit_mini_patch4", checkpoint=files.mae_file)
    with pytest.raises(CheckpointError, match="not the encoder of size vit_small_patch16"):
        load("vit_small_patch16_encoder", checkpoint=files.cross_file)
    with pytest.raises(UserError, match="decoder_depth: the checkpoint decides this"):
        load("mae_vit_mini_patch4", checkpoint=files.mae_file, decoder_depth=3)


def test_another_util_is_named(monkeypatch, tmp_path):
    other = type(sys)("util")
    other.__file__ = str(tmp_path / "util.py")
    monkeypatch.setitem(sys.modules, "util", other)
    with pytest.raises(ImportError, match=f"{tmp_path}/util.py is imported as util"):
        load("vit_mini_patch4")


BY_PATH = """
import gc, os, runpy, sys
from pathlib import Path
root = Path(sys.argv[1])
sys.path.insert(0, str(root))
import main_finetune, main_pretrain, tools.data_stats, tools.visualize  # packages: once for all
del sys.path[0]
own = {"util", "tools", *(path.stem for path in root.glob("*.py"))}
for name in [name for name in sys.modules if name.split(".")[0] in own]:
    del sys.modules[name]
gc.freeze()  # a collection would copy the memory of the forked process
gc.disable()
programs = [path for path in root.glob("tools/*.py") if "get_args_parser" in path.read_text()]
for path in sorted([*programs, *root.glob("main_*.py")]):
    if os.fork() == 0:
        sys.path[0], sys.argv = str(path.parent), [str(path), "--help"]
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as stop:
            print(path.name, flush=True)
            os._exit(stop.code)
    assert os.wait()[1] == 0, path
"""


def test_scripts_and_tools_run_by_their_path(tmp_path):
    """In a folder that has a util.py of its own."""
    (tmp_path / "util.py").write_text("raise RuntimeError('the wrong util')")
    command = [sys.executable, "-c", BY_PATH, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("main_pretrain.py", "visualize.py", "knn.py", "export.py", "demo_data.py"):
        assert name in done.stdout
