"""--model_ema: the average, beside unchanged weights; saved, resumed, evaluated and used."""

import json
import re
import shutil

import pytest
import torch
from processes import find_differences

import main_finetune
from tools import export
from util.build import load_trained
from util.io.checkpoint_file import read_checkpoint
from util.io.errors import CheckpointError, UserError
from util.run.state import RunState

MINI = "--input_size 16 --num_workers 0 --device cpu --batch_size 4 --model vit_mini_patch4"
TRAIN = f"{MINI} --epochs 2 --warmup_epochs 0 --lr 1e-2 --drop_path 0.1 --mixup 0.8 --keep_every 1"
EMA = ["--model_ema", "--model_ema_decay", "0.75"]


def run(*flags) -> None:
    main_finetune.main(main_finetune.parse_args([str(word) for word in flags]))


def read_log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, image_folder):
    """Runs without an average (plain/) and with one (ema/), and the weights after every step."""
    folder = tmp_path_factory.mktemp("ema")
    data = [*TRAIN.split(), "--data_path", image_folder]
    run(*data, "--output_dir", folder / "plain")
    history, after_step, init = [], RunState.after_step, RunState.__init__

    def copy(state) -> dict:
        return {name: value.clone().double() for name, value in state.model.state_dict().items()}

    def record_start(self, *args):
        init(self, *args)
        history.append(copy(self))

    def record_step(self, *args):
        after_step(self, *args)
        history.append(copy(self))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunState, "__init__", record_start)
        patch.setattr(RunState, "after_step", record_step)
        run(*data, *EMA, "--output_dir", folder / "ema")
    return folder, data, history


def test_average_is_that_of_its_definition(runs):
    """In float64 from the weights before the first step and after each of four."""
    folder, _, history = runs
    assert len(history) == 5
    expected = history[0]
    for weights in history[1:]:
        expected = {name: 0.75 * expected[name] + 0.25 * weights[name] for name in expected}
    saved = read_checkpoint(folder / "ema/checkpoint.pth")
    assert saved["model_ema"].keys() == saved["model"].keys()
    for name, value in saved["model_ema"].items():
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=1e-6)
    assert not torch.equal(saved["model_ema"]["head.weight"], saved["model"]["head.weight"])


def test_weights_do_not_depend_on_it(runs):
    folder, *_ = runs
    plain, ema = (read_checkpoint(folder / name / "checkpoint.pth") for name in ("plain", "ema"))
    for entry in ("model", "optimizer", "state"):
        assert not find_differences(plain[entry], ema[entry])
    assert "model_ema" not in plain
    rows = zip(read_log(folder / "plain"), read_log(folder / "ema"), strict=True)
    for one, other in rows:
        added = {key for key in other if key.startswith("test_ema_")}
        assert added == {f"test_ema_{name}" for name in ("acc1", "acc5", "loss", "mean_class")}
        assert {key: other[key] for key in one} == one and one.keys() | added == other.keys()


def test_resumed_exactly(runs, tmp_path):
    folder, data, _ = runs
    shutil.copy(folder / "ema/checkpoint-0.pth", tmp_path / "checkpoint.pth")
    run(*data, *EMA, "--output_dir", tmp_path, "--resume", "auto")
    again, whole = (read_checkpoint(f / "checkpoint.pth") for f in (tmp_path, folder / "ema"))
    assert not find_differences(again["model_ema"], whole["model_ema"])
    assert not find_differences(again["model"], whole["model"])
    assert read_log(tmp_path)[-1] == read_log(folder / "ema")[-1]


def test_started_and_ended_at_a_resume(runs, tmp_path, capsys):
    """With a message; the average then starts from the weights of the file."""
    folder, data, _ = runs
    last = ["--resume", folder / "plain/checkpoint.pth", "--output_dir", tmp_path / "a"]
    run(*data, *EMA, *last, "--epochs", 3, "--model_ema_decay", 0.999999)
    assert "plain/checkpoint.pth holds no average: it starts from its weights" in (
        capsys.readouterr().out
    )
    average = read_checkpoint(tmp_path / "a/checkpoint.pth")["model_ema"]
    start = read_checkpoint(folder / "plain/checkpoint.pth")["model"]
    torch.testing.assert_close(average, start, rtol=0, atol=1e-5)  # hardly moved in one epoch
    last = ["--resume", folder / "ema/checkpoint.pth", "--output_dir", tmp_path / "b"]
    run(*data, *last, "--epochs", 3)
    assert "ema/checkpoint.pth ends here: --model_ema is not given" in capsys.readouterr().out
    assert "model_ema" not in read_checkpoint(tmp_path / "b/checkpoint.pth")


def test_eval_and_predict_use_it(runs, image_folder, tmp_path, capsys):
    folder, *_ = runs
    file, losses, predictions = folder / "ema/checkpoint.pth", [], []
    for more in ([], ["--model_ema"]):
        flags = [*MINI.split(), "--resume", file, "--output_dir", tmp_path, *more]
        run(*flags, "--eval", "--data_path", image_folder)
        losses.append(re.search(r"\* Acc@1 .* loss ([\d.]+)", capsys.readouterr().out)[1])
        run(*flags, "--predict", image_folder / "val")
        predictions.append((tmp_path / "predictions.csv").read_text())
    row = read_log(folder / "ema")[-1]
    assert losses == [f"{row['test_loss']:.3f}", f"{row['test_ema_loss']:.3f}"]
    assert losses[0] != losses[1] and predictions[0] != predictions[1]


def test_export_uses_it(runs, tmp_path):
    folder, *_ = runs
    flags = ["--checkpoint", folder / "ema/checkpoint.pth", "--to", "safetensors", "--model_ema"]
    words = [*map(str, flags), "--out", str(tmp_path / "m.safetensors")]
    export.main(export.get_args_parser().parse_args(words))
    exported, _ = load_trained(tmp_path / "m.safetensors")
    expected = read_checkpoint(folder / "ema/checkpoint.pth")["model_ema"]
    assert not find_differences(dict(exported.state_dict()), dict(expected))


def test_a_probe_has_one_too(runs, image_folder, tmp_path):
    """Its BatchNorm's statistics are averaged, its frozen encoder stays."""
    folder, *_ = runs
    flags = [*MINI.split(), "--linear_probe", "--finetune", folder / "plain/checkpoint.pth", *EMA]
    flags += ["--epochs", 1, "--warmup_epochs", 0, "--data_path", image_folder]
    run(*flags, "--output_dir", tmp_path)
    saved = read_checkpoint(tmp_path / "checkpoint.pth")
    assert torch.equal(saved["model_ema"]["pos_embed"], saved["model"]["pos_embed"])
    mean = "head.0.running_mean"
    assert not torch.equal(saved["model_ema"][mean], saved["model"][mean])


def test_mistakes_are_named(runs, image_folder, tmp_path, capsys):
    folder, *_ = runs
    flags = [*MINI.split(), "--data_path", image_folder]
    with pytest.raises(UserError, match="--model_ema_decay is 1.0; it must be in"):
        run(*flags, "--model_ema", "--model_ema_decay", 1)
    with pytest.raises(CheckpointError, match="holds no average of the weights"):
        run(*flags, "--eval", "--model_ema", "--resume", folder / "plain/checkpoint.pth")
    damaged = read_checkpoint(folder / "ema/checkpoint.pth") | {"model_ema": {"a": 1}}
    torch.save(damaged, tmp_path / "damaged.pth")
    with pytest.raises(CheckpointError, match="model_ema is .* expected a dict of tensors"):
        read_checkpoint(tmp_path / "damaged.pth")
    words = [*map(str, flags), "--model_ema_decay", "0.9"]
    main_finetune.check_args(main_finetune.parse_args(words))
    assert "--model_ema_decay does nothing here" in capsys.readouterr().out
