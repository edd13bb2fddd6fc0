"""--wandb: the points of TensorBoard, through a stand-in and, if installed, the package offline."""

import importlib.util
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_pretrain
from util.io.errors import UserError

FLAGS = "--model mae_vit_mini_patch4 --decoder_depth 1 --input_size 16 --batch_size 4 --device cpu"
FLAGS = f"{FLAGS} --epochs 2 --num_workers 0 --wandb digits --keep_every 1".split()


def run(folder, data, *flags) -> None:
    words = [*FLAGS, "--data_path", data, "--output_dir", folder, *flags]
    words += ["--knn_every", 1, "--knn_data", data]
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(list(map(str, words))))


class Stub(types.ModuleType):
    """Records what is passed to wandb."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.util.spec_from_loader("wandb", None)
        self.inits, self.rows, self.axes, self.num_finished = [], [], {}, 0
        self.Image = lambda pixels: pixels.shape

    def init(self, **options):
        self.inits.append(options)
        return types.SimpleNamespace(
            define_metric=self.define_metric, log=self.rows.append, finish=self.finish
        )

    def define_metric(self, name, step_metric):
        self.axes[name] = step_metric

    def finish(self):
        self.num_finished += 1


@pytest.fixture
def stub(monkeypatch):
    stub = Stub()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return stub


def test_points_are_those_of_tensorboard(stub, image_folder, tmp_path):
    run(tmp_path, image_folder, "--log_images", 1)
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag in {k for row in stub.rows for k in row}]
    assert {"train_loss", "lr", "grad_norm", "perf/knn_acc1", "img_per_s"} <= set(tags)
    for tag in tags:
        axis = "epoch" if tag.startswith("perf/") else "epoch_1000x"
        logged = [(row[axis], row[tag]) for row in stub.rows if tag in row]
        expected = [(event.step, event.value) for event in events.Scalars(tag)]
        assert logged == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
    assert any(row.get("reconstructions", (0, 0, 0))[2] == 3 for row in stub.rows)
    (options,) = stub.inits
    assert options["project"] == "digits" and options["config"]["decoder_depth"] == 1
    assert stub.axes == {"*": "epoch_1000x", "perf/*": "epoch"}
    assert stub.num_finished == 1


def test_resumed_run_keeps_its_id_and_a_new_one_gets_another(stub, image_folder, tmp_path):
    run(tmp_path, image_folder)
    run(tmp_path, image_folder, "--resume", "auto", "--epochs", 3)
    run(tmp_path, image_folder)
    first, resumed, other = [options["id"] for options in stub.inits]
    assert first == resumed != other


def test_offline_with_the_package(image_folder, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(tmp_path, image_folder)
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert b"train_loss" in content and b"perf/knn_acc1" in content


def test_mistakes_are_named(stub, image_folder, monkeypatch):
    with pytest.raises(UserError, match="--wandb keeps its files in the output folder"):
        run("", image_folder)
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--wandb needs an optional package: pip install wandb"):
        run("out", image_folder)
