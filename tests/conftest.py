"""Shared by all tests: the repository on sys.path, tiny models and a folder of pictures."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)  # tiny tensors: threads only wait for each other


def pytest_addoption(parser):
    parser.addoption(
        "--parity_table",
        metavar="FILE",
        help="write what was compared with tests/parity, and the worst differences, as JSON",
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


def factory_of(cls, **defaults):
    """A function that builds the class after torch.manual_seed(seed); its arguments override."""

    def build(seed: int = 0, **overrides):
        torch.manual_seed(seed)
        return cls(**(defaults | overrides))

    return build


@pytest.fixture
def tiny_cross():
    """Builds a tiny CrossMAE: 16 patches, encoder width 32, decoder width 16."""
    from models_cross import MaskedAutoencoderViT

    return factory_of(MaskedAutoencoderViT, **ENCODER, **DECODER, weight_fm=True, use_input=True)


@pytest.fixture
def tiny_mae():
    """Builds a tiny MAE of the same size."""
    from models_mae import MaskedAutoencoderViT

    return factory_of(MaskedAutoencoderViT, **ENCODER, **DECODER)


@pytest.fixture
def tiny_vit():
    """Builds a tiny classifier of the same size with 5 classes."""
    from models_vit import VisionTransformer

    return factory_of(VisionTransformer, **ENCODER, num_classes=5, global_pool=True)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """16 pictures, {train,val}/{a,b}/0-3: JPEG and PNG of different sizes, the same every time."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.RandomState(0)
    for split in ("train", "val"):
        for label in ("a", "b"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for index in range(4):
                height, width = random.randint(40, 80, size=2)
                coarse = Image.fromarray(random.randint(0, 256, (6, 6, 3), dtype=np.uint8))
                picture = coarse.resize((width, height), Image.Resampling.BICUBIC)
                picture.save(folder / f"{index}.{'png' if index % 2 else 'jpg'}")
    return root
