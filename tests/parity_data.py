"""Values stored from the public CrossMAE code (parity/README.md) and comparisons with them."""

import importlib
import json
import math
import os
import zlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parent / "parity"


def read_json(name: str) -> dict:
    """Contents of parity/NAME.json."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def parity_cases(name: str, *kinds: str) -> list:
    """The cases of parity/NAME.json as pytest parameters, optionally only of some kinds."""
    cases = read_json(name)["cases"]
    return [pytest.param(c, id=c["name"]) for c in cases if not kinds or c["kind"] in kinds]


def find_case(name: str, case_name: str) -> dict:
    """One case of parity/NAME.json."""
    return next(case for case in read_json(name)["cases"] if case["name"] == case_name)


def load_tensors(case: dict) -> dict[str, torch.Tensor]:
    return load_file(FOLDER / case["file"])


def select(tensors: dict, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors named PREFIX/NAME, as {NAME: tensor}."""
    return {
        k.removeprefix(f"{prefix}/"): v for k, v in tensors.items() if k.startswith(f"{prefix}/")
    }


def build_model(module: str, ctor: dict, cls: str | None = None) -> torch.nn.Module:
    """Construct the model class of a case with its constructor arguments."""
    cls = cls or ("VisionTransformer" if module == "models_vit" else "MaskedAutoencoderViT")
    ctor = dict(ctor)
    ctor["norm_layer"] = partial(torch.nn.LayerNorm, eps=ctor.pop("norm_eps"))
    if module == "models_vit":
        ctor["qkv_bias"] = True
    return getattr(importlib.import_module(module), cls)(**ctor)


def build_with_weights(case: dict, tensors: dict) -> torch.nn.Module:
    """The model of a case with the stored weights, in train mode."""
    model = build_model(case["module"], case["ctor"], case["cls"])
    model.load_state_dict(select(tensors, "w"), strict=True)
    return model.train()


class Comparison(NamedTuple):
    """A passed comparison with stored values; `pytest --parity_table FILE` summarizes them."""

    test: str  # file::function[case]
    quantity: str
    difference: float  # maximum over the tensor
    allowed: float
    kind: str  # "absolute", "relative", or "equal" (names, shapes, order)


COMPARISONS: list[Comparison] = []


def record(quantity: str, difference: float = 0.0, allowed: float = 0.0, kind: str = "equal"):
    """Record a passed comparison for the table."""
    test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
    COMPARISONS.append(Comparison(test, quantity, difference, allowed, kind))


def assert_match(actual, expected, what: str, atol: float = 1e-5, rtol: float = 1e-4) -> None:
    """max|a - b| <= atol + rtol max|b|, and equal shapes; for tensors, numbers or lists."""
    if not isinstance(expected, torch.Tensor):
        actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    error = (actual.detach() - expected).abs().max().item()
    bound = atol + rtol * expected.abs().max().item()
    assert error <= bound, f"{what}: off by {error:.2e}, allowed {bound:.2e}"
    record(what, error, bound, "absolute")


def assert_match_relative(actual, expected, what: str, rtol: float = 1e-12) -> None:
    """Every number within a relative rtol (learning rates span orders of magnitude); or lists."""
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    assert actual[expected == 0].eq(0).all(), f"{what}: nonzero where the stored value is 0"
    error = ((actual - expected).abs() / expected.abs()).nan_to_num(0).max().item()
    assert error <= rtol, f"{what}: off by {error:.2e} of the value, allowed {rtol:.2e}"
    record(what, error, rtol, "relative")


def assert_gradients_match(model: torch.nn.Module, tensors: dict, without_grad=()) -> None:
    """Every trainable parameter has the stored gradient, or none if listed in without_grad."""
    expected = select(tensors, "g")
    trainable = {name for name, param in model.named_parameters() if param.requires_grad}
    assert trainable == expected.keys() | set(without_grad)
    for name, param in model.named_parameters():
        if name in expected:
            assert_match(param.grad, expected[name], f"gradient: {name}")
        else:
            assert param.grad is None, f"{name} has a gradient"


def run_pretraining_model(case: dict) -> tuple[torch.nn.Module, dict, dict]:
    """Forward and backward pass of a case: (model, computed values, stored tensors)."""
    tensors = load_tensors(case)
    model = build_with_weights(case, tensors)
    computed = {"block_out": {}}

    def keep_visible(module, inputs):
        computed["visible"] = inputs[0][:, 1:]

    def keep_output(index):
        return lambda module, inputs, output: computed["block_out"].update({index: output})

    model.blocks[0].register_forward_pre_hook(keep_visible)
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(keep_output(index))
    call = dict(noise=tensors["noise"], **case["call"])
    names = ("loss", "pred", "target", "mask")
    computed |= zip(names, model(tensors["imgs"], vis=True, **call), strict=True)
    computed["loss"].backward()
    assert model(tensors["imgs"], **call).item() == pytest.approx(computed["loss"].item(), abs=1e-7)
    return model, computed, tensors


def assert_encoder_matches(case: dict, computed: dict, tensors: dict) -> None:
    """Visible tokens and the output of every block; blocks with unused outputs need not run."""
    assert_match(computed["visible"], tensors["visible"], "visible tokens")
    for index, expected in enumerate(tensors["block_out"]):
        if index not in computed["block_out"]:
            assert f"blocks.{index}.norm1.weight" in case["params_without_grad"]
        else:
            assert_match(computed["block_out"][index], expected, f"block output: {index}")


def assert_initialization_matches(case: dict, num_models: int) -> None:
    """Distribution, std and bound of every trainable tensor over many models, to 4.5 sigma."""
    torch.manual_seed(0)
    models = [build_model(case["module"], case["ctor"], case["cls"]) for _ in range(num_models)]
    params = [dict(model.named_parameters()) for model in models]
    assert {name for name, p in params[0].items() if p.requires_grad} == case["params"].keys()
    for name, expected in case["params"].items():
        values = torch.cat([p[name].detach().flatten() for p in params]).double()
        if expected["kind"] == "constant":
            assert (values == expected["value"]).all(), name
            continue
        # Variance of a sample std: std^2 (kurtosis - 1) / 4n, for both samples.
        kurtosis = {"uniform": 1.8, "normal": 3.0}[expected["kind"]]
        samples = 1 / len(values) + 1 / expected["samples"]
        sigma = expected["std"] * math.sqrt((kurtosis - 1) / 4 * samples)
        assert abs(values.std().item() - expected["std"]) < 4.5 * sigma, name
        assert abs(values.mean().item()) < 4.5 * expected["std"] / math.sqrt(len(values)), name
        if expected["kind"] == "uniform":  # the maximum of n samples is about 1/n below the bound
            largest = values.abs().max().item()
            assert largest == pytest.approx(expected["max_abs"], rel=15 * samples), name
        else:
            assert values.abs().max().item() < 6 * expected["std"], name
        error = abs(values.std().item() - expected["std"])
        record(f"std of initial values: {name}", error, 4.5 * sigma, "statistical")


def make_formula_weights(named_tensors, seed: int) -> dict[str, torch.Tensor]:
    """Weights of the full-size cases, a function of name, shape and seed."""

    def values(name: str, shape: torch.Size) -> np.ndarray:
        rng = np.random.RandomState((zlib.crc32(name.encode()) ^ seed) & 0xFFFFFFFF)
        u = rng.uniform(-1, 1, shape.numel()).astype(np.float32).reshape(shape)
        if len(shape) == 1:
            is_scale = "norm" in name and name.endswith("weight")
            return 1 + np.float32(0.1) * u if is_scale else np.float32(0.05) * u
        if name in ("cls_token", "mask_token", "pos_embed"):
            return np.float32(0.3) * u
        return u * np.float32(np.sqrt(3 / (shape.numel() / shape[0])))

    return {name: torch.from_numpy(values(name, t.shape)) for name, t in named_tensors}


def uniform(seed: int, low: float, high: float, shape) -> torch.Tensor:
    """Float32 samples of numpy's RandomState(seed).uniform."""
    return torch.from_numpy(np.random.RandomState(seed).uniform(low, high, shape)).float()


def write_table(path: Path) -> None:
    """A row per test and quantity (up to a colon): the comparison closest to its bound."""
    groups = {}
    for item in COMPARISONS:
        test, quantity = item.test.partition("[")[0], item.quantity.partition(":")[0]
        groups.setdefault((test, quantity, item.kind), []).append(item)
    rows = []
    for (test, quantity, kind), group in groups.items():
        worst = max(group, key=lambda item: item.difference / (item.allowed or 1))
        numbers = dict(cases=len({item.test for item in group}), comparisons=len(group))
        numbers |= dict(difference=worst.difference, allowed=worst.allowed)
        rows.append(dict(test=test, quantity=quantity, kind=kind, **numbers))
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text(f'{{"machine": "torch {torch.__version__}, CPU", "rows": [\n{lines}\n]}}\n')
