"""docs/api.md and docs/crossmae.ipynb: every block and every cell runs."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch
from processes import small_images

from models_cross import mae_vit_mini_patch4
from util.build import load_trained

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/api.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
LEFT_OUT = re.findall(r"^```python (no-test: .*)\n", PAGE, re.MULTILINE)


def test_blocks_of_the_page_run(image_folder, tmp_path, monkeypatch, caplog):
    """One after the other, in a folder with a checkpoint and two images."""
    assert len(BLOCKS) == 7 and LEFT_OUT == ["no-test: it downloads a published checkpoint"]
    monkeypatch.chdir(tmp_path)
    options = dict(weight_fm=True, use_input=True, decoder_depth=2)
    model = mae_vit_mini_patch4(img_size=32, **options)
    args = dict(model="mae_vit_mini_patch4", cross_mae=True, input_size=32, **options)
    Path("output/pretrain").mkdir(parents=True)
    torch.save({"model": model.state_dict(), "args": args}, "output/pretrain/checkpoint.pth")
    for name, image in (("a.jpg", "train/a/0.jpg"), ("b.jpg", "val/b/2.jpg")):
        os.symlink(image_folder / image, name)
    monkeypatch.setattr(sys, "path", list(sys.path))
    space = {}
    for block in BLOCKS:
        code = block.replace("path/to/crossmae", str(ROOT))
        exec(compile(code, "docs/api.md", "exec"), space)
    assert space["pixels"].shape == (2, 3, 32, 32) and Path("reconstructions.png").stat().st_size
    assert space["features"].mean.shape == (2, 128)
    assert space["stats"]["loss"] > 0 and space["loss"].isfinite()
    again, _ = load_trained("own.pth")
    assert again.kind == "crossmae"


def test_short_fine_tuning():
    """20 lines, as the page promises for what is done by hand."""
    block = BLOCKS[-1]
    assert "cross_entropy" in block and len(block.splitlines()) <= 20


def test_names_of_published_weights_are_on_the_page():
    from util.io.published import FILES

    for name in FILES:
        assert f"`{name}`" in PAGE


def test_notebook_runs(tmp_path):
    """All its cells, with one epoch of pre-training on 34 images instead of the digits."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(ROOT / "docs/crossmae.ipynb", as_version=4)
    settings = next(cell for cell in notebook.cells if "epochs = " in cell.source)
    assert 'output = repository / "output" / "notebook"' in settings.source
    settings.source += f"\nepochs, output = 1, Path({str(tmp_path)!r})"
    settings.source += f"\nimages = {str(small_images())!r}"
    place = {"metadata": {"path": str(ROOT / "docs")}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    *_, last = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert re.search(r"linear probe: \d+\.\d % with pre-training", last.outputs[0].text)
    figures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(figures) == 2
