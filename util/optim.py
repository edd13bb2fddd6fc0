"""Precision and optimizers: autocast dtype, AdamW, LARS, and backward-unscale-clip-step."""

import math

import torch
from timm.optim import Lars
from torch import Tensor, nn

from util.io.errors import CheckpointError

OPTIMIZER_TENSORS = {  # that each optimizer keeps of a parameter
    "AdamW": {"step", "exp_avg", "exp_avg_sq"},
    "Lars": {"momentum_buffer"},
}
AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


def choose_amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """Autocast dtype of --amp, None for float32.

    auto is bf16 where the GPU supports it, fp16 on other GPUs, off on a CPU.
    """
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
    """Fused AdamW: one pass over the parameters per step, on CPU and GPU."""
    return torch.optim.AdamW(param_groups, lr=lr, betas=betas, fused=True)


def build_lars(parameters, lr: float, weight_decay: float):
    """LARS (arXiv 1708.03888) for the linear probe: momentum 0.9, adapts matrices only."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "always_adapt": True},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return Lars(groups, lr=lr, momentum=0.9, weight_decay=weight_decay)


class NativeScalerWithGradNormCount:
    """Backward, unscale, clip and step; the `loss_scaler` of the MAE family.

    A step with non-finite gradients changes nothing. With a fused optimizer that is decided on the
    device, without a sync.
    """

    def __init__(
        self, amp_dtype: torch.dtype | str | None = "auto", device_type: str | None = None
    ):
        """
        Args:
            amp_dtype: autocast dtype of the run, None for float32, or "auto"; float16 needs loss
                scaling.
            device_type: cuda or cpu (default: cuda if available).
        """
        device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
        if amp_dtype == "auto":
            amp_dtype = choose_amp_dtype("auto", torch.device(device_type))
        self.amp_dtype = amp_dtype
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
        """Accumulate the gradients of `loss`; with update_grad, step and return the gradient norm.

        Args:
            clip_grad: largest gradient norm, or None.
            parameters: whose norm is taken (default: all of the optimizer's).
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
            optimizer.found_inf = (~norm.isfinite()).float()  # the kernel then changes nothing
            optimizer.step()
        elif norm.isfinite():
            optimizer.step()
        return norm

    @property
    def loss_scale(self) -> float:
        """Current factor on the loss; 1 without scaling."""
        return self.scaler.get_scale()

    def state_dict(self) -> dict:
        """GradScaler's state; empty without scaling."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Restore a state_dict; an empty one (of a run without scaling) changes nothing."""
        if state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state)


def propagate_nonfinite(loss: Tensor) -> Tensor:
    """The loss, with NaN gradients if it is not finite.

    An infinite loss can have finite gradients. The sum over ranks carries the NaN to all of them,
    so they skip the same step without further communication.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def load_optimizer(optimizer, state: dict, source: str) -> None:
    """Load the state of an optimizer; its hyperparameters stay those of this run's flags.

    Only the scheduled lr is restored, which a run that resumes at its very end does not set again.

    Raises:
        CheckpointError: the state belongs to other parameters. Nothing is loaded then.
    """
    check_optimizer(optimizer, state, source)
    groups = [
        {**own, "params": saved["params"], "lr": float(saved["lr"])}
        for own, saved in zip(optimizer.param_groups, state["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


def check_optimizer(optimizer, state: dict, source: str) -> None:
    """Compare an optimizer's state with the parameters: count, names, shapes and dtypes.

    torch compares counts alone, and fused kernels then read and write out of bounds.

    Raises:
        CheckpointError: with the tensor, both shapes and the remedy.
    """
    remedy = "use the flags the checkpoint was trained with, or load its weights with --init_from"
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    saved_sizes = [len(group["params"]) for group in state["param_groups"]]
    if sizes != saved_sizes:
        raise CheckpointError(
            f"The optimizer in {source} has parameter groups of {saved_sizes} tensors, this run "
            f"has {sizes}; {remedy}."
        )
    ids = [i for group in state["param_groups"] for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if len(set(ids)) != len(ids) or not set(state["state"]) <= set(ids):
        raise CheckpointError(f"The optimizer in {source} numbers its tensors wrongly; {remedy}.")
    expected = OPTIMIZER_TENSORS.get(type(optimizer).__name__)
    for i, param in zip(ids, params, strict=True):
        saved = state["state"].get(i)
        if saved is None:  # a parameter without a gradient so far
            continue
        if expected and saved.keys() != expected:
            raise CheckpointError(
                f"The optimizer in {source} keeps {sorted(saved)} of tensor {i}, this run's keeps "
                f"{sorted(expected)}; {remedy}."
            )
        for name, value in saved.items():
            if value is None and not expected:
                continue
            shape = () if name == "step" else tuple(param.shape)
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            if found != shape or not value.is_floating_point():
                raise CheckpointError(
                    f"{name} of tensor {i} of the optimizer in {source} is {found}, expected "
                    f"floats of shape {shape}; {remedy}."
                )
