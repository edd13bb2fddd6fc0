"""util/eval/inference.py against timm, and images prepared without torchvision."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

from util.data.sources import list_images
from util.eval import inference as evaluation

ARGS = dict(input_size=32, in_chans=3, mean=[0.5, 0.4, 0.3], std=[0.2, 0.25, 0.3])
FLAGS = dict(batch_size=3, num_workers=0, device="cpu", amp="off")


def make_args(**changes) -> Namespace:
    args = Namespace(**(ARGS | changes))
    evaluation.set_inference_flags(args, Namespace(**FLAGS))
    return args


def prepared(path, mean=ARGS["mean"], std=ARGS["std"]) -> torch.Tensor:
    """An image by the recipe in Pillow and numpy: short side 36, middle 32 x 32, normalized."""
    with Image.open(path) as image:
        image = image.convert("RGB")
    width, height = image.size
    scale = 36 / min(width, height)
    image = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    left, top = round((image.width - 32) / 2), round((image.height - 32) / 2)
    pixels = np.asarray(image.crop((left, top, left + 32, top + 32))) / 255
    return torch.from_numpy((pixels - mean) / std).permute(2, 0, 1).float()


@pytest.mark.parametrize("flag", ["batch_size", "num_workers"])
def test_senseless_flags_are_refused(flag):
    with pytest.raises(ValueError, match=f"--{flag} is -1"):
        evaluation.set_inference_flags(Namespace(**ARGS), Namespace(**(FLAGS | {flag: -1})))


def test_transform_in_words():
    text = evaluation.describe_transform(make_args())
    assert "short side 36, center crop 32 x 32, mean 0.5 0.4 0.3, std 0.2 0.25 0.3" in text
    assert "cover 36 x 73, center crop 32 x 64" in evaluation.describe_transform(
        make_args(input_size=(32, 64))
    )


@pytest.mark.parametrize("which", evaluation.FEATURES)
def test_features_are_those_of_timm(image_folder, tiny_vit, which):
    """The same weights in timm's class, on images prepared without torchvision."""
    from timm.models.vision_transformer import VisionTransformer

    model = tiny_vit(global_pool=False)
    timm_model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5
    ).eval()
    timm_model.load_state_dict(model.state_dict())
    files = [path for path, _ in list_images(image_folder / "val").samples]
    loader = evaluation.build_inference_loader(
        [(file, i) for i, file in enumerate(files)], [], make_args()
    )
    parts = list(evaluation.run_features(model, loader, which, torch.device("cpu")))
    features, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    with torch.no_grad():
        tokens = timm_model.forward_features(torch.stack([prepared(file) for file in files]))
    expected = dict(cls=tokens[:, 0], patches=tokens[:, 1:], mean=tokens[:, 1:].mean(dim=1))
    # 8-bit rounding of the resize is the same; float32 normalization is not quite.
    torch.testing.assert_close(features, expected[which], rtol=1e-4, atol=1e-4)
    assert labels.tolist() == list(range(8))


def test_default_feature_is_what_the_head_reads(tiny_vit, tiny_cross):
    models = tiny_vit(global_pool=True), tiny_vit(global_pool=False), tiny_cross()
    assert [evaluation.default_feature(model) for model in models] == ["mean", "cls", "cls"]
