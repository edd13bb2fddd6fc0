"""main_finetune.py besides fine-tuning: linear probing, reports, predictions, unused flags."""

import csv
import json
import shutil

import pytest
import torch

import main_finetune
import main_pretrain
from util.checkpoint import load_pretrained
from util.io.checkpoint_file import read_checkpoint
from util.io.errors import UserError
from util.layers.attention import AttentionBackend
from util.run.launch import start_logging

SMALL = "--input_size 16 --batch_size 4 --num_workers 0 --device cpu".split()
MODEL = ["--model", "vit_mini_patch4", *SMALL]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, image_folder):
    """A folder with a pre-training run (pre/) and a fine-tuning run (fine/)."""
    folder = tmp_path_factory.mktemp("tasks")
    data = ["--data_path", str(image_folder), "--epochs", "1", "--warmup_epochs", "0"]
    flags = ["--model", "mae_vit_mini_patch4", "--cross_mae", "--weight_fm", *SMALL, *data]
    flags += ["--decoder_depth", "1", "--output_dir", f"{folder}/pre"]
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(flags))
    flags = [*MODEL, *data, "--finetune", f"{folder}/pre/checkpoint.pth"]
    main_finetune.main(main_finetune.parse_args([*flags, "--output_dir", f"{folder}/fine"]))
    return folder


def test_finetune_from_classifier_initializes_new_head(runs, image_folder, caplog):
    """--finetune ignores a head in the checkpoint even if it fits, and reports it."""
    flags = [*MODEL, "--data_path", str(image_folder), "--finetune", f"{runs}/fine/checkpoint.pth"]
    args = main_finetune.parse_args([*flags, "--epochs", "1", "--output_dir", ""])
    args.nb_classes = 2
    caplog.set_level("INFO")
    model = main_finetune.build_classifier(args, AttentionBackend())
    load_pretrained(model, read_checkpoint(args.finetune), args.finetune)
    trained = read_checkpoint(runs / "fine/checkpoint.pth")["model"]
    assert "Removing key head.weight" in caplog.text
    assert "newly initialized: head.weight, head.bias" in caplog.text
    assert not torch.equal(model.head.weight, trained["head.weight"])
    assert torch.equal(model.fc_norm.weight, trained["fc_norm.weight"])


def test_best_by_mean_per_class_accuracy(image_folder, tmp_path, capsys):
    """checkpoint-best.pth is the best of what was chosen; a resume does not change the choice."""
    (data := tmp_path / "data").mkdir()
    for split in ("train", "val"):
        shutil.copytree(image_folder / split, data / split)
        for index in range(6):  # 10 images of a, 4 of b
            shutil.copy(data / split / "a/0.jpg", data / split / f"a/{index}_more.jpg")
    flags = [*MODEL, "--data_path", str(data), "--epochs", "3", "--warmup_epochs", "0"]
    flags += ["--output_dir", str(tmp_path / "out"), "--class_weights", "balanced"]
    main_finetune.main(main_finetune.parse_args([*flags, "--best_by", "mean_class"]))
    lines = (tmp_path / "out/log.txt").read_text().splitlines()
    values = [json.loads(line)["test_mean_class"] for line in lines]
    state = read_checkpoint(tmp_path / "out/checkpoint.pth")["state"]
    assert state["best"] == max(values) and len(values) == 3
    best = read_checkpoint(tmp_path / "out/checkpoint-best.pth")
    assert values[best["epoch"]] == max(values)
    assert f"Max mean per-class accuracy: {max(values):.2f}%" in capsys.readouterr().out
    with pytest.raises(UserError, match="--best_by is acc1, but .* keeps the best by mean_class"):
        main_finetune.main(main_finetune.parse_args([*flags, "--resume", "auto", "--epochs", "4"]))


def test_class_weights_do_not_mix():
    flags = ["--class_weights", "balanced", "--mixup", "0.8", "--data_path", "x"]
    with pytest.raises(UserError, match="--class_weights weights one label"):
        main_finetune.check_args(main_finetune.parse_args(flags))


def test_linear_probe_keeps_the_encoder_frozen(runs, image_folder, tmp_path, capsys):
    flags = [*MODEL, "--linear_probe", "--finetune", f"{runs}/pre/checkpoint.pth", "--lr", "1"]
    flags += ["--data_path", str(image_folder), "--epochs", "2", "--warmup_epochs", "0"]
    main_finetune.main(main_finetune.parse_args([*flags, "--output_dir", str(tmp_path)]))
    out = capsys.readouterr().out
    before = read_checkpoint(runs / "pre/checkpoint.pth")["model"]
    after = read_checkpoint(tmp_path / "checkpoint.pth")["model"]
    shared = [name for name in before if name in after]
    assert len(shared) == 4 + 6 * 12  # cls_token, pos_embed, patch_embed.* and six blocks
    assert all(torch.equal(before[name], after[name]) for name in shared)
    assert "head.1.weight" in after and "head.0.running_mean" in after
    assert after["head.1.bias"].abs().max() > 0 and after["head.0.num_batches_tracked"] == 4
    assert (
        "norm.weight" in after and "fc_norm.weight" not in after
    )  # the head reads the class token
    assert "number of params (M): 0.00" in out  # only the head is trainable

    evaluation = [*MODEL, "--linear_probe", "--eval", "--resume", str(tmp_path / "checkpoint.pth")]
    main_finetune.main(main_finetune.parse_args([*evaluation, "--data_path", str(image_folder)]))
    assert "* Acc@1" in capsys.readouterr().out


@pytest.mark.parametrize("task", [["--eval"], ["--predict", "images"]])
def test_rules_of_training_do_not_refuse_inference(task):
    """run.json of a training run, as --config of an evaluation, holds such flags."""
    flags = [*task, "--resume", "x.pth", "--data_path", "data", "--batch_size", "1"]
    for training in (["--mixup", "0.8", "--class_weights", "balanced"], ["--linear_probe"]):
        main_finetune.check_args(main_finetune.parse_args([*flags, *training]))


def test_linear_probe_defaults_and_overrides():
    args = main_finetune.parse_args(["--linear_probe", "--finetune", "x"])
    assert (args.blr, args.epochs, args.warmup_epochs, args.weight_decay) == (0.1, 90, 10, 0.0)
    assert args.global_pool is False and args.aa == "" and args.reprob == 0
    assert main_finetune.parse_args(["--linear_probe", "--epochs", "7"]).epochs == 7
    assert main_finetune.parse_args([]).epochs == 50


def test_report_files(runs, image_folder, tmp_path, capsys):
    flags = [*MODEL, "--eval", "--resume", f"{runs}/fine/checkpoint.pth"]
    flags += ["--data_path", str(image_folder), "--report", str(tmp_path / "report")]
    start_logging()
    main_finetune.main(main_finetune.parse_args(flags))
    out = capsys.readouterr().out
    main_finetune.main(main_finetune.parse_args(flags))
    (earlier,) = (tmp_path / "report").glob("previous-*")  # nothing is overwritten
    assert len(list(earlier.iterdir())) == 3
    rows = list(csv.reader(open(tmp_path / "report/confusion.csv")))
    assert [row[0] for row in rows[1:]] == ["a", "b"]
    counts = [[int(x) for x in row[1:]] for row in rows[1:]]
    assert [sum(row) for row in counts] == [4, 4]
    accuracy = 100 * (counts[0][0] + counts[1][1]) / 8
    assert f"* Acc@1 {accuracy:.3f}" in out
    assert (tmp_path / "report/confusion.png").stat().st_size > 0
    assert "Acc@5 says nothing with 2 classes" in out


def test_predict_takes_model_and_classes_from_checkpoint(runs, image_folder, tmp_path):
    flags = ["--predict", str(image_folder / "val"), "--resume", f"{runs}/fine/checkpoint.pth"]
    flags += ["--num_workers", "0", "--device", "cpu", "--output_dir", str(tmp_path)]
    main_finetune.main(main_finetune.parse_args(flags))
    main_finetune.main(main_finetune.parse_args(flags))
    (earlier,) = tmp_path.glob("previous-*/predictions.csv")  # nothing is overwritten
    assert earlier.read_text() == (tmp_path / "predictions.csv").read_text()
    rows = list(csv.DictReader(open(tmp_path / "predictions.csv")))
    assert len(rows) == 8 and {row["class"] for row in rows} <= {"a", "b"}
    assert all(0.5 <= float(row["probability"]) <= 1 for row in rows)


def test_pos_embed_size_overrides_stored_input_size(tiny_mae, tiny_vit, tmp_path):
    """The public MAE baseline stores an --input_size it does not use; its grid is square."""
    weights = {"model": tiny_mae().state_dict(), "args": {"input_size": 448}}
    torch.save(weights, tmp_path / "mae.pth")
    model = tiny_vit()
    load_pretrained(model, weights, "mae.pth")
    assert model.pos_embed.equal(weights["model"]["pos_embed"])


UNUSED_FLAGS = {  # flag without effect: command line
    "color_jitter": ["--color_jitter", "0.4"],
    "mixup_prob": ["--mixup_prob", "0.5"],
    "layer_decay": ["--layer_decay", "0.5", "--eval", "--resume", "x.pth"],
    "input_size": ["--input_size", "48", "--predict", "x", "--resume", "x.pth"],
    "finetune": ["--finetune", "y.pth", "--resume", "x.pth"],
}


@pytest.mark.parametrize("name", UNUSED_FLAGS)
def test_flag_without_effect_is_reported(name, caplog):
    main_finetune.check_args(main_finetune.parse_args(["--data_path", "x", *UNUSED_FLAGS[name]]))
    assert f"--{name} does nothing here" in caplog.text
