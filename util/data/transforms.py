"""From an opened image to the model's input: the pipelines of the recipes, and a fast one.

Shapes: B images, C channels, H height, W width of the image, h and w of the crop.
"""

import torch
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import functional as TF

from util.io.errors import UserError

PRETRAIN_CROP_SCALE = (0.2, 1.0)  # fractions of the area that are cropped, as published
FINETUNE_CROP_SCALE = (0.08, 1.0)
BICUBIC = T.InterpolationMode.BICUBIC
CROP_RATIO = 0.875  # center crop to resized short side, up to 224 pixels


def build_pretrain_transform(args):
    """Pipeline of the pre-training recipe, output of open_image -> normalized (C, H, W).

    Random crop of 20-100 % of the area (args.crop_scale) with an aspect ratio of 3/4 to 4/3,
    resized bicubically; random horizontal flip.
    """
    scale = getattr(args, "crop_scale", PRETRAIN_CROP_SCALE)
    crop = T.RandomResizedCrop(args.input_size, scale=scale, interpolation=BICUBIC)
    return T.Compose([crop, T.RandomHorizontalFlip(), to_float, T.Normalize(args.mean, args.std)])


def to_float(img) -> Tensor:
    """PIL -> float32 (C, H, W) in [0, 1]; tensors are returned unchanged."""
    return img if isinstance(img, Tensor) else TF.to_tensor(img)


def normalize(imgs: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 images (B, C, H, W) -> float32 in one kernel.

    mean and std (1, C, 1, 1) are those of images in [0, 1].
    """
    return torch.addcmul(-mean / std, imgs, 1 / (255 * std))


class FastPretrainTransform:
    """The same crops and flips on uint8 tensors, (C, H, W) -> uint8 (C, h, w), normalized later.

    Draws the same random numbers in the same order as the recipe's pipeline.
    """

    def __init__(self, input_size: int | tuple[int, int], scale=PRETRAIN_CROP_SCALE):
        self.crop = T.RandomResizedCrop(input_size, scale=scale)

    def __call__(self, img: Tensor) -> Tensor:
        top, left, height, width = self.crop.get_params(img, self.crop.scale, self.crop.ratio)
        img = img[:, top : top + height, left : left + width]
        img = F.interpolate(img[None], self.crop.size, mode="bicubic", antialias=True)[0]
        return img.flip(2) if torch.rand(1) < 0.5 else img


def build_transform(is_train: bool, args):
    """Pipeline of the fine-tuning recipe or of evaluation, PIL -> normalized (C, H, W)."""
    if is_train:
        transform = create_transform(
            args.input_size if isinstance(args.input_size, int) else (3, *args.input_size),
            is_training=True,
            scale=getattr(args, "crop_scale", FINETUNE_CROP_SCALE),
            color_jitter=args.color_jitter,
            auto_augment=args.aa or None,
            interpolation="bicubic",
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
            mean=args.mean,
            std=args.std,
        )
        for step in transform.transforms:
            for op in getattr(step, "ops", []):
                if op.name.startswith("Posterize"):
                    op.aug_fn = posterize
        return transform
    size = args.input_size
    if isinstance(size, int):
        short_side = int(size / CROP_RATIO) if size <= 224 else size
        resize = T.Resize(short_side, BICUBIC)
    else:
        resize = ResizeToCover(*(int(side / CROP_RATIO) if side <= 224 else side for side in size))
    return T.Compose([resize, T.CenterCrop(size), to_float, T.Normalize(args.mean, args.std)])


def build_array_transform(args):
    """Fine-tuning pipeline for arrays and 16-bit images, float (C, H, W) -> normalized: crop and
    flip of the recipe, random erasing; no color augmentation.

    Raises:
        UserError: --aa or --color_jitter is on.
    """
    if args.aa or args.color_jitter:
        raise UserError(
            "--aa and --color_jitter work on 8-bit images, the data are arrays or 16-bit images; "
            "leave them out (--aa '')."
        )
    scale = getattr(args, "crop_scale", FINETUNE_CROP_SCALE)
    crop = T.RandomResizedCrop(args.input_size, scale=scale, interpolation=BICUBIC)
    normalization = T.Normalize(args.mean, args.std)
    erasing = RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device="cpu")
    return T.Compose([crop, T.RandomHorizontalFlip(), to_float, normalization, erasing])


def posterize(img, bits: int, **_):
    """Keep the `bits` highest bits of every channel; with 0 bits, black.

    timm's version passes 0 bits to Pillow, where newer versions raise an error on a rare draw.
    """
    return ImageOps.posterize(img, bits) if bits else Image.new(img.mode, img.size)


class ResizeToCover:
    """Resize to the smallest size that covers height x width, keeping the aspect ratio."""

    def __init__(self, height: int, width: int):
        self.height, self.width = height, width

    def __call__(self, img):
        _, height, width = TF.get_dimensions(img)
        scale = max(self.height / height, self.width / width)
        size = [max(round(height * scale), self.height), max(round(width * scale), self.width)]
        return TF.resize(img, size, BICUBIC)
