"""Transforms against stored images and timm's pipeline, and the folders they read."""

import random
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch
from parity_data import FOLDER, assert_match, find_case, read_json
from PIL import Image
from timm.data import create_transform
from torchvision import transforms

from util.data.transforms import (
    BICUBIC,
    PRETRAIN_CROP_SCALE,
    FastPretrainTransform,
    build_array_transform,
    build_pretrain_transform,
    build_transform,
    normalize,
)
from util.datasets import build_dataset, build_pretrain_dataset

CASE = find_case("augment", "augment")
BOUNDS = read_json("augment")["tolerance"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def settings(**changes) -> Namespace:
    """The fine-tuning recipe at 32 pixels."""
    recipe = dict(color_jitter=None, aa="rand-m9-mstd0.5-inc1", reprob=0.25, remode="pixel")
    images = dict(input_size=32, in_chans=3, mean=MEAN, std=STD, loader="pillow", seed=0)
    return Namespace(**(recipe | images | dict(recount=1) | changes))


def stored(name: str) -> torch.Tensor:
    """An image (H, W, C) or the output of a transform."""
    return torch.from_numpy(np.load(FOLDER / CASE["file"])[name])


def stored_image(name: str) -> Image.Image:
    return Image.fromarray(stored(name).numpy())


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@pytest.mark.parametrize("case", CASE["eval"], ids=lambda p: str(p["input_size"]))
def test_evaluation_transform(case):
    """Short side to size / 0.875 up to 224 pixels, to size above; center crop; normalized."""
    image = stored_image(f"image_{case['index']}")
    out = build_transform(False, settings(input_size=case["input_size"]))(image)
    assert out.dtype == torch.float32 and list(out.shape) == case["out_shape"]
    every = case["stored_every"]
    pixels, expected = out[:, ::every, ::every], stored(f"eval_{case['index']}")
    assert_match(pixels, expected, "pixels", BOUNDS["eval_abs"], 0)
    mean_bound = BOUNDS["eval_mean_abs"]
    assert_match((pixels - expected).abs().mean().item(), 0.0, "mean difference", mean_bound, 0)
    assert_match(out.mean().item(), case["out_mean"], "mean", mean_bound, 0)
    assert_match(out.std().item(), case["out_std"], "std", mean_bound, 0)


def test_pretraining_transform():
    """The same crops and flips as the public pipeline for the same torch seeds."""
    case = CASE["pretrain"]
    image = stored_image(case["image"])
    transform = build_pretrain_transform(settings(input_size=case["input_size"]))
    for seed, expected in zip(case["torch_seeds"], stored("pre_out"), strict=True):
        torch.manual_seed(seed)
        out = transform(image)
        assert_match(out, expected, "pixels", BOUNDS["eval_abs"], 0)
        assert (out - expected).abs().mean() <= BOUNDS["eval_mean_abs"]


def test_fast_pretraining_transform():
    """The fast pipeline draws the same random numbers; its pixels differ by rounding only."""
    case = CASE["pretrain"]
    pixels = stored(case["image"]).permute(2, 0, 1)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
    transform = FastPretrainTransform(case["input_size"])
    for seed, expected in zip(case["torch_seeds"], stored("pre_out"), strict=True):
        torch.manual_seed(seed)
        out = transform(pixels)
        assert out.dtype == torch.uint8
        difference = (normalize(out[None], mean, std)[0] - expected).abs()
        assert difference.max() <= 2 * BOUNDS["eval_abs"]
        assert difference.mean() <= 4 * BOUNDS["eval_mean_abs"]


@pytest.mark.parametrize("loader", ["fast", "pillow"])
def test_crop_scale(loader, image_folder):
    """Crops of exactly half the area, up to whole pixels; without the flag 20 to 100 %."""
    args = settings(data_path=str(image_folder), loader=loader, crop_scale=(0.5, 0.5))
    image = torch.zeros(3, 100, 100)
    for scale, low, high in (((0.5, 0.5), 0.49, 0.51), (PRETRAIN_CROP_SCALE, 0.2, 1.0)):
        args.crop_scale = scale
        transform = build_pretrain_dataset(args).transform
        crop = transform.crop if loader == "fast" else transform.transforms[0]
        areas = []
        for seed in range(40):
            torch.manual_seed(seed)
            _, _, height, width = crop.get_params(image, crop.scale, crop.ratio)
            areas.append(height * width / 10_000)
        assert low - 0.01 <= min(areas) <= max(areas) <= high
    assert max(areas) - min(areas) > 0.6


def test_augmentation_depends_on_seed_epoch_and_image_alone(image_folder):
    """Not on the order of access, and the global random states are unchanged."""
    args = settings(data_path=str(image_folder))
    for build in (build_pretrain_dataset, partial(build_dataset, True)):
        dataset = build(args)
        seed_everything(0)
        first = [dataset[epoch, index][0] for epoch in (0, 1) for index in (0, 1)]
        drawn = torch.rand(1), np.random.rand(), random.random()
        seed_everything(1)
        again = [dataset[epoch, index][0] for epoch in (0, 1) for index in (1, 0)]
        assert all(first[i].equal(again[j]) for i, j in enumerate((1, 0, 3, 2)))
        assert not first[0].equal(first[2])
        other_seed = build(Namespace(**(vars(args) | dict(seed=1))))
        assert not other_seed[0, 0][0].equal(first[0])
        seed_everything(0)
        assert drawn == (torch.rand(1), np.random.rand(), random.random())


@pytest.mark.parametrize(
    "changes",
    [dict(), dict(aa="", color_jitter=0.4), dict(reprob=1.0), dict(crop_scale=(0.5, 0.6))],
    ids=str,
)
def test_finetuning_transform_equals_timms(changes):
    """The recipe, color jitter instead of RandAugment, erasing with probability 1, other crops."""
    args = settings(**changes)
    transform = build_transform(True, args)
    reference = create_transform(
        input_size=32,
        is_training=True,
        scale=changes.get("crop_scale"),
        color_jitter=args.color_jitter,
        auto_augment=args.aa or None,
        interpolation="bicubic",
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        mean=MEAN,
        std=STD,
    )
    image = stored_image(CASE["pretrain"]["image"])
    for seed in range(8):
        outs = []
        for pipeline in (transform, reference):
            seed_everything(seed)
            outs.append(pipeline(image))
        assert outs[0].shape == (3, 32, 32) and outs[0].dtype == torch.float32
        assert outs[0].equal(outs[1])


def test_crop_scale_of_arrays():
    """torchvision's crop and flip with the same random numbers."""
    image = torch.rand(3, 50, 70)
    args = settings(aa="", reprob=0.0, crop_scale=(0.5, 0.6))
    crop = transforms.RandomResizedCrop(32, scale=(0.5, 0.6), interpolation=BICUBIC)
    steps = [crop, transforms.RandomHorizontalFlip(), transforms.Normalize(MEAN, STD)]
    outs = []
    for pipeline in (build_array_transform(args), transforms.Compose(steps)):
        seed_everything(0)
        outs.append(pipeline(image))
    assert outs[0].equal(outs[1])


def test_erasing_and_augmentation_can_be_off():
    """Without them values stay in the range of pixels; erasing adds noise beyond it."""
    image = stored_image(CASE["pretrain"]["image"])
    low = min(-m / s for m, s in zip(MEAN, STD, strict=True)) - 1e-5
    seed_everything(0)
    plain = build_transform(True, settings(aa="", reprob=0.0))
    assert all(plain(image).min() >= low for _ in range(10))
    erased = build_transform(True, settings(aa="", reprob=1.0, recount=3))
    assert any(erased(image).min() < low for _ in range(10))


def test_finetuning_dataset_reads_the_folders(image_folder):
    """train and val, class indices in alphabetical order."""
    for is_train, split in ((True, "train"), (False, "val")):
        dataset = build_dataset(is_train, settings(data_path=str(image_folder)))
        assert len(dataset) == 8
        assert dataset.classes == ["a", "b"]
        items = [dataset[0, index] for index in range(8)]
        assert [label for _, label in items] == [0, 0, 0, 0, 1, 1, 1, 1]
        assert all(imgs.shape == (3, 32, 32) and imgs.isfinite().all() for imgs, _ in items)
        assert all(f"/{split}/" in path for path, _ in dataset.samples)


def test_evaluation_images_are_transformed_from_the_files(image_folder):
    """The first validation image, written out with torchvision."""
    dataset = build_dataset(False, settings(data_path=str(image_folder)))
    by_hand = transforms.Compose(
        [
            transforms.Resize(36, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    with Image.open(image_folder / "val/a/0.jpg") as image:
        expected = by_hand(image.convert("RGB"))
    assert (dataset[0, 0][0] - expected).abs().max() <= BOUNDS["eval_abs"]


def test_evaluation_resizes_each_side_of_a_rectangle():
    """Up to 224 pixels by 1 / 0.875, longer sides not at all."""
    resize, crop = build_transform(False, settings(input_size=(224, 448))).transforms[:2]
    assert (resize.height, resize.width) == (256, 448) and tuple(crop.size) == (224, 448)
