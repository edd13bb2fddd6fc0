"""tools/knn.py: the vote against a double loop, and what is said when the data does not fit."""

import json
import math
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from processes import find_differences, read_steps, run_python, uninterrupted_run
from sklearn.neighbors import KNeighborsClassifier
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import main_pretrain
from models_vit import vit_mini_patch4
from tools import knn
from util.data.transforms import build_transform
from util.eval.knn import (
    ONLINE_K,
    ONLINE_TEMPERATURE,
    count_correct,
    find_nearest,
    list_splits,
    measure_knn,
    vote,
)
from util.io.checkpoint_file import read_checkpoint

ROOT = Path(__file__).resolve().parent.parent


def random_set(count: int, num_classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (count,), generator=random)
    features = torch.randn(count, 12, generator=random) + 2 * F.one_hot(labels, 12)
    return features * (1 + torch.rand(count, 1, generator=random)), labels


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def naive_accuracy(train, val, k: int, temperature: float) -> tuple[float, float]:
    """The definition: sort all training images, add up the votes, look for the label."""
    right1 = right5 = 0
    for query, label in zip(*(x.tolist() for x in val), strict=True):
        near = [(cosine(query, row), owner) for row, owner in zip(*train, strict=True)]
        votes = {}
        for similarity, owner in sorted(near, reverse=True)[:k]:
            votes[owner] = votes.get(owner, 0) + math.exp(similarity / temperature)
        ranked = sorted(votes, key=votes.get, reverse=True)
        right1 += label == ranked[0]
        right5 += label in ranked[:5]
    return 100 * right1 / len(val[0]), 100 * right5 / len(val[0])


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_equals_a_double_loop(chunk, temperature):
    num_classes, ks = 8, [1, 3, 20, 60]
    train, val = random_set(60, num_classes, 0), random_set(40, num_classes, 1)
    batches = zip(val[0].split(16), val[1].split(16), strict=True)
    found = measure_knn(*train, batches, ks, temperature, num_classes, chunk)
    rows = train[0].tolist(), train[1].tolist()
    for k in ks:
        assert found[k] == pytest.approx(naive_accuracy(rows, val, k, temperature))
    assert 0 < found[1][0] < 100 and found[1][0] == found[1][1]  # one neighbor, one guess


def test_nearest_are_those_of_a_full_sort():
    queries, bank = (F.normalize(random_set(n, 5, n)[0], dim=1) for n in (9, 50))
    near, ids = find_nearest(queries, bank, 13, chunk=8)
    expected = (queries.double() @ bank.double().T).sort(dim=1, descending=True)
    assert ids.equal(expected.indices[:, :13])
    torch.testing.assert_close(near.double(), expected.values[:, :13], rtol=0, atol=1e-6)


def test_separable_features_are_all_right():
    centres = F.normalize(torch.randn(10, 16, generator=torch.Generator().manual_seed(3)), dim=1)
    labels = torch.arange(200) % 10
    noise = 0.02 * torch.randn(2, 200, 16, generator=torch.Generator().manual_seed(4))
    train, val = centres[labels] + noise[0], 5 * (centres[labels] + noise[1])
    found = measure_knn(train, labels, [(val, labels)], [1, 5, 20], 0.07, 10)
    assert set(found.values()) == {(100.0, 100.0)}


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_no_temperature_overflows(temperature):
    """Cold: the nearest decides. Hot: a majority vote."""
    near, labels = torch.tensor([[0.9, 0.8, 0.7]]), torch.tensor([[2, 1, 1]])
    scores = vote(near, labels, 4, temperature)
    assert scores.isfinite().all() and scores.argmax() == (2 if temperature < 1 else 1)


def test_a_class_without_a_vote_is_no_guess():
    scores = torch.tensor([[0.0, 3.0, 0.0, 1.0, 0.0, 0.0]])
    right = {k: count_correct(scores, torch.tensor([k])).tolist() for k in range(6)}
    assert right == {0: [0, 0], 1: [1, 1], 2: [0, 0], 3: [0, 1], 4: [0, 0], 5: [0, 0]}


def test_k_is_positive():
    flags = ["--checkpoint", "c.pth", "--data_path", "data", "--k", "3", "0"]
    with pytest.raises(ValueError, match="--k is 0; it must be at least 1"):
        knn.main(knn.get_args_parser().parse_args(flags))


def write_data(folder: Path, splits: dict[str, list[str]], count: int = 4) -> None:
    """Images that even an untrained network tells apart: each class of another color."""
    colors = {"red": (230, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 230)}
    random = np.random.RandomState(0)
    for split, classes in splits.items():
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                noise = random.randint(-20, 20, (40, 36, 3))
                pixels = np.clip(np.array(colors[name]) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")


def test_different_classes_are_refused(tmp_path):
    write_data(tmp_path, {"train": ["red", "green"], "val": ["red", "blue"]}, count=1)
    with pytest.raises(ValueError, match=r"different classes \(such as blue, green\)"):
        list_splits(str(tmp_path))


@pytest.mark.parametrize("temperature", ["0", "-1"])
def test_temperature_must_be_positive(temperature):
    flags = ["--checkpoint", "c", "--data_path", "d", f"--temperature={temperature}"]
    with pytest.raises(ValueError, match="--temperature is .*above 0"):
        knn.main(knn.get_args_parser().parse_args(flags))


def test_command_line(tmp_path):
    """As a user calls it: a line per k, one of JSON at the end, and nothing else in a pipe."""
    write_data(tmp_path / "data", dict.fromkeys(("train", "val"), ["red", "green", "blue"]))
    torch.manual_seed(0)
    model = vit_mini_patch4(img_size=32, patch_size=16, num_classes=3)
    args = dict(model="vit_mini_patch4", input_size=32, patch_size=16)
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "c.pth")
    command = ["-m", "tools.knn", "--checkpoint", str(tmp_path / "c.pth")]
    command += ["--data_path", str(tmp_path / "data"), "--k", "1", "3", "50", "--json"]
    command += ["--num_workers", "0", "--device", "cpu", "--which", "cls"]
    result = run_python(*command)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.startswith("kNN")] == [
        "kNN k=1 T=0.07: Acc@1 100.000 Acc@5 100.000",
        "kNN k=3 T=0.07: Acc@1 100.000 Acc@5 100.000",
        "kNN k=12 T=0.07: Acc@1 100.000 Acc@5 100.000",  # 50 is more than there are
    ]
    assert re.search(r"evaluation transform.*no augmentation", result.stdout)
    assert "Acc@5 says nothing" in result.stdout
    facts = json.loads(lines[-1])
    assert facts["which"] == "cls" and facts["train"] == facts["val"] == 12
    assert facts["knn"][1] == {"k": 3, "acc1": 100.0, "acc5": 100.0}


def test_all_patches_as_one_feature(image_folder, tmp_path, capsys):
    """Against scikit-learn's nearest neighbor on the concatenated patch tokens."""
    torch.manual_seed(0)
    model = vit_mini_patch4(img_size=32, patch_size=16, num_classes=2).eval()
    args = dict(model="vit_mini_patch4", input_size=32, patch_size=16)
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "c.pth")
    flags = ["--checkpoint", tmp_path / "c.pth", "--data_path", image_folder, "--k", 1]
    flags += ["--which", "patches", "--num_workers", 0, "--device", "cpu", "--json"]
    knn.main(knn.get_args_parser().parse_args(list(map(str, flags))))
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    options = Namespace(input_size=32, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
    transform, parts = build_transform(False, options), []
    for split in ("train", "val"):
        files = sorted((image_folder / split).glob("*/*"))
        imgs = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
        with torch.no_grad():
            tokens = model.forward_features(imgs).patches
        parts.append((tokens.reshape(8, 4 * 128), [file.parent.name for file in files]))
    nearest = KNeighborsClassifier(1, metric="cosine").fit(*parts[0])
    assert facts["knn"][0]["acc1"] == 100 * nearest.score(*parts[1])
    assert facts["which"] == "patches"


PRETRAIN = "--model mae_vit_mini_patch4 --cross_mae --weight_fm --decoder_depth 1 --epochs 3"
PRETRAIN = f"{PRETRAIN} --input_size 32 --patch_size 16 --batch_size 4 --device cpu".split()


def knn_of(checkpoint: Path, data: Path, k: int, capsys) -> list[float]:
    """[Acc@1, Acc@5] that tools.knn prints."""
    flags = ["--checkpoint", checkpoint, "--data_path", data, "--k", k, "--num_workers", 0]
    knn.main(knn.get_args_parser().parse_args([*map(str, flags), "--device", "cpu", "--json"]))
    (result,) = json.loads(capsys.readouterr().out.splitlines()[-1])["knn"]
    return [result["acc1"], result["acc5"]]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_during_pretraining(num_workers, image_folder, tmp_path, capsys):
    """The steps and random states are those of a run without it, the accuracies those of
    tools.knn; in epochs 1 and 2 (the last) of three.
    """
    logs, saved = {}, {}
    for name, more in {"plain": [], "knn": ["--knn_every", 2, "--knn_data", image_folder]}.items():
        folder = tmp_path / name
        flags = [*PRETRAIN, "--data_path", image_folder, "--output_dir", folder, *more]
        flags += ["--num_workers", num_workers, "--keep_every", 1]
        main_pretrain.main(main_pretrain.get_args_parser().parse_args(list(map(str, flags))))
        logs[name] = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
        saved[name] = read_checkpoint(folder / "checkpoint.pth")
    for entry in ("model", "optimizer", "state"):
        assert not find_differences(saved["plain"][entry], saved["knn"][entry])
    capsys.readouterr()
    for epoch, row in enumerate(logs["knn"]):
        found = [row.pop(name) for name in ("knn_acc1", "knn_acc5") if name in row]
        file = tmp_path / "knn" / f"checkpoint-{epoch}.pth"
        assert found == (knn_of(file, image_folder, 8, capsys) if epoch else [])
    assert logs["knn"] == logs["plain"]
    events = EventAccumulator(str(tmp_path / "knn")).Reload()
    assert [event.step for event in events.Scalars("perf/knn_acc1")] == [1, 2]


def test_settings_during_pretraining():
    """k and temperature of DINO (arXiv 2104.14294), whatever the number of images allows."""
    assert (ONLINE_K, ONLINE_TEMPERATURE) == (20, 0.07)


def test_ranks_share_the_images(tmp_path, capsys):
    """11 and 12 images over two ranks, so that their counts differ."""
    case = uninterrupted_run("main_pretrain", 2)
    data = tmp_path / "data"
    write_data(data, dict(train=["red", "green", "blue"], val=["red", "green", "blue"]))
    next((data / "train/red").iterdir()).unlink()
    runs = case.start(tmp_path, "--knn_every", 3, "--knn_data", data)
    assert [run.wait() for run in runs] == [0, 0], runs[0].text()
    last = json.loads((tmp_path / "log.txt").read_text().splitlines()[-1])
    found = [last["knn_acc1"], last["knn_acc5"]]
    assert found == knn_of(tmp_path / "checkpoint.pth", data, 11, capsys)
    rows = read_steps(tmp_path / "steps.1")
    assert rows == read_steps(case.folder / "steps.1")


def test_flags_belong_together(image_folder):
    for flags in (["--knn_every", "2"], ["--knn_data", "x"]):
        args = main_pretrain.get_args_parser().parse_args([*PRETRAIN, "--data_path", "x", *flags])
        with pytest.raises(ValueError, match="--knn_every N and --knn_data DIR belong together"):
            main_pretrain.check_args(args)
    flags = ["--data_path", str(image_folder), "--knn_every", "1", "--knn_data", "missing"]
    with pytest.raises(ValueError, match="Cannot read the folder missing/train"):
        main_pretrain.main(main_pretrain.get_args_parser().parse_args([*PRETRAIN, *flags]))
