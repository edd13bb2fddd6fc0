"""Stored numbers of the public CrossMAE code (parity/README.md), and how to compare with them."""

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
    """The file parity/NAME.json."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def parity_cases(name: str, *kinds: str) -> list:
    """The cases of parity/NAME.json (of these kinds, or all) as pytest parameters."""
    cases = read_json(name)["cases"]
    return [pytest.param(c, id=c["name"]) for c in cases if not kinds or c["kind"] in kinds]


def find_case(name: str, case_name: str) -> dict:
    """One case of parity/NAME.json."""
    return next(case for case in read_json(name)["cases"] if case["name"] == case_name)


def tensors_of(case: dict) -> dict[str, torch.Tensor]:
    return load_file(FOLDER / case["file"])


def part(tensors: dict, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors named PREFIX/NAME, as {NAME: tensor}."""
    return {
        k.removeprefix(f"{prefix}/"): v for k, v in tensors.items() if k.startswith(f"{prefix}/")
    }


def build(module: str, ctor: dict, cls: str | None = None) -> torch.nn.Module:
    """The class of a case with its constructor arguments."""
    cls = cls or ("VisionTransformer" if module == "models_vit" else "MaskedAutoencoderViT")
    ctor = dict(ctor)
    ctor["norm_layer"] = partial(torch.nn.LayerNorm, eps=ctor.pop("norm_eps"))
    if module == "models_vit":
        ctor["qkv_bias"] = True
    return getattr(importlib.import_module(module), cls)(**ctor)


def build_loaded(case: dict, tensors: dict) -> torch.nn.Module:
    """The model of a case with the stored weights, in train mode."""
    model = build(case["module"], case["ctor"], case["cls"])
    model.load_state_dict(part(tensors, "w"), strict=True)
    return model.train()


class Comparison(NamedTuple):
    """One passed comparison with stored numbers; `pytest --parity_table FILE` sums them up."""

    test: str  # file::function[case]
    quantity: str
    difference: float  # the largest of the tensor
    allowed: float
    kind: str  # "absolute", "relative", or "equal" (names, shapes, order)


COMPARISONS: list[Comparison] = []


def note(quantity: str, difference: float = 0.0, allowed: float = 0.0, kind: str = "equal"):
    """Keep a passed comparison for the table."""
    test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
    COMPARISONS.append(Comparison(test, quantity, difference, allowed, kind))


def assert_match(actual, expected, what: str, atol: float = 1e-5, rtol: float = 1e-4) -> None:
    """max|a - b| <= atol + rtol max|b|, and equal shapes; tensors, numbers or lists of numbers."""
    if not isinstance(expected, torch.Tensor):
        actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    error = (actual.detach() - expected).abs().max().item()
    bound = atol + rtol * expected.abs().max().item()
    assert error <= bound, f"{what}: off by {error:.2e}, allowed {bound:.2e}"
    note(what, error, bound, "absolute")


def assert_rates_match(actual, expected, what: str, rtol: float = 1e-12) -> None:
    """Every number to the relative rtol: rates and scales span many sizes. Numbers or lists."""
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    assert actual[expected == 0].eq(0).all(), f"{what}: not 0 where 0 is stored"
    error = ((actual - expected).abs() / expected.abs()).nan_to_num(0).max().item()
    assert error <= rtol, f"{what}: off by {error:.2e} of the value, allowed {rtol:.2e}"
    note(what, error, rtol, "relative")


def assert_gradients_match(model: torch.nn.Module, tensors: dict, without_grad=()) -> None:
    """Every trainable parameter has the stored gradient, or none if in without_grad."""
    expected = part(tensors, "g")
    trainable = {name for name, param in model.named_parameters() if param.requires_grad}
    assert trainable == expected.keys() | set(without_grad)
    for name, param in model.named_parameters():
        if name in expected:
            assert_match(param.grad, expected[name], f"gradient: {name}")
        else:
            assert param.grad is None, f"{name} has a gradient"


def run_pretraining_model(case: dict) -> tuple[torch.nn.Module, dict, dict]:
    """A forward case, with gradients: the model, what it computed, the stored tensors."""
    tensors = tensors_of(case)
    model = build_loaded(case, tensors)
    found = {"block_out": {}}

    def keep_visible(module, inputs):
        found["visible"] = inputs[0][:, 1:]

    def keep_output(index):
        return lambda module, inputs, output: found["block_out"].update({index: output})

    model.blocks[0].register_forward_pre_hook(keep_visible)
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(keep_output(index))
    call = dict(noise=tensors["noise"], **case["call"])
    names = ("loss", "pred", "target", "mask")
    found |= zip(names, model(tensors["imgs"], vis=True, **call), strict=True)
    found["loss"].backward()
    assert model(tensors["imgs"], **call).item() == pytest.approx(found["loss"].item(), abs=1e-7)
    return model, found, tensors


def assert_encoder_matches(case: dict, found: dict, tensors: dict) -> None:
    """Visible tokens and the output of every block; blocks that nothing reads need not run."""
    assert_match(found["visible"], tensors["visible"], "visible tokens")
    for index, expected in enumerate(tensors["block_out"]):
        if index not in found["block_out"]:
            assert f"blocks.{index}.norm1.weight" in case["params_without_grad"]
        else:
            assert_match(found["block_out"][index], expected, f"block output: {index}")


def assert_initial_values_match(case: dict, constructions: int) -> None:
    """Kind, spread and bound of every trainable tensor over many constructions, to 4.5 sigma."""
    torch.manual_seed(0)
    models = [build(case["module"], case["ctor"], case["cls"]) for _ in range(constructions)]
    params = [dict(model.named_parameters()) for model in models]
    assert {name for name, p in params[0].items() if p.requires_grad} == case["params"].keys()
    for name, expected in case["params"].items():
        values = torch.cat([p[name].detach().flatten() for p in params]).double()
        if expected["kind"] == "constant":
            assert (values == expected["value"]).all(), name
            continue
        # Variance of a sampled standard deviation: std^2 (kurtosis - 1) / 4n, for both samples.
        kurtosis = {"uniform": 1.8, "normal": 3.0}[expected["kind"]]
        samples = 1 / len(values) + 1 / expected["samples"]
        sigma = expected["std"] * math.sqrt((kurtosis - 1) / 4 * samples)
        assert abs(values.std().item() - expected["std"]) < 4.5 * sigma, name
        assert abs(values.mean().item()) < 4.5 * expected["std"] / math.sqrt(len(values)), name
        if expected["kind"] == "uniform":  # the largest of n falls short of the bound by ~ 1/n
            largest = values.abs().max().item()
            assert largest == pytest.approx(expected["max_abs"], rel=15 * samples), name
        else:
            assert values.abs().max().item() < 6 * expected["std"], name
        deviation = abs(values.std().item() - expected["std"])
        note(f"spread of initial values: {name}", deviation, 4.5 * sigma, "statistical")


def formula_weights(named_tensors, seed: int) -> dict[str, torch.Tensor]:
    """Weights of the full-size cases, made from each name and shape and the seed."""

    def values(name: str, shape: torch.Size) -> np.ndarray:
        draw = np.random.RandomState((zlib.crc32(name.encode()) ^ seed) & 0xFFFFFFFF)
        u = draw.uniform(-1, 1, shape.numel()).astype(np.float32).reshape(shape)
        if len(shape) == 1:
            is_scale = "norm" in name and name.endswith("weight")
            return 1 + np.float32(0.1) * u if is_scale else np.float32(0.05) * u
        if name in ("cls_token", "mask_token", "pos_embed"):
            return np.float32(0.3) * u
        return u * np.float32(np.sqrt(3 / (shape.numel() / shape[0])))

    return {name: torch.from_numpy(values(name, t.shape)) for name, t in named_tensors}


def uniform(seed: int, low: float, high: float, shape) -> torch.Tensor:
    """Float32 numbers from numpy's RandomState(seed).uniform."""
    return torch.from_numpy(np.random.RandomState(seed).uniform(low, high, shape)).float()


def write_table(path: Path) -> None:
    """A row per test function and quantity (up to a colon): the comparison nearest to its bound."""
    groups = {}
    for found in COMPARISONS:
        test, quantity = found.test.partition("[")[0], found.quantity.partition(":")[0]
        groups.setdefault((test, quantity, found.kind), []).append(found)
    rows = []
    for (test, quantity, kind), group in groups.items():
        worst = max(group, key=lambda found: found.difference / (found.allowed or 1))
        numbers = dict(cases=len({found.test for found in group}), comparisons=len(group))
        numbers |= dict(difference=worst.difference, allowed=worst.allowed)
        rows.append(dict(test=test, quantity=quantity, kind=kind, **numbers))
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text(f'{{"machine": "torch {torch.__version__}, CPU", "rows": [\n{lines}\n]}}\n')
