"""--replay: a step that is not finite is recorded, taken again bit for bit, and explained."""

import json
from pathlib import Path

import pytest
import torch
from processes import fork_server, read_steps, uninterrupted_run

import engine_finetune
import engine_pretrain
import main_finetune
import main_pretrain
from util.io.errors import NonFiniteLoss, UserError
from util.lr_sched import adjust_learning_rate
from util.run.flags import parse_flags
from util.run.replay import Replayed

MINI = "--input_size 32 --patch_size 16 --num_workers 0 --device cpu --batch_size 4 --epochs 2"
PRETRAIN = f"{MINI} --model mae_vit_mini_patch4 --cross_mae --weight_fm --decoder_depth 1".split()
FINETUNE = f"{MINI} --model vit_mini_patch4 --drop_path 0.1 --mixup 0.8".split()
FAULTY = 1.5  # epoch 1, iteration 1 of 2


class Fault(torch.autograd.Function):
    """Identity; at the faulty step its gradient is multiplied by a value."""

    value = 1.0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * Fault.value


@pytest.fixture
def fault(monkeypatch):
    """Function (main, module name, what, value): from then on, what that module computes at the
    faulty step, its "output" or "gradient", is multiplied by the value."""

    def inject(main, module_name: str, what: str, value: float):
        is_faulty = False

        def note_position(optimizer, epoch, args):
            nonlocal is_faulty
            is_faulty = epoch == FAULTY
            Fault.value = value if is_faulty and what == "gradient" else 1.0
            return adjust_learning_rate(optimizer, epoch, args)

        for engine in (engine_pretrain, engine_finetune):
            monkeypatch.setattr(engine, "adjust_learning_rate", note_position)
        builder = "build_pretrain_model" if main is main_pretrain else "build_classifier"
        build = getattr(main, builder)

        def build_faulty(*args):
            model = build(*args)
            module = model.get_submodule(module_name)
            forward = module.forward

            def faulty_forward(*inputs):
                if what == "gradient":
                    return forward(Fault.apply(inputs[0]), *inputs[1:])
                return forward(*inputs) * (value if is_faulty and module.training else 1.0)

            module.forward = faulty_forward
            return model

        monkeypatch.setattr(main, builder, build_faulty)

    return inject


def run(main, folder: Path, data: Path, *flags) -> None:
    base = PRETRAIN if main is main_pretrain else FINETUNE
    words = [*base, "--data_path", data, "--output_dir", folder, *flags]
    main.main(parse_flags(main.get_args_parser(), list(map(str, words))))


def contents(folder: Path) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def findings(capsys) -> str:
    """The one line that says what was found."""
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "not finite first" in line]
    return line.split("Replay: ")[1]


CASES = {
    "output of a pre-training encoder": (
        main_pretrain,
        ("blocks.3.mlp", "output", float("inf")),
        "the output of blocks.3.mlp (Mlp)",
    ),
    "output of a decoder": (
        main_pretrain,
        ("decoder_pred", "output", float("nan")),
        "the output of decoder_pred (Linear)",
    ),
    "output of a classifier": (
        main_finetune,
        ("blocks.1.attn", "output", float("nan")),
        "the output of blocks.1.attn (Attention)",
    ),
    "infinite gradient": (
        main_finetune,
        ("blocks.2.mlp", "gradient", float("inf")),
        "the gradient of the input of blocks.2.mlp (Mlp)",
    ),
    "gradient that is NaN": (
        main_finetune,
        ("blocks.2.mlp", "gradient", float("nan")),
        "the backward of blocks.2.mlp (Mlp) gives NaN: Function 'FaultBackward' returned nan",
    ),
}


@pytest.mark.filterwarnings("ignore:Error detected in")  # torch's traceback of the forward pass
@pytest.mark.parametrize("name", CASES)
def test_the_module_is_named(name, fault, image_folder, tmp_path, capsys):
    main, faulty, expected = CASES[name]
    fault(main, *faulty)
    with pytest.raises(NonFiniteLoss, match="epoch 1, iteration 1; .*--replay 1 1 names the mod"):
        run(main, tmp_path, image_folder)
    (line,) = (tmp_path / "nonfinite.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert (entry["epoch"], entry["iteration"], entry["seed"]) == (1, 1, 0)
    assert entry["ranks"] == ([] if "gradient" in name else [0])
    before = contents(tmp_path)
    with pytest.raises(Replayed) as stop:
        run(main, tmp_path, image_folder, "--replay", 1, 1)
    assert stop.value.code == 0
    found = findings(capsys)
    assert found.startswith("epoch 1, iteration 1, rank 0, seed 0: not finite first: ")
    assert expected in found
    assert contents(tmp_path) == before
    assert not torch.is_anomaly_enabled()


def test_an_image_that_is_not_finite_is_named(image_folder, tmp_path, capsys):
    """An array that overflows when normalized: replayed from the start, nothing was saved."""
    import numpy as np

    data = tmp_path / "arrays"
    data.mkdir()
    for index in range(8):
        value = 3e38 if index == 5 else index
        np.save(data / f"{index}.npy", np.full((40, 40, 3), value, np.float32))
    folder = tmp_path / "out"
    with pytest.raises(NonFiniteLoss, match="nothing was saved yet. The loss of rank 0"):
        run(main_pretrain, folder, data)
    entry = json.loads((folder / "nonfinite.jsonl").read_text())
    position = entry["epoch"], entry["iteration"]
    capsys.readouterr()
    with pytest.raises(Replayed):
        run(main_pretrain, folder, data, "--replay", *position)
    assert f"first: the image {data / '5.npy'}, after its transform" in findings(capsys)


def test_accumulated_steps_are_watched_as_a_whole(fault, image_folder, tmp_path, capsys):
    """The gradient norm shows at the last iteration what an earlier one did."""
    fault(main_finetune, "blocks.2.mlp", "gradient", float("inf"))
    flags = ["--batch_size", 2, "--accum_iter", 2]  # position 1.5 is the second step's first one
    with pytest.raises(NonFiniteLoss, match="Gradient norm is .*: epoch 1, iteration 3"):
        run(main_finetune, tmp_path, image_folder, *flags)
    with pytest.raises(Replayed):
        run(main_finetune, tmp_path, image_folder, *flags, "--replay", 1, 3)
    assert "the gradient of the input of blocks.2.mlp" in findings(capsys)


def test_a_finite_step_and_impossible_ones_are_refused(image_folder, tmp_path):
    run(main_pretrain, tmp_path, image_folder, "--keep_every", 1)
    with pytest.raises(UserError, match="there are 2 epochs of 2 iterations"):
        run(main_pretrain, tmp_path, image_folder, "--replay", 1, 2)
    with pytest.raises(UserError, match="--replay 1 0 lies before .*checkpoint.pth .resumes at"):
        run(main_pretrain, tmp_path, image_folder, "--replay", 1, 0)
    first = tmp_path / "checkpoint-0.pth"
    with pytest.raises(UserError, match="epoch 1, iteration 0 is finite in every output and grad"):
        run(main_pretrain, tmp_path, image_folder, "--replay", 1, 0, "--resume", first)
    with pytest.raises(UserError, match="--replay is -1; it must be in"):
        run(main_pretrain, tmp_path, image_folder, "--replay", -1, 0)
    with pytest.raises(UserError, match="leave out --eval"):
        run(main_finetune, tmp_path, image_folder, "--replay", 0, 0, "--eval", "--resume", first)


@pytest.mark.parametrize("script", ["main_pretrain", "main_finetune"])
def test_watching_changes_no_number(script, tmp_path):
    """Loss and gradient norm of the watched step are those of the uninterrupted run."""
    case = uninterrupted_run(script)
    run = fork_server.start(
        [*case.command(tmp_path / "none"), "--replay", 1, 3],
        tmp_path / "out",
        steps=tmp_path / "steps",
    )
    assert run.wait() == 1 and "is finite in every output" in run.text(), run.text()
    expected = [step for step in read_steps(case.folder / "steps.0") if step[0] < 2]
    assert read_steps(tmp_path / "steps") == expected
    assert not (tmp_path / "none").exists()


def test_the_rank_is_named(tmp_path):
    """One of two ranks; both end, and nothing waits for a rank that has ended."""
    case = uninterrupted_run("main_pretrain", 2)
    runs = case.start(tmp_path, faults={1: {"nan_at": [5]}})  # epoch 1, iteration 1
    assert [run.wait() for run in runs] == [1, 1]
    assert "The loss of rank 1 (seed 0) is not finite: --replay 1 1 names" in runs[0].text()
    assert json.loads((tmp_path / "nonfinite.jsonl").read_text())["ranks"] == [1]
    runs = case.start(tmp_path, "--replay", 1, 1, faults={1: {"nan_at": [1]}})
    assert [run.wait() for run in runs] == [0, 0], runs[0].text() + runs[1].text()
    texts = [run.text().split("Replay: training up to")[-1] for run in runs]
    assert "not finite first" not in texts[0]
    assert "iteration 1, rank 1, seed 0: not finite first: the image" in texts[1]
