"""Precision and the update: autocast type, AdamW, and backward-unscale-clip-step in one call."""

import math

import torch
from timm.optim import Lars
from torch import Tensor, nn

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


def choose_amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """Autocast type of --amp, None: float32. auto: bf16 where a GPU has it, else fp16; CPU: off."""
    if amp != "auto":
        return AMP_TYPES[amp]
    if device.type != "cuda":
        return None
    return (
        torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    )


def autocast(device: torch.device, dtype: torch.dtype | None):
    """Context for forward and loss; float32 for dtype None."""
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def build_adamw(param_groups: list[dict], lr: float, betas: tuple[float, float]):
    """AdamW in its fused form: one pass over the parameters per update, on CPU and GPU."""
    return torch.optim.AdamW(param_groups, lr=lr, betas=betas, fused=True)


def build_lars(parameters, lr: float, weight_decay: float):
    """LARS for the linear probe (arXiv 1708.03888): momentum 0.9, adapted for matrices only."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "always_adapt": True},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return Lars(groups, lr=lr, momentum=0.9, weight_decay=weight_decay)


class NativeScalerWithGradNormCount:
    """Backward, unscale, clip and step; called as the MAE family calls its `loss_scaler`.

    A step whose gradients are not finite changes nothing. On a fused optimizer that is decided on
    the device, so no step waits for it.
    """

    def __init__(
        self, amp_dtype: torch.dtype | str | None = "auto", device_type: str | None = None
    ):
        """
        Args:
            amp_dtype: autocast type of the run; float16 needs loss scaling, the others do not.
                auto: what the engines choose if nothing is said.
            device_type: cuda or cpu; by default cuda where there is one.
        """
        device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
        if amp_dtype == "auto":
            amp_dtype = choose_amp_dtype("auto", torch.device(device_type))
        self.scaler = torch.amp.GradScaler(device_type, enabled=amp_dtype is torch.float16)

    def __call__(
        self,
        loss: Tensor,
        optimizer: torch.optim.Optimizer,
        clip_grad: float | None = None,
        parameters=None,
        create_graph: bool = False,
        update_grad: bool = True,
    ) -> Tensor | None:
        """Add the gradients of `loss`; with update_grad also update, and return the gradient norm.

        Args:
            clip_grad: largest gradient norm, or None.
            parameters: what the norm is taken over; by default all that the optimizer holds.
        """
        self.scaler.scale(propagate_nonfinite(loss)).backward(create_graph=create_graph)
        if not update_grad:
            return None
        if parameters is None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
        parameters = list(parameters)
        self.scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if clip_grad is not None:
            nn.utils.clip_grads_with_norm_(parameters, clip_grad, norm)
        if self.scaler.is_enabled():
            self.scaler.step(optimizer)
            self.scaler.update()
        elif optimizer.defaults.get("fused"):
            optimizer.found_inf = (~norm.isfinite()).float()  # the kernel then leaves all as it is
            optimizer.step()
        elif norm.isfinite():
            optimizer.step()
        return norm

    @property
    def loss_scale(self) -> float:
        """Present factor on the loss; 1 without scaling."""
        return self.scaler.get_scale()

    def state_dict(self) -> dict:
        """GradScaler's state; empty without scaling."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Restore what state_dict gave; an empty state (a run without scaling) changes nothing."""
        if state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state)


def propagate_nonfinite(loss: Tensor) -> Tensor:
    """The loss itself, with NaN for its gradients if it is not finite.

    An infinite loss can have finite gradients. Through the sum over processes the NaN reaches every
    rank, so that all of them skip the same step without asking each other.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)
