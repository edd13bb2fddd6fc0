"""What happens to a picture between its file and the model: the recipes' chains, and the fast one.

Letters: C channels, H height, W width of the picture, h and w of the crop.
"""

import torch
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from util.io.errors import UserError

CROP_SHARE = 0.875  # of the short side that evaluation keeps, up to 224 pixels


def build_pretrain_transform(args):
    """Recipe chain of pre-training, what open_image gives -> normalised (C, H, W): random crop
    and flip.

    The crop has 20-100 % of the area and a side ratio of 3/4 to 4/3, resized bicubically.
    """
    return T.Compose(
        [
            T.RandomResizedCrop(
                args.input_size, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC
            ),
            T.RandomHorizontalFlip(),
            to_float,
            T.Normalize(args.mean, args.std),
        ]
    )


def to_float(img) -> Tensor:
    """PIL -> float32 (C, H, W) in 0..1; a tensor stays as it is."""
    return img if isinstance(img, Tensor) else TF.to_tensor(img)


class FastPretrainTransform:
    """The same crops and flips on uint8 tensors, (C, H, W) -> uint8 (C, h, w), normalised later.

    Draws the same random numbers in the same order as the recipe chain.
    """

    def __init__(self, input_size: int | tuple[int, int]):
        self.crop = T.RandomResizedCrop(input_size, scale=(0.2, 1.0))

    def __call__(self, img: Tensor) -> Tensor:
        top, left, height, width = self.crop.get_params(img, self.crop.scale, self.crop.ratio)
        img = img[:, top : top + height, left : left + width]
        img = F.interpolate(img[None], self.crop.size, mode="bicubic", antialias=True)[0]
        return img.flip(2) if torch.rand(1) < 0.5 else img


def build_transform(is_train: bool, args):
    """Recipe chain of fine-tuning, PIL -> normalised (C, H, W)."""
    if is_train:
        transform = create_transform(
            args.input_size if isinstance(args.input_size, int) else (3, *args.input_size),
            is_training=True,
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
        short_side = int(size / CROP_SHARE) if size <= 224 else size
        resize = T.Resize(short_side, InterpolationMode.BICUBIC)
    else:
        resize = ResizeToCover(*(int(side / CROP_SHARE) if side <= 224 else side for side in size))
    return T.Compose([resize, T.CenterCrop(size), to_float, T.Normalize(args.mean, args.std)])


def build_array_transform(args):
    """Fine-tuning chain for what has no colours to vary, float (C, H, W) -> normalised: crop and
    flip of the recipe, random erasing.

    Raises:
        UserError: --aa or --color_jitter is on.
    """
    if args.aa or args.color_jitter:
        raise UserError(
            "--aa and --color_jitter work on 8-bit pictures, the data are arrays; leave them out "
            "(--aa '')."
        )
    erasing = RandomErasing(
        args.reprob, mode=args.remode, max_count=args.recount, num_splits=0, device="cpu"
    )
    return T.Compose(
        [
            T.RandomResizedCrop(args.input_size, interpolation=InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(),
            to_float,
            T.Normalize(args.mean, args.std),
            erasing,
        ]
    )


def posterize(img, bits: int, **_):
    """Keep the `bits` highest bits of every channel; with none, black.

    timm's own hands 0 bits to Pillow, which newer versions refuse: a run would die at a rare draw.
    """
    return ImageOps.posterize(img, bits) if bits else Image.new(img.mode, img.size)


class ResizeToCover:
    """Resize a picture, keeping its shape, to the smallest size that covers height x width."""

    def __init__(self, height: int, width: int):
        self.height, self.width = height, width

    def __call__(self, img):
        _, height, width = TF.get_dimensions(img)
        scale = max(self.height / height, self.width / width)
        size = [max(round(height * scale), self.height), max(round(width * scale), self.width)]
        return TF.resize(img, size, InterpolationMode.BICUBIC)
