"""Going on after a kill equals never having stopped: later losses and weights, to the bit."""

import signal
from argparse import Namespace

import pytest
import torch
from processes import OFTEN, STEPS, read_steps, undisturbed, wait_until

from util.io.checkpoint_file import read_checkpoint
from util.optim import NativeScalerWithGradNormCount
from util.rng import get_random_state
from util.run import signals
from util.run.output_dir import clear_output_dir, remove_old_checkpoints
from util.run.state import RunState

CASES = {  # script, processes, loader processes of the run that is killed
    "pretrain": ("main_pretrain", 1, 0),
    "pretrain, 2 workers": ("main_pretrain", 1, 2),
    "pretrain, 2 processes": ("main_pretrain", 2, 0),
    "pretrain, 2 processes, 2 workers": ("main_pretrain", 2, 2),
    "finetune": ("main_finetune", 1, 0),  # with mixup, cutmix, random erasing, drop path
    "finetune, 2 workers": ("main_finetune", 1, 2),
    "finetune, 2 processes": ("main_finetune", 2, 0),
    "finetune, 2 processes, 2 workers": ("main_finetune", 2, 2),
}


@pytest.mark.parametrize("name", CASES)
def test_killed_and_resumed(name, tmp_path):
    """kill -9 once in mid-epoch and once more later, --resume auto both times."""
    script, size, workers = CASES[name]
    case = undisturbed(script, size)
    for after in (STEPS + 2, 2 * STEPS):  # steps done, those done twice counted twice
        runs = case.start(tmp_path, *OFTEN, "--num_workers", workers)
        wait_until(lambda n=after: len(read_steps(tmp_path / "steps.0")) >= n)
        for run in runs:
            run.kill_group(signal.SIGKILL)
        for run in runs:
            assert run.wait() in (-signal.SIGKILL, 1), run.text()  # 1: lost its peer first
    runs = case.start(tmp_path, *OFTEN, "--num_workers", workers)
    for run in runs:
        assert run.wait(120) == 0, run.text()
    assert "exactly where it stopped" in runs[0].text()
    case.check(tmp_path)


def test_position_inside_the_epoch(tmp_path):
    """What is killed in mid-epoch goes on in mid-epoch: no step of the saved part is done again."""
    case = undisturbed("main_pretrain")
    runs = case.start(tmp_path, *OFTEN, faults={0: {"die_at": STEPS + 2}})
    assert runs[0].wait() == -signal.SIGKILL
    saved = read_checkpoint(tmp_path / "checkpoint.pth")
    assert (saved["epoch"], saved["state"]["iteration"]) == (0, 2)
    assert case.start(tmp_path)[0].wait() == 0
    steps = read_steps(tmp_path / "steps.0")
    assert len(steps) == len(set(steps))
    case.check(tmp_path)


def test_without_saves_inside_the_epoch(tmp_path):
    """The default saves at the end of an epoch; a kill costs the steps since then, nothing else."""
    case = undisturbed("main_finetune")
    runs = case.start(tmp_path, faults={0: {"die_at": 2 * STEPS + 3}})
    assert runs[0].wait() == -signal.SIGKILL
    assert case.start(tmp_path)[0].wait() == 0
    steps = read_steps(tmp_path / "steps.0")
    assert len(steps) == len(set(steps)) + 3
    case.check(tmp_path)


CHANGES = {  # what is changed, its flag, in mid-epoch or at its end, the sentence
    "batch, mid-epoch": (
        "--batch_size",
        STEPS + 2,
        "batch_size 8 -> 4: the interrupted epoch 1 starts over",
    ),
    "batch, between epochs": ("--batch_size", 2 * STEPS, "batch_size 8 -> 4: the order of images"),
    "processes, mid-epoch": ("size", STEPS + 2, "the interrupted epoch 1 starts over"),
    "processes, between epochs": ("size", 2 * STEPS, "batch_size 8 -> 4: the order of images"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_resume_with_another_layout(name, tmp_path):
    """Another batch or number of processes: said in one sentence; a begun epoch starts over."""
    what, steps, sentence = CHANGES[name]
    case = undisturbed("main_pretrain")
    often = OFTEN if steps % STEPS else []
    runs = case.start(tmp_path, *often, faults={0: {"die_at": steps}})
    assert runs[0].wait() == -signal.SIGKILL
    first = steps // STEPS
    if what == "size":
        case = undisturbed("main_pretrain", 2)
        runs = case.start(tmp_path)
    else:
        runs = case.start(tmp_path, "--batch_size", 4)
    for run in runs:
        assert run.wait() == 0, run.text()
    text = runs[0].text().split("Resume checkpoint")[-1]
    told = [line for line in text.splitlines() if "batch_size 8 -> 4" in line]
    assert len(told) == 1 and sentence in told[0]
    assert ("world_size 1 -> 2" in told[0]) == (what == "size")
    steps_after = read_steps(tmp_path / "steps.0")[steps:]
    assert steps_after[0][:2] == (first, 0)


def test_kept_checkpoints(tmp_path):
    """--keep_every 1 gives each of the three epochs a file; --keep_last 2 leaves the newest two."""
    case = undisturbed("main_pretrain")
    (run,) = case.start(tmp_path, "--keep_every", 1, "--keep_last", 2)
    assert run.wait() == 0, run.text()
    kept = {path.name: read_checkpoint(path)["epoch"] for path in tmp_path.glob("*.pth")}
    assert kept == {"checkpoint-1.pth": 1, "checkpoint-2.pth": 2, "checkpoint.pth": 2}


def test_first_start_says_so(tmp_path):
    """--resume auto in an empty folder starts fresh; a damaged file is named and passed over."""
    case = undisturbed("main_pretrain")
    assert "No checkpoint in" in (case.folder / "out.0").read_text()
    (tmp_path / "checkpoint.pth").write_bytes(
        (case.folder / "checkpoint.pth").read_bytes()[:100_000]
    )
    (run,) = case.start(tmp_path)
    assert run.wait() == 0
    assert "Skipped: " in run.text() and "starting from scratch" in run.text()
    case.check(tmp_path)


def test_a_position_in_other_data_means_nothing(tiny_cross, caplog):
    """Within an epoch the run goes on in the same pictures only; else the epoch starts over."""
    args = Namespace(start_epoch=2, batch_size=2, accum_iter=1, seed=0, world_size=1)
    for num_images, iteration in ((8, 3), (9, 0)):
        state = RunState(args, tiny_cross(), None, None)
        position = dict(iteration=3, meters={"loss": [1.0, 3]}, best=None, num_images=8)
        layout = dict(batch_size=2, accum_iter=1, seed=0, world_size=1)
        state.restore_position(
            position | layout | {"random": [get_random_state(torch.device("cpu"))]}
        )
        state.register_dataset(Pictures(range(num_images)))
        assert (state.iteration, bool(state.meters)) == (iteration, iteration > 0)
    assert "The data set has 9 images and had 8: the interrupted epoch 2 starts over" in caplog.text


class Pictures(list):
    """As many pictures, of no class."""

    classes = ()


def test_the_log_of_another_run_is_laid_aside(tmp_path, caplog):
    """Going on from elsewhere into a folder that was used: nothing of its run is lost."""
    used = tmp_path / "used"
    used.mkdir()
    (used / "checkpoint.pth").touch()
    (used / "log.txt").write_text('{"epoch": 0}\n{"epoch": 1}\n')
    args = Namespace(rank=0, output_dir=str(used), resume=str(tmp_path / "other/checkpoint.pth"))
    clear_output_dir(args, first_epoch=1)
    (aside,) = used.glob("log-until-*.txt")
    assert aside.read_text() == '{"epoch": 0}\n{"epoch": 1}\n'
    assert not (used / "log.txt").exists()
    assert "holds a run already" in caplog.text


def test_kept_files_of_an_earlier_run_do_not_count(tmp_path):
    for epoch in (0, 1, 2, 8, 9):
        (tmp_path / f"checkpoint-{epoch}.pth").touch()
    remove_old_checkpoints(tmp_path, keep_last=2, epoch=2)
    assert sorted(path.stem[-1] for path in tmp_path.iterdir()) == ["1", "2", "8", "9"]


def test_a_stop_at_the_end_of_an_epoch_saves_it(tiny_cross, tmp_path, monkeypatch):
    """Also of one that --save_every passes over."""
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
