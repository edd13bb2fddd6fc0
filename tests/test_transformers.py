"""tools.export for Hugging Face transformers: its own loaders compute the same as the models do."""

import logging
import sys
from functools import partial

import pytest
import timm
import torch
from conftest import CLASSES, ENCODER, STD
from PIL import Image
from safetensors.torch import load_file
from test_export import KINDS, call, noise

import models_vit
from tools.formats.checks import label_names
from util.build import load_trained
from util.data.transforms import build_transform
from util.io.transformers_names import from_transformers, to_transformers

transformers = pytest.importorskip("transformers")

NATIVE = [  # checkpoint, further flags, class, how a user loads it
    ("vit_mean", [], "BeitForImageClassification", "AutoModelForImageClassification"),
    ("vit_gray", [], "BeitForImageClassification", "AutoModelForImageClassification"),
    ("vit_cls", [], "ViTForImageClassification", "AutoModelForImageClassification"),
    ("mae", [], "ViTMAEForPreTraining", "AutoModelForPreTraining"),
    ("mae", ["--features"], "ViTModel", "AutoModel"),
    ("vit_cls", ["--features"], "ViTModel", "AutoModel"),
    ("vit_mean", ["--features"], "BeitModel", "AutoModel"),
    ("cross", [], "BeitModel", "AutoModel"),
]
NAMES_ON_THE_HUB = {  # as in facebook/vit-mae-base, google/vit-base-patch16-224, microsoft/beit-*
    "mae": [
        "vit.embeddings.cls_token",
        "vit.encoder.layer.1.attention.attention.query.weight",
        "vit.encoder.layer.1.attention.output.dense.bias",
        "vit.layernorm.weight",
        "decoder.mask_token",
        "decoder.decoder_layers.1.attention.attention.key.bias",
        "decoder.decoder_layers.1.intermediate.dense.weight",
        "decoder.decoder_pred.weight",
    ],
    "vit_cls": [
        "vit.embeddings.position_embeddings",
        "vit.embeddings.patch_embeddings.projection.weight",
        "vit.encoder.layer.0.layernorm_before.weight",
        "classifier.bias",
    ],
    "vit_mean": [
        "beit.encoder.layer.0.layernorm_after.bias",
        "beit.encoder.layer.0.output.dense.weight",
        "beit.pooler.layernorm.weight",
    ],
}


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def tokens_of(model, imgs):
    features = model.forward_features(imgs)
    return torch.cat([features.cls[:, None], features.patches], dim=1)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_timm_folder_opens(kind, save, tmp_path):
    """AutoModel..., AutoImageProcessor and the pipeline, with our class names."""
    file, model = save(kind)
    out = tmp_path / "out"
    call(file, "timm", out)
    imgs = noise(model)
    encoder = transformers.AutoModel.from_pretrained(str(out)).eval()
    close(encoder(pixel_values=imgs).last_hidden_state, tokens_of(model, imgs))
    if not kind.startswith("vit"):
        return
    classifier = transformers.AutoModelForImageClassification.from_pretrained(str(out)).eval()
    close(classifier(pixel_values=imgs).logits, model(imgs))
    assert list(classifier.config.id2label.values()) == CLASSES
    if kind != "vit_gray":
        img = Image.effect_noise((70, 50), 60).convert("RGB")
        processor = transformers.AutoImageProcessor.from_pretrained(str(out))
        if "bicubic" not in repr(processor.val_transforms.transforms[0]):
            pytest.skip(f"timm {timm.__version__} resizes non-square images differently")
        found = processor(img, return_tensors="pt")["pixel_values"][0]
        close(found, build_transform(False, load_trained(file)[1])(img))
        predictions = transformers.pipeline("image-classification", model=str(out))(img, top_k=5)
        assert {entry["label"] for entry in predictions} == set(CLASSES)


@pytest.mark.parametrize("to", ["timm", "transformers"])
def test_1000_unnamed_classes_get_neutral_names(to, tiny_vit, tmp_path, monkeypatch):
    """Not ImageNet's, which transformers assumes."""
    factory = partial(models_vit.VisionTransformer, **ENCODER)
    monkeypatch.setattr(models_vit, "vit_tiny", factory, raising=False)
    args = dict(model="vit_tiny", input_size=32, patch_size=8)
    entries = {"model": tiny_vit(num_classes=1000).state_dict(), "args": args}
    torch.save(entries, tmp_path / "c.pth")
    call(tmp_path / "c.pth", to, tmp_path / "out")
    model = transformers.AutoModelForImageClassification.from_pretrained(str(tmp_path / "out"))
    assert model.config.id2label[0] == "class 0" and model.config.id2label[999] == "class 999"
    assert label_names(load_trained(tmp_path / "c.pth")[1])[7] == "class 7"


@pytest.mark.parametrize("kind, more, name, auto", NATIVE)
@torch.no_grad()
def test_native_model_computes_the_same(kind, more, name, auto, save, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    file, model = save(kind)
    out = tmp_path / "out"
    call(file, "transformers", out, *more)
    assert f"Outputs of transformers' {name} equal the model's: largest difference" in caplog.text
    options = {"add_pooling_layer": False} if name == "ViTModel" else {}
    native, info = getattr(transformers, auto).from_pretrained(
        str(out), output_loading_info=True, **options
    )
    assert type(native.eval()).__name__ == name and f"transformers.{name}" in caplog.text
    assert not info["missing_keys"] and not info["unexpected_keys"]
    imgs = noise(model)
    if name.endswith("ForImageClassification"):
        close(native(imgs).logits, model(imgs))
        assert list(native.config.id2label.values()) == CLASSES
        assert native.config.label2id["cat"] == 2
    elif name == "ViTMAEForPreTraining":
        random = torch.rand(3, 16, generator=torch.Generator().manual_seed(3))
        loss, pred, *_ = model(imgs, 0.75, vis=True, noise=random)
        found = native(imgs, noise=random)
        close(found.loss, loss)
        close(found.logits, pred)
    else:
        close(native(imgs).last_hidden_state, tokens_of(model, imgs))
    if kind == "vit_mean" and name == "BeitModel":  # its pooler holds the norm before the head
        close(native(imgs).pooler_output, model.fc_norm(model.forward_features(imgs).mean))
    assert (out / "preprocessor_config.json").exists() == (kind != "vit_gray")


@pytest.mark.parametrize("kind", ["cross", "vit_mean"])
@torch.no_grad()
def test_backbone_gives_the_feature_maps(kind, save, tmp_path):
    """For UperNet and the like: BeitBackbone from the same folder, a map of each chosen block."""
    file, model = save(kind)
    call(file, "transformers", tmp_path / "out", "--features")
    folder = str(tmp_path / "out")
    backbone = transformers.BeitBackbone.from_pretrained(folder).eval()
    imgs = noise(model)
    maps = backbone(imgs).feature_maps
    x, blocks = model.embed(imgs), []
    for block in model.blocks:
        x = block(x)
        blocks.append(x)
    assert backbone.out_indices == [1, 2] and len(maps) == len(blocks) == 2
    for found, tokens in zip(maps, blocks, strict=True):
        close(found, tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4)))


@torch.no_grad()
def test_backbone_feeds_upernet(save, tmp_path):
    file, _ = save("cross")
    call(file, "transformers", tmp_path / "out")
    folder = str(tmp_path / "out")
    config = transformers.UperNetConfig(
        backbone_config=transformers.AutoConfig.from_pretrained(folder),
        hidden_size=16,
        pool_scales=[1, 2],
        num_labels=3,
        use_auxiliary_head=False,
    )
    model = transformers.UperNetForSemanticSegmentation(config).eval()
    model.backbone = transformers.BeitBackbone.from_pretrained(folder)
    assert model(torch.randn(1, 3, 32, 32)).logits.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("size", [224, 128, 320])
@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_processor_prepares_a_photo_as_evaluation_does(name, size, tiny_vit, tmp_path, monkeypatch):
    """Exact with backend="pil"; the default backend rounds differently, by one gray level."""
    datasets = pytest.importorskip("sklearn.datasets")
    photo = Image.fromarray(datasets.load_sample_image(name)).crop((0, 0, 600, 420))
    factory = partial(models_vit.VisionTransformer, **ENCODER)
    monkeypatch.setattr(models_vit, "vit_tiny", factory, raising=False)
    args = dict(model="vit_tiny", input_size=size, patch_size=8, std=STD)
    entries = {"model": tiny_vit(img_size=size).state_dict(), "args": args}
    torch.save(entries, tmp_path / "c.pth")
    call(tmp_path / "c.pth", "transformers", tmp_path / "out")
    expected = build_transform(False, load_trained(tmp_path / "c.pth")[1])(photo)
    for backend, tolerance in (("pil", 1e-6), ("torchvision", 1.01 / 255 / min(STD))):
        processor = transformers.AutoImageProcessor.from_pretrained(
            str(tmp_path / "out"), backend=backend
        )
        found = processor(photo, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_crop_that_transformers_shifts_is_warned_about(tiny_vit, tmp_path, monkeypatch, caplog):
    """91 - 80 = 11: half of it is rounded to the even 6 by torchvision, to 5 by transformers."""
    factory = partial(models_vit.VisionTransformer, **ENCODER)
    monkeypatch.setattr(models_vit, "vit_tiny", factory, raising=False)
    args = dict(model="vit_tiny", input_size=80, patch_size=8)
    torch.save({"model": tiny_vit(img_size=80).state_dict(), "args": args}, tmp_path / "c.pth")
    call(tmp_path / "c.pth", "transformers", tmp_path / "out")
    assert "crops one pixel beside the evaluation" in caplog.text


def test_nonsquare_images_are_refused(save, tmp_path):
    file, _ = save("vit_nonsquare")
    with pytest.raises(ValueError, match="this one takes 32x64; use --to timm"):
        call(file, "transformers", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_transformers_does_not_write_into_a_full_folder(save, tmp_path):
    file, _ = save("vit_mean")
    with pytest.raises(ValueError, match="not an empty folder"):
        call(file, "transformers", tmp_path)


def test_missing_package_is_named(save, tmp_path, monkeypatch):
    file, _ = save("vit_mean")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install transformers"):
        call(file, "transformers", tmp_path / "out")


def test_different_outputs_are_not_written(save, tmp_path, monkeypatch):
    """A mapping that is wrong shows before anything is written."""
    from tools.formats import transformers_model

    def swapped(weights, prefix):
        weights = to_transformers(weights, prefix)
        q, k = (f"{prefix}encoder.layer.0.attention.attention.{x}.weight" for x in ("query", "key"))
        return weights | {q: weights[k], k: weights[q] + 1}

    file, _ = save("vit_mean")
    monkeypatch.setattr(transformers_model, "to_transformers", swapped)
    with pytest.raises(RuntimeError, match="differ from the model's"):
        call(file, "transformers", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind, expected", NAMES_ON_THE_HUB.items())
def test_file_has_the_names_of_the_hub(kind, expected, save, tmp_path):
    """As in google/vit-base-patch16-224 and facebook/vit-mae-base, whatever the version saves."""
    file, model = save(kind)
    call(file, "transformers", tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert set(expected) <= weights.keys()
    again = from_transformers(weights, "folder")
    for name, value in model.state_dict().items():
        if kind != "vit_mean" or not name.endswith("qkv.bias"):  # BEiT has no key bias
            assert value.equal(again[name]), name
