"""Resuming after a kill matches the uninterrupted run bit for bit."""

import logging
import signal
from argparse import Namespace

import pytest
import torch
from processes import SAVE_EVERY_STEP, STEPS, read_steps, uninterrupted_run, wait_until

from util.io.checkpoint_file import read_checkpoint
from util.optim import NativeScalerWithGradNormCount
from util.rng import get_random_state
from util.run import signals
from util.run.output_dir import clear_output_dir, remove_old_checkpoints
from util.run.state import RunState

CASES = {  # script, number of ranks, number of workers
    "pretrain": ("main_pretrain", 1, 0),
    "pretrain, 2 workers": ("main_pretrain", 1, 2),
    "pretrain, 2 ranks": ("main_pretrain", 2, 0),
    "pretrain, 2 ranks, 2 workers": ("main_pretrain", 2, 2),
    "finetune": ("main_finetune", 1, 0),  # with mixup, cutmix, random erasing, drop path
    "finetune, 2 workers": ("main_finetune", 1, 2),
    "finetune, 2 ranks": ("main_finetune", 2, 0),
    "finetune, 2 ranks, 2 workers": ("main_finetune", 2, 2),
}


@pytest.mark.parametrize("name", CASES)
def test_resume_after_kill_matches_uninterrupted_run(name, tmp_path):
    """kill -9 mid-epoch and once more later, with --resume auto."""
    script, size, num_workers = CASES[name]
    case = uninterrupted_run(script, size)
    for num_steps in (STEPS + 2, 2 * STEPS):  # repeated steps count twice
        runs = case.start(tmp_path, *SAVE_EVERY_STEP, "--num_workers", num_workers)
        wait_until(lambda n=num_steps: len(read_steps(tmp_path / "steps.0")) >= n)
        for run in runs:
            run.kill_group(signal.SIGKILL)
        for run in runs:
            assert run.wait() in (-signal.SIGKILL, 1), run.text()  # 1: lost the other rank first
    runs = case.start(tmp_path, *SAVE_EVERY_STEP, "--num_workers", num_workers)
    for run in runs:
        assert run.wait(120) == 0, run.text()
    assert "exactly where it stopped" in runs[0].text()
    case.check(tmp_path)


def test_resume_mid_epoch_repeats_no_step(tmp_path):
    case = uninterrupted_run("main_pretrain")
    runs = case.start(tmp_path, *SAVE_EVERY_STEP, faults={0: {"kill_at": STEPS + 2}})
    assert runs[0].wait() == -signal.SIGKILL
    saved = read_checkpoint(tmp_path / "checkpoint.pth")
    assert (saved["epoch"], saved["state"]["iteration"]) == (0, 2)
    assert case.start(tmp_path)[0].wait() == 0
    steps = read_steps(tmp_path / "steps.0")
    assert len(steps) == len(set(steps))
    case.check(tmp_path)


def test_resume_from_epoch_end_repeats_only_unsaved_steps(tmp_path):
    """By default checkpoints are saved at the end of an epoch; later steps are repeated."""
    case = uninterrupted_run("main_finetune")
    runs = case.start(tmp_path, faults={0: {"kill_at": 2 * STEPS + 3}})
    assert runs[0].wait() == -signal.SIGKILL
    assert case.start(tmp_path)[0].wait() == 0
    steps = read_steps(tmp_path / "steps.0")
    assert len(steps) == len(set(steps)) + 3
    case.check(tmp_path)


CHANGES = {  # what changes, number of steps before the kill, logged message
    "batch, mid-epoch": (
        "--batch_size",
        STEPS + 2,
        "batch_size 8 -> 4: the interrupted epoch 1 starts over",
    ),
    "batch, between epochs": ("--batch_size", 2 * STEPS, "batch_size 8 -> 4: the order of images"),
    "ranks, mid-epoch": ("size", STEPS + 2, "the interrupted epoch 1 starts over"),
    "ranks, between epochs": ("size", 2 * STEPS, "batch_size 8 -> 4: the order of images"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_resume_with_changed_batch_size_or_world_size(name, tmp_path):
    """The change is logged in one line; an interrupted epoch starts over."""
    what, num_steps, message = CHANGES[name]
    case = uninterrupted_run("main_pretrain")
    flags = SAVE_EVERY_STEP if num_steps % STEPS else []
    runs = case.start(tmp_path, *flags, faults={0: {"kill_at": num_steps}})
    assert runs[0].wait() == -signal.SIGKILL
    if what == "size":
        case = uninterrupted_run("main_pretrain", 2)
        runs = case.start(tmp_path)
    else:
        runs = case.start(tmp_path, "--batch_size", 4)
    for run in runs:
        assert run.wait() == 0, run.text()
    text = runs[0].text().split("Resume checkpoint")[-1]
    logged = [line for line in text.splitlines() if "batch_size 8 -> 4" in line]
    assert len(logged) == 1 and message in logged[0]
    assert ("world_size 1 -> 2" in logged[0]) == (what == "size")
    epoch, iteration, _ = read_steps(tmp_path / "steps.0")[num_steps]
    assert (epoch, iteration) == (num_steps // STEPS, 0)


def test_keep_every_and_keep_last(tmp_path):
    """--keep_every 1 keeps a checkpoint per epoch; --keep_last 2 leaves the newest two."""
    case = uninterrupted_run("main_pretrain")
    (run,) = case.start(tmp_path, "--keep_every", 1, "--keep_last", 2)
    assert run.wait() == 0, run.text()
    epochs = {path.name: read_checkpoint(path)["epoch"] for path in tmp_path.glob("*.pth")}
    assert epochs == {"checkpoint-1.pth": 1, "checkpoint-2.pth": 2, "checkpoint.pth": 2}


def test_resume_auto_without_valid_checkpoint_starts_from_scratch(tmp_path):
    """In an empty folder; and with a damaged checkpoint, which is named and skipped."""
    case = uninterrupted_run("main_pretrain")
    assert "No checkpoint in" in (case.folder / "out.0").read_text()
    (tmp_path / "checkpoint.pth").write_bytes(
        (case.folder / "checkpoint.pth").read_bytes()[:100_000]
    )
    (run,) = case.start(tmp_path)
    assert run.wait() == 0
    assert "Skipped: " in run.text() and "starting from scratch" in run.text()
    case.check(tmp_path)


def test_resume_with_changed_dataset_restarts_the_epoch(tiny_cross, caplog):
    """A run resumes mid-epoch only with the same number of images."""
    args = Namespace(start_epoch=2, batch_size=2, accum_iter=1, seed=0, world_size=1)
    for num_images, iteration in ((8, 3), (9, 0)):
        state = RunState(args, tiny_cross(), None, None)
        position = dict(iteration=3, meters={"loss": [1.0, 3]}, best=None, num_images=8)
        layout = dict(batch_size=2, accum_iter=1, seed=0, world_size=1)
        state.restore_position(
            position | layout | {"random": [get_random_state(torch.device("cpu"))]}
        )
        state.register_dataset(ImageList(range(num_images)), num_iterations=4)
        assert (state.iteration, bool(state.meters)) == (iteration, iteration > 0)
    assert "The data set has 9 images and had 8: the interrupted epoch 2 starts over" in caplog.text


def test_without_optimizer_nothing_claims_to_be_exact(tiny_cross, tmp_path, caplog):
    """Weights alone: a warning, the first epoch, and no word of going on where the run stopped."""
    caplog.set_level(logging.INFO)
    model = tiny_cross()
    torch.save({"model": model.state_dict(), "epoch": 4}, tmp_path / "weights.pth")
    args = Namespace(resume=str(tmp_path / "weights.pth"), start_epoch=0, device="cpu")
    state = RunState(args, model, torch.optim.SGD(model.parameters(), 0.1), None)
    state.resume()
    assert (state.epoch, state.iteration) == (0, 0)
    assert "has no optimizer state: only its weights are used, from epoch 0 on" in caplog.text
    assert "exactly" not in caplog.text


class ImageList(list):
    """A stand-in for a dataset without classes."""

    classes = ()


def test_log_of_another_run_is_kept(tmp_path, caplog):
    """Resuming from another folder into a used one keeps the log found there."""
    used = tmp_path / "used"
    used.mkdir()
    (used / "checkpoint.pth").touch()
    (used / "log.txt").write_text('{"epoch": 0}\n{"epoch": 1}\n')
    args = Namespace(rank=0, output_dir=str(used), resume=str(tmp_path / "other/checkpoint.pth"))
    args.log_dir = args.output_dir
    clear_output_dir(args, epoch=1)
    (moved,) = used.glob("previous-*/log.txt")
    assert moved.read_text() == '{"epoch": 0}\n{"epoch": 1}\n'
    assert not (used / "log.txt").exists()
    assert "Kept 2 files of an earlier run in" in caplog.text


def test_keep_last_ignores_checkpoints_of_later_epochs(tmp_path):
    for epoch in (0, 1, 2, 8, 9):
        (tmp_path / f"checkpoint-{epoch}.pth").touch()
    remove_old_checkpoints(tmp_path, keep_last=2, epoch=2)
    assert sorted(path.stem[-1] for path in tmp_path.iterdir()) == ["1", "2", "8", "9"]


def test_stop_request_at_epoch_end_saves_checkpoint(tiny_cross, tmp_path, monkeypatch):
    """Even if --save_every skips this epoch."""
    args = Namespace(output_dir=str(tmp_path), start_epoch=3, epochs=9, device=torch.device("cpu"))
    vars(args).update(world_size=1, batch_size=1, accum_iter=1, seed=0)
    vars(args).update(save_every=5, keep_every=0, keep_last=0)
    model = tiny_cross()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = RunState(args, model, optimizer, NativeScalerWithGradNormCount())
    monkeypatch.setattr(signals, "stop_requested", lambda: True)
    with pytest.raises(signals.Interrupted):
        state.end_epoch()
    assert read_checkpoint(tmp_path / "checkpoint.pth")["epoch"] == 3
