"""Pre-training, fine-tuning and evaluation by the real commands; invalid flags."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parity_data import read_json
from processes import run_python
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_finetune
import main_pretrain
from util.run.launch import launch

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--input_size 32 --batch_size 2 --epochs 2 --warmup_epochs 1 --num_workers 1".split()
PRETRAIN = ["--model", "mae_vit_mini_patch4", "--decoder_depth", "1", "--norm_pix_loss", *SMALL]
CROSS = ["--cross_mae", "--weight_fm", "--use_input"]
FINETUNE = ["--model", "vit_mini_patch4", *SMALL]


def torchrun(*command: str) -> str:
    """Output of a script on two ranks, as a user starts it."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*line, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300
    )
    assert done.returncode == 0, done.stdout.decode()
    return done.stdout.decode()


@pytest.fixture(scope="module")
def finished_runs(tmp_path_factory, image_folder):
    """Folder of a pre-training and a fine-tuning run on 2 ranks each, and their output."""
    folder = tmp_path_factory.mktemp("runs")
    data = ["--data_path", str(image_folder)]
    out = {}
    out["pretrain"] = torchrun(
        "main_pretrain.py", *PRETRAIN, *CROSS, *data, "--output_dir", f"{folder}/pre"
    )
    pretrained = ["--finetune", f"{folder}/pre/checkpoint.pth"]
    out["finetune"] = torchrun(
        *["main_finetune.py", *FINETUNE, *data, *pretrained, "--dist_eval"],
        *["--mixup", "0.8", "--cutmix", "1.0", "--output_dir", f"{folder}/fine"],
    )
    return folder, out


def test_pretraining_outputs(finished_runs):
    folder, out = finished_runs
    formats = read_json("formats")
    lines = [json.loads(line) for line in (folder / "pre/log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert set(formats["log_txt"]["pretrain_keys"]) <= set(lines[0])
    checkpoint = torch.load(folder / "pre/checkpoint.pth", weights_only=True)
    assert set(formats["checkpoint"]["keys"]) <= set(checkpoint) and checkpoint["epoch"] == 1
    assert (folder / "pre/checkpoint-0.pth").exists()
    events = EventAccumulator(str(folder / "pre")).Reload()
    assert set(formats["tensorboard"]["pretrain"]) <= set(events.Tags()["scalars"])
    steps = {tag: [s.step for s in events.Scalars(tag)] for tag in ("train_loss", "img_per_s")}
    assert steps == {"train_loss": [0, 500, 1000, 1500], "img_per_s": [500, 1500]}
    assert len(re.findall(formats["train_lines"]["regex"], out["pretrain"])) >= 4
    lines = ("base lr: 1.00e-03", "actual lr: ", "effective batch size: 4", "Start training for 2")
    for line in (*lines, "learning rate    0.001 × 4/256 × 0.75/0.75"):
        assert out["pretrain"].count(line) == 1, line
    progress = [line for line in out["pretrain"].splitlines() if "eta:" in line]
    assert all(line.count(" lr: ") == 1 and "loss_scale" not in line for line in progress)
    assert all(re.search(r"max mem: \d+ MiB\b", line) for line in progress)
    assert "loss_scale" not in events.Tags()["scalars"]  # only float16 is scaled


def test_finetuning_outputs(finished_runs):
    folder, out = finished_runs
    formats = read_json("formats")
    lines = [json.loads(line) for line in (folder / "fine/log.txt").read_text().splitlines()]
    assert set(formats["log_txt"]["finetune_keys"]) <= set(lines[1])
    assert {p.name for p in (folder / "fine").glob("*.pth")} == {
        "checkpoint.pth",
        "checkpoint-best.pth",
    }
    events = EventAccumulator(str(folder / "fine")).Reload()
    tags = formats["tensorboard"]["finetune"] + formats["tensorboard"]["finetune_per_epoch"]
    assert set(tags) <= set(events.Tags()["scalars"])
    for name in ("acc1", "mean_class"):
        logged = [(s.step, pytest.approx(s.value)) for s in events.Scalars(f"perf/test_{name}")]
        assert [(line["epoch"], line[f"test_{name}"]) for line in lines] == logged
    assert "Mixup is activated!" in out["finetune"]
    assert "Load pre-trained checkpoint from:" in out["finetune"]


def test_evaluation_prints_the_documented_line(finished_runs, image_folder):
    folder, _ = finished_runs
    resume = [
        "--eval",
        "--resume",
        f"{folder}/fine/checkpoint.pth",
        "--data_path",
        str(image_folder),
    ]
    command = ["main_finetune.py", *FINETUNE, *resume, "--output_dir", f"{folder}/nothing"]
    out = run_python(*command).stdout
    line = re.search(r"\* Acc@1 \d+\.\d{3} Acc@5 \d+\.\d{3} loss \d+\.\d{3}\n", out)
    log = (folder / "fine/log.txt").read_text().splitlines()[-1]
    last = json.loads(log)
    assert line and f"* Acc@1 {last['test_acc1']:.3f} Acc@5" in line.group()
    assert not (folder / "nothing").exists()


@pytest.mark.parametrize("script", ["main_pretrain.py", "main_finetune.py"])
def test_help_lists_flags(script):
    out = run_python(script, "--help").stdout
    assert "--data_path" in out and "--epochs" in out


NO_OUTPUT = ["--output_dir", ""]
INVALID_FLAGS = {
    "kept_mask_ratio 0.9 exceeds": [main_pretrain, *PRETRAIN, *CROSS, "--kept_mask_ratio", "0.9"],
    "--mask_ratio is 1.5": [main_pretrain, *PRETRAIN, "--mask_ratio", "1.5"],
    "--kept_mask_ratio is 0.0": [main_pretrain, *PRETRAIN, "--kept_mask_ratio", "0"],
    "--accum_iter 50": [main_pretrain, *PRETRAIN, *CROSS, "--accum_iter", "50"],
    "8 training images": [main_pretrain, *PRETRAIN, *CROSS, "--batch_size", "64"],
    "There is no --model vit_x": [main_finetune, *FINETUNE, "--model", "vit_x"],
    "does not divide by patch size 4": [main_pretrain, *PRETRAIN, *CROSS, "--input_size", "30"],
    "There is no checkpoint file": [main_pretrain, *PRETRAIN, *CROSS, "--resume", "nowhere.pth"],
    "no checkpoint file": [main_finetune, *FINETUNE, "--finetune", "nowhere.pth"],
    "is for CrossMAE": [main_pretrain, *PRETRAIN, "--weight_fm"],
    "need a fine-tuned checkpoint": [main_finetune, *FINETUNE, "--eval"],
    "--nb_classes is 7": [main_finetune, *FINETUNE, "--nb_classes", "7"],
    "must be even": [main_finetune, *FINETUNE, "--mixup", "1", "--batch_size", "3"],
    "use_fm [9]": [main_pretrain, *PRETRAIN, "--cross_mae", "--weight_fm", "--use_fm", "9"],
    "--device tpu": [main_pretrain, *PRETRAIN, "--device", "tpu"],
    "--data_path is empty": [main_pretrain, *PRETRAIN, "--data_path", ""],
    "--lr is -1.0": [main_pretrain, *PRETRAIN, "--lr", "-1"],
    "--blr is nan": [main_pretrain, *PRETRAIN, "--blr", "nan"],
    "--weight_decay is -1.0": [main_finetune, *FINETUNE, "--weight_decay", "-1"],
    "--warmup_epochs is -5": [main_pretrain, *PRETRAIN, "--warmup_epochs", "-5"],
    "--patch_size is 0": [main_pretrain, *PRETRAIN, "--patch_size", "0"],
    "--layer_decay is 7.0": [main_finetune, *FINETUNE, "--layer_decay", "7"],
    "--seed is -1": [main_pretrain, *PRETRAIN, "--seed", "-1"],
    "--input_size is 0": [main_pretrain, *PRETRAIN, "--input_size", "0"],
    "--log_images logs to": [main_pretrain, *PRETRAIN, "--log_images", "2", "--output_dir", ""],
    "Not started by mpirun": [main_pretrain, *PRETRAIN, "--dist_on_itp"],
    "--aa rand-m9.5 is not a policy": [main_finetune, *FINETUNE, "--aa", "rand-m9.5"],
    "--aa foo is not a policy": [main_finetune, *FINETUNE, "--aa", "foo"],
    "give one of them": [main_finetune, *FINETUNE, "--eval", "--predict", "x", "--resume", "y"],
    "--clip_grad is 0.0": [main_finetune, *FINETUNE, "--clip_grad", "0"],
    "--keep_last needs": [main_finetune, *FINETUNE, "--keep_last", "2"],
    "has nowhere to save": [main_pretrain, *PRETRAIN, "--save_every_minutes", "5", *NO_OUTPUT],
    "the smaller one first": [main_finetune, *FINETUNE, "--cutmix_minmax", "0.8", "0.2"],
    "--mixup is -1.0; it must be in [0, 1000]": [main_finetune, *FINETUNE, "--mixup", "-1"],
    "uses BatchNorm": [
        *(main_finetune, *FINETUNE, "--linear_probe", "--finetune", "x", "--batch_size", "1"),
        *("--drop_path", "0"),
    ],
    "needs a pre-trained encoder": [
        *(main_finetune, *FINETUNE, "--linear_probe", "--resume", "auto", "--drop_path", "0"),
    ],
    "--device meta is not supported": [main_pretrain, *PRETRAIN, "--device", "meta"],
}


@pytest.mark.parametrize("message", INVALID_FLAGS)
def test_invalid_flags_give_one_line_error(message, image_folder, tmp_path, capsys):
    main, *flags = INVALID_FLAGS[message]
    paths = ["--data_path", str(image_folder), "--output_dir", str(tmp_path / "out")]
    args = main.get_args_parser().parse_args([*paths, *flags])
    with pytest.raises(SystemExit) as stop:
        launch(main.main, args)
    assert stop.value.code == 1
    errors = [line for line in capsys.readouterr().out.splitlines() if "Error: " in line]
    assert len(errors) == 1 and message in errors[0]


def test_output_dir_that_is_a_file_is_refused(image_folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    paths = ["--data_path", str(image_folder), "--output_dir", str(tmp_path / "file")]
    args = main_pretrain.get_args_parser().parse_args([*PRETRAIN, *CROSS, *paths])
    with pytest.raises(SystemExit):
        launch(main_pretrain.main, args)
    assert "Cannot write to the output folder" in capsys.readouterr().out


def test_eval_refuses_pretraining_checkpoint(finished_runs, image_folder, capsys):
    folder, _ = finished_runs
    flags = ["--eval", "--resume", f"{folder}/pre/checkpoint.pth", "--data_path", str(image_folder)]
    with pytest.raises(SystemExit):
        launch(main_finetune.main, main_finetune.get_args_parser().parse_args([*FINETUNE, *flags]))
    assert "give it to --finetune instead of --resume" in capsys.readouterr().out


def test_predict_refuses_pretraining_checkpoint(finished_runs, image_folder, capsys):
    folder, _ = finished_runs
    flags = ["--predict", str(image_folder), "--resume", f"{folder}/pre/checkpoint.pth"]
    with pytest.raises(SystemExit):
        launch(main_finetune.main, main_finetune.get_args_parser().parse_args([*FINETUNE, *flags]))
    assert "--predict needs a fine-tuned one" in capsys.readouterr().out


def test_mismatched_flag_is_named(finished_runs, image_folder, capsys):
    """A flag that differs from the checkpoint is named, with both values."""
    folder, _ = finished_runs
    flags = ["--eval", "--resume", f"{folder}/fine/checkpoint.pth", "--data_path"]
    flags += [str(image_folder), "--input_size", "64"]
    with pytest.raises(SystemExit):
        launch(main_finetune.main, main_finetune.get_args_parser().parse_args([*FINETUNE, *flags]))
    assert "was trained with 32; leave the flag out" in capsys.readouterr().out


def test_new_run_moves_files_of_previous_run(image_folder, tmp_path, capsys):
    """Two runs in one folder have separate logs; resuming a complete run does nothing."""
    paths = ["--data_path", str(image_folder), "--output_dir", str(tmp_path)]
    flags = [*PRETRAIN, *CROSS, *paths]
    for more in ([], [], ["--resume", "auto"]):
        launch(main_pretrain.main, main_pretrain.get_args_parser().parse_args([*flags, *more]))
    epochs = [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").open()]
    (moved,) = tmp_path.glob("previous-*/log.txt")
    assert epochs == [json.loads(line)["epoch"] for line in moved.open()] == [0, 1]
    out = capsys.readouterr().out
    assert "files of an earlier run in" in out
    assert "/checkpoint.pth has finished epoch 1 of --epochs 2" in out.splitlines()[-2]
    assert len(re.findall(r"Training time \d:\d\d:\d\d", out)) == 3


@pytest.mark.slow  # compiles on two ranks: one to three minutes
@pytest.mark.parametrize("what", ["blocks", "whole"])
def test_compiled_training_matches_uncompiled_losses(what, image_folder, tmp_path):
    """Two ranks, accumulation, partial prediction; an uncompiled run resumes a compiled one."""
    losses = {}
    for name, flags in (("plain", []), ("compiled", ["--compile", what])):
        run_flags = [*PRETRAIN, *CROSS, "--kept_mask_ratio", "0.25", "--accum_iter", "2", *flags]
        data = ["--data_path", str(image_folder), "--output_dir", str(tmp_path / name)]
        out = torchrun("main_pretrain.py", *run_flags, *data)
        assert ("First step:" in out) == (name == "compiled")
        assert "run uncompiled" not in out  # no rank fell back
        log = (tmp_path / name / "log.txt").read_text().splitlines()
        losses[name] = [json.loads(line)["train_loss"] for line in log]
    # The whole model draws its masks inside the program, with Inductor's own generator.
    assert losses["compiled"] == pytest.approx(
        losses["plain"], rel=1e-4 if what == "blocks" else 0.1
    )
    flags = [*PRETRAIN, *CROSS, "--epochs", "3", "--resume", "auto"]
    data = ["--data_path", str(image_folder), "--output_dir", str(tmp_path / "compiled")]
    out = run_python("main_pretrain.py", *flags, *data).stdout
    assert "Epoch: [2]" in out and "Epoch: [1]" not in out
