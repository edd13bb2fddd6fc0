"""Shared by all tests: the repository on sys.path, tiny models and an image folder."""

import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# Tensors are too small to benefit from threads; processes that tests start inherit these.
torch.set_num_threads(1)
os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def pytest_addoption(parser):
    parser.addoption(
        "--parity_table",
        metavar="FILE",
        help="write the comparisons with tests/parity and their worst differences as JSON",
    )


def pytest_sessionfinish(session):
    if session.config.option.parity_table:
        from parity_data import write_table

        write_table(Path(session.config.option.parity_table))


ENCODER = dict(
    img_size=32,
    patch_size=8,
    embed_dim=32,
    depth=2,
    num_heads=4,
    norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
)
DECODER = dict(decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2)
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
CLASSES = ["ant", "bee", "cat", "dog", "elk"]


def seeded_factory(cls, **defaults):
    """Returns build(seed, **overrides), which seeds torch and constructs the class."""

    def build(seed: int = 0, **overrides):
        torch.manual_seed(seed)
        return cls(**(defaults | overrides))

    return build


@pytest.fixture
def tiny_cross():
    """Factory of a tiny CrossMAE: 16 patches, encoder width 32, decoder width 16."""
    from models_cross import MaskedAutoencoderViT

    options = dict(weight_fm=True, use_input=True)
    return seeded_factory(MaskedAutoencoderViT, **ENCODER, **DECODER, **options)


@pytest.fixture
def tiny_mae():
    """Factory of a tiny MAE of the same size."""
    from models_mae import MaskedAutoencoderViT

    return seeded_factory(MaskedAutoencoderViT, **ENCODER, **DECODER)


@pytest.fixture
def tiny_vit():
    """Factory of a tiny classifier of the same size with 5 classes."""
    from models_vit import VisionTransformer

    return seeded_factory(VisionTransformer, **ENCODER, num_classes=5, global_pool=True)


@pytest.fixture
def save(tmp_path, tiny_cross, tiny_mae, tiny_vit, monkeypatch):
    """kind -> (checkpoint file, model); tiny models, every weight random."""
    import models_cross
    import models_mae
    import models_vit

    for module, name, cls, sizes in (
        (models_cross, "mae_vit_tiny", models_cross.MaskedAutoencoderViT, ENCODER | DECODER),
        (models_mae, "mae_vit_tiny", models_mae.MaskedAutoencoderViT, ENCODER | DECODER),
        (models_vit, "vit_tiny", models_vit.VisionTransformer, ENCODER),
    ):
        monkeypatch.setattr(module, name, partial(cls, **sizes), raising=False)

    def write(kind: str):
        size, args = 32, dict(model="mae_vit_tiny", decoder_depth=2)
        if kind == "cross":
            model = tiny_cross()
            args |= dict(cross_mae=True, weight_fm=True, use_input=True)
        elif kind == "mae":
            model = tiny_mae()
        else:
            size = (32, 64) if kind == "vit_nonsquare" else 32
            chans = 1 if kind == "vit_gray" else 3
            model = tiny_vit(img_size=size, in_chans=chans, global_pool=kind != "vit_cls")
            args = dict(model="vit_tiny", in_chans=chans, mean=MEAN[:chans], std=STD[:chans])
        random = torch.Generator().manual_seed(1)
        for parameter in model.parameters():  # norms and biases too, so that a swap shows
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=random)
        args |= dict(input_size=size, patch_size=8, data_path="/home/someone/secret")
        path = tmp_path / f"{kind}.pth"
        entries = {"model": model.state_dict(), "args": args, "class_names": CLASSES}
        torch.save(entries, path)
        return path, model.eval()

    return write


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """16 images, {train,val}/{a,b}/0-3: JPEG and PNG of different sizes, with a fixed seed."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.RandomState(0)
    for split in ("train", "val"):
        for label in ("a", "b"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for index in range(4):
                height, width = rng.randint(40, 80, size=2)
                coarse = Image.fromarray(rng.randint(0, 256, (6, 6, 3), dtype=np.uint8))
                image = coarse.resize((width, height), Image.Resampling.BICUBIC)
                image.save(folder / f"{index}.{'png' if index % 2 else 'jpg'}")
    return root
