"""The benchmark prints its JSON keys, and FLOPs, memory and ratios are measured correctly."""

import json
from pathlib import Path

import pytest
import torch
from processes import run_python
from torch._subclasses.fake_tensor import FakeTensorMode

from tools import benchmark
from tools.bench.compiled import compile_counted
from tools.bench.measure import Timer, compare, count_flops, matmul_flops_per_s, peak_memory
from tools.bench.step_traffic import count_step
from tools.bench.traffic import Traffic
from util.layers.attention import AttentionBackend
from util.layers.blocks import Block

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TINY = "--model mae_vit_mini_patch4 --input_size 32 --batch_size 2 --decoder_depth 1 --repeats 1"


@pytest.mark.parametrize("what", ["step", "eval", "optimizer", "loader"])
def test_json_on_the_last_line(what, image_folder):
    command = ["-m", "tools.benchmark", "--what", what, *TINY.split(), "--json"]
    if what == "loader":
        command += ["--images", str(image_folder)]
    if what == "eval":
        command[command.index("mae_vit_mini_patch4")] = "vit_mini_patch4"
    done = run_python(*command)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["what"] == what and result["ratio_median"] > 0 and result["ratio_min"] > 0
    assert {"noise_floor", "images_per_s", "peak_memory_ratio"} <= set(result)
    if what in ("step", "eval"):
        assert result["images_per_s"] == pytest.approx(2 / result["seconds"])
    if what == "step":
        assert 0.1 < result["peak_memory_ratio"] < 1 and result["images_per_s"] > 0
    if what == "loader":
        assert 0.002 < result["mean_grey_level_difference"] < 0.2
        assert result["decoded_per_s_pillow"] > 0 and result["decoded_per_s_torchvision"] > 0


def test_flops_of_a_matrix_product():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert count_flops(lambda: a @ b) == 2 * 3 * 5 * 7


def test_peak_memory_counts_what_is_alive_at_once():
    def one_after_the_other():
        for _ in range(3):
            torch.zeros(2**20)

    def together():
        return [torch.zeros(2**20) for _ in range(3)]

    assert peak_memory(one_after_the_other, CPU) == 4 * 2**20
    assert peak_memory(together, CPU) == 3 * 4 * 2**20


def test_a_ratio_above_one_means_faster_than_the_reference():
    result = compare(
        lambda: torch.zeros(10), lambda: torch.randn(2**21), Timer(CPU, steps=3), repeats=3
    )
    assert result["ratio_median"] > 10 and result["ratio_min"] > 10


def test_traffic_of_single_operators():
    """A product, a cast, an in-place copy and views, against bytes worked out by hand."""
    x, expanded = torch.zeros(6, 4), torch.zeros(1, 4).expand(6, 4)
    with Traffic() as traffic:
        x.mm(torch.zeros(4, 5))  # 24 + 20 read, 30 written
        x.t().unsqueeze(0)
        assert traffic.matmul_bytes == 4 * (24 + 20 + 30) and traffic.kernels == 2
        traffic.reset([])
        x.bfloat16()
        assert traffic.other_bytes == 24 * (4 + 2)
        traffic.reset([])
        x.copy_(expanded)  # 4 read, 24 written
        assert traffic.other_bytes == 4 * (4 + 24) and traffic.matmul_bytes == 0


def test_roofline_takes_the_longer_of_flops_and_bytes():
    with Traffic() as traffic:
        a, b = torch.zeros(8, 8), torch.zeros(8, 8)
        traffic.reset([])
        a @ b
        a + b
    product, addition = 2 * 8**3, 3 * 64 * 4  # FLOPs, bytes
    assert traffic.seconds(1.0, 1e9) == pytest.approx(product + addition / 1e9)
    assert traffic.seconds(1e9, 1.0) == pytest.approx(2 * addition)


@pytest.mark.parametrize("flags", ["", "--mae", "--amp off --recompute all", "--amp fp16"])
def test_traffic_of_a_step(flags, capsys):
    """No more bytes outside products, and no more kept, than by the reference implementation."""
    flags = ["--what", "traffic", *TINY.split(), "--json", "--batch_size", "256", *flags.split()]
    benchmark.main(benchmark.get_args_parser().parse_args(flags))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0.3 < result["ratio_outside_matmul"] < 1 and 0.3 < result["ratio_kept"] < 1
    assert result["gb_in_matmul"] == pytest.approx(result["gb_in_matmul_reference"], rel=0.1)
    assert result["estimate: ratio, H100 SXM"] > 1


def test_traffic_of_compiled_code():
    """x.relu() + 1 is one kernel there, which reads x and writes its result once."""
    layer = Block(4, 1, 1.0, AttentionBackend())
    layer.forward = lambda x: (x.relu() + 1) @ x.t()
    with FakeTensorMode(), Traffic() as traffic:
        compile_counted(layer, "blocks", traffic)
        x = torch.zeros(6, 4)
        traffic.reset([])
        out = layer(x)
        assert out.shape == (6, 6)
        assert traffic.bytes == {"fused": 4 * (24 + 24), "mm": 4 * (24 + 24 + 36)}
        assert traffic.work[-1] == (2 * 6 * 4 * 6, 4 * (24 + 24 + 36))
        out + out
        assert traffic.kernels == 3  # what is not compiled counts as well


def count(*flags):
    flags = ["--what", "traffic", *TINY.split(), "--batch_size", "256", *flags]
    return count_step(benchmark.get_args_parser().parse_args(flags), torch.bfloat16)


def test_compiled_steps_move_less():
    plain, compiled = count(), count("--compile", "blocks")
    assert compiled.other_bytes < 0.9 * plain.other_bytes
    assert compiled.matmul_bytes == pytest.approx(plain.matmul_bytes, rel=0.1)
    assert compiled.kept_bytes == pytest.approx(plain.kept_bytes, rel=0.2)


def test_recomputing_keeps_less():
    """The flag reaches the model: each policy keeps less than the one before it."""
    none, gelu, everything = (count("--recompute", p).kept_bytes for p in ("none", "gelu", "all"))
    assert none > gelu > everything


def test_threads_are_those_asked_for(capsys):
    before = torch.get_num_threads()
    try:
        flags = ["--what", "optimizer", *TINY.split(), "--threads", str(before + 1)]
        benchmark.main(benchmark.get_args_parser().parse_args(flags))
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_rate_of_matrix_products(monkeypatch):
    """2 n^3 FLOPs over the seconds of one product."""
    monkeypatch.setattr(Timer, "__call__", lambda self, call: 0.5)
    assert matmul_flops_per_s(CPU, torch.float32, size=16) == 2 * 16**3 / 0.5
