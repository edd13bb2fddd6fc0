"""The JPEG decoder: torchcodec's where it is installed, else torchvision's, else none (Pillow).

Their pixels are equal. torchvision's decoder is deprecated in favor of torchcodec's.
"""

import contextlib
import warnings
from collections.abc import Callable

from torch import Tensor

MODES = {1: "GRAY", 3: "RGB"}  # by channels


def find_decoders() -> dict[str, Callable[[Tensor, int], Tensor]]:
    """The installed decoders, the preferred one first: bytes as uint8 (N,), channels -> uint8
    (C, H, W).
    """
    decoders = {}
    # torchcodec before 0.16 has no such name; built for another PyTorch it does not load
    with contextlib.suppress(ImportError, OSError, RuntimeError):
        from torchcodec.decoders import decode_jpeg as torchcodec_jpeg

        decoders["torchcodec"] = lambda data, in_chans: torchcodec_jpeg(data, mode=MODES[in_chans])
    with contextlib.suppress(ImportError):
        from torchvision.io import ImageReadMode
        from torchvision.io import decode_jpeg as torchvision_jpeg

        def decode_with_torchvision(data: Tensor, in_chans: int) -> Tensor:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                return torchvision_jpeg(data, ImageReadMode[MODES[in_chans]])

        decoders["torchvision"] = decode_with_torchvision
    return decoders


DECODERS = find_decoders()
decode_jpeg = next(iter(DECODERS.values()), None)
