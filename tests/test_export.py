"""tools/export.py: other software computes the same from the exported files as the models do."""

import json
import logging
from argparse import Namespace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import CLASSES, MEAN, STD
from PIL import Image
from processes import run_python
from safetensors import safe_open
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config

import models_vit
from tools import export
from tools.formats.timm_model import timm_name_and_args
from util.build import load_trained
from util.data.transforms import build_transform

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("cross", "mae", "vit_mean", "vit_cls", "vit_nonsquare", "vit_gray")
needs_onnx = pytest.mark.skipif(
    not all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="the optional packages onnx, onnxscript and onnxruntime are not installed",
)


def call(checkpoint: Path, to: str, out: Path, *more: str) -> None:
    flags = ["--checkpoint", str(checkpoint), "--to", to, "--out", str(out), *more]
    export.main(export.get_args_parser().parse_args(flags))


def noise(model, count: int = 3) -> torch.Tensor:
    size = model.patch_embed.proj.in_channels, *model.patch_embed.img_size
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(7))


def create_from(config: dict, **changes):
    """The timm model of a config.json."""
    options = {"num_classes": config["num_classes"]} | config["model_args"] | changes
    return timm.create_model(config["architecture"], **options)


@pytest.mark.parametrize("kind", KINDS)
def test_timm_model_gives_the_same_outputs(kind, save, tmp_path):
    """From the folder alone: create_model with its arguments, strict load, compare."""
    file, model = save(kind)
    call(file, "timm", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    timm_model = create_from(config).eval()
    timm_model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    assert type(timm_model) is timm.models.VisionTransformer
    imgs = noise(model)
    with torch.no_grad():
        features = model.forward_features(imgs)
        tokens = torch.cat([features.cls[:, None], features.patches], dim=1)
        torch.testing.assert_close(timm_model.forward_features(imgs), tokens, rtol=0, atol=1e-5)
        expected = model(imgs) if kind.startswith("vit") else features.cls
        torch.testing.assert_close(timm_model(imgs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["cross", "mae"])
def test_timm_encoder_pools_the_mean_when_asked(kind, save, tmp_path):
    file, model = save(kind)
    call(file, "timm", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    timm_model = create_from(config, global_pool="avg").eval()
    timm_model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=True)
    imgs = noise(model)
    with torch.no_grad():
        expected = model.forward_features(imgs).mean
        torch.testing.assert_close(timm_model(imgs), expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(
    not hasattr(timm.models._hub, "load_model_config_from_path"),
    reason=f"timm {timm.__version__} cannot open a folder by name (local-dir:)",
)
@pytest.mark.parametrize("kind", KINDS)
def test_timm_opens_the_folder(kind, save, tmp_path):
    file, model = save(kind)
    call(file, "timm", tmp_path / "out")
    timm_model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    imgs = noise(model)
    with torch.no_grad():
        expected = model(imgs) if kind.startswith("vit") else model.forward_features(imgs).cls
        torch.testing.assert_close(timm_model(imgs), expected, rtol=0, atol=1e-5)
    if kind.startswith("vit"):
        assert list(timm_model.pretrained_cfg["label_names"]) == CLASSES


@pytest.mark.parametrize("kind", ["vit_mean", "vit_nonsquare"])
def test_timm_preprocesses_images_as_evaluation_does(kind, save, tmp_path):
    """The transform that timm builds from config.json, on images of several shapes."""
    file, _ = save(kind)
    call(file, "timm", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
    assert config["mean"] == MEAN and config["std"] == STD and config["crop_pct"] == 0.875
    assert not {"license", "tag", "hf_hub_id", "url"} & config.keys()  # of other weights
    timm_transform = create_transform(**resolve_data_config(pretrained_cfg=config))
    if "bicubic" not in repr(timm_transform.transforms[0]):
        pytest.skip(f"timm {timm.__version__} resizes non-square images differently")
    transform = build_transform(False, load_trained(file)[1])
    random = np.random.RandomState(0)
    for height, width in ((50, 70), (90, 41), (36, 36), (40, 200)):
        coarse = Image.fromarray(random.randint(0, 256, (5, 5, 3), dtype=np.uint8))
        img = coarse.resize((width, height), Image.Resampling.BICUBIC)
        torch.testing.assert_close(timm_transform(img), transform(img), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "size, crop", [(224, 0.875), (96, 0.875), (448, 1.0), ((128, 224), 0.875), ((256, 448), 1.0)]
)
def test_crop_ratio(size, crop):
    assert export.crop_ratio(Namespace(input_size=size)) == crop


def test_crop_that_timm_cannot_express_is_warned_about(caplog):
    export.crop_ratio(Namespace(input_size=(128, 256)))
    assert "crops only the side of up to 224" in caplog.text


@pytest.mark.parametrize("size, patch", [("small", 16), ("base", 16), ("large", 16), ("huge", 14)])
def test_published_sizes_are_timm_models(size, patch, monkeypatch):
    """By name, with only head and pooling to set; every key and shape matches."""
    # Older timm reads values of this tensor in the constructor, so it must not be meta.
    monkeypatch.setattr(torch, "linspace", partial(torch.linspace, device="cpu"))
    with torch.device("meta"):
        model = getattr(models_vit, f"vit_{size}_patch{patch}")(global_pool=True)
        name, options = timm_name_and_args(model)
        timm_model = timm.create_model(name, **options)
    assert name == f"vit_{size}_patch{patch}_224"
    assert options == {"num_classes": 1000, "global_pool": "avg"}
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in timm_model.state_dict().items()} == shapes


def test_timm_does_not_write_into_a_full_folder(save, tmp_path):
    file, _ = save("vit_mean")
    with pytest.raises(ValueError, match="not an empty folder"):
        call(file, "timm", tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_safetensors_describe_the_model(kind, save, tmp_path):
    """The file alone rebuilds the model; it contains no paths of the user."""
    file, model = save(kind)
    call(file, "safetensors", tmp_path / "out" / "m.safetensors")
    with safe_open(tmp_path / "out" / "m.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert "secret" not in str(metadata)
    nonsquare = kind == "vit_nonsquare"
    assert json.loads(metadata["input_size"]) == ([32, 64] if nonsquare else [32, 32])
    assert json.loads(metadata["class_names"]) == CLASSES
    assert json.loads(metadata["patch_size"]) == 8
    if kind == "vit_mean":
        assert json.loads(metadata["mean"]) == MEAN and json.loads(metadata["std"]) == STD
        assert metadata["model"] == "vit_tiny" and metadata["kind"] == "fine-tuned"
    flags = json.loads(metadata["args"])
    again, _ = load_trained(tmp_path / "out" / "m.safetensors", **flags)
    assert all(value.equal(again.state_dict()[key]) for key, value in model.state_dict().items())
    assert again.state_dict().keys() == model.state_dict().keys()


@needs_onnx
@pytest.mark.parametrize(
    "kind, more, names",
    [
        ("vit_nonsquare", [], ["logits"]),
        ("cross", [], ["cls", "mean", "patches"]),
        # Slow to trace, and the second case covers the wrapper.
        pytest.param("vit_cls", ["--features"], ["cls", "mean", "patches"], marks=pytest.mark.slow),
    ],
)
def test_onnxruntime_gives_the_same_outputs(kind, more, names, save, tmp_path, caplog):
    """For any batch size, in one file."""
    import onnxruntime

    caplog.set_level(logging.INFO)
    file, model = save(kind)
    call(file, "onnx", tmp_path / "out" / "m.onnx", *more)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["m.onnx"]
    assert "Outputs of onnxruntime" in caplog.text
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "m.onnx"))
    assert [value.name for value in session.get_outputs()] == names
    (imgs_in,) = session.get_inputs()
    assert imgs_in.shape == ["batch", 3, *model.patch_embed.img_size]
    assert {value.shape[0] for value in session.get_outputs()} == {"batch"}
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"]) == CLASSES and "secret" not in str(metadata)
    for count in (1, 5):
        imgs = noise(model, count)
        outputs = session.run(None, {"imgs": imgs.numpy()})
        with torch.no_grad():
            features = model.forward_features(imgs)
            expected = [
                model(imgs) if name == "logits" else getattr(features, name) for name in names
            ]
        for output, right in zip(outputs, expected, strict=True):
            np.testing.assert_allclose(output, right.numpy(), rtol=1e-4, atol=1e-4)


def test_missing_packages_are_listed(save, tmp_path, monkeypatch):
    file, _ = save("vit_mean")
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs onnx and onnxscript: pip install onnx onnxscript"):
        call(file, "onnx", tmp_path / "m.onnx")


def test_a_flag_without_effect_is_refused(save, tmp_path):
    file, _ = save("vit_mean")
    with pytest.raises(ValueError, match="--features belongs to --to onnx or"):
        call(file, "timm", tmp_path / "out", "--features")


def test_linear_probe_becomes_a_linear_head(tiny_vit):
    model = tiny_vit()
    model.freeze_for_probe()
    random = torch.Generator().manual_seed(2)
    model.head[0].running_mean.copy_(torch.randn(32, generator=random))
    model.head[0].running_var.copy_(torch.rand(32, generator=random) + 0.1)
    imgs = noise(model.eval())
    with torch.no_grad():
        before = model(imgs)
        export.fold_probe(model)
        torch.testing.assert_close(model(imgs), before, rtol=0, atol=1e-5)
    assert {"head.weight", "head.bias"} < model.state_dict().keys()


def test_different_outputs_are_refused():
    with pytest.raises(RuntimeError, match="Outputs of timm differ from the model's by 1.00e-04"):
        export.check_close(torch.tensor([1.0001]), torch.tensor([1.0]), 1e-5, "timm")
    with pytest.raises(RuntimeError, match="differ"):
        export.check_close(torch.tensor([torch.nan]), torch.tensor([1.0]), 1e-5, "timm")


def test_command_line(tmp_path):
    """As a user runs it, for the model of the small recipes."""
    torch.manual_seed(0)
    model = models_vit.vit_mini_patch4(img_size=32, patch_size=16, num_classes=3, global_pool=True)
    args = dict(model="vit_mini_patch4", input_size=32, patch_size=16)
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "c.pth")
    command = ["-m", "tools.export", "--checkpoint", str(tmp_path / "c.pth")]
    command += ["--to", "timm", "--out", str(tmp_path / "out")]
    result = run_python(*command)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert "Outputs of timm equal the model's" in result.stdout
    assert 'timm.create_model("vit_base_patch16_224", img_size=(32, 32)' in result.stdout
