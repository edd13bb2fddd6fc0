"""Wrong types, ranges and shapes inside a checkpoint: one line, and nothing is loaded."""

import copy

import pytest
import torch

from util.io.checkpoint_content import check_content
from util.io.checkpoint_file import read_checkpoint
from util.io.errors import CheckpointError
from util.lr_decay import param_groups_weight_decay
from util.optim import build_adamw, build_lars, load_optimizer
from util.rng import get_random_state

RANDOM = get_random_state(torch.device("cpu"))
STATE = dict(
    **dict(world_size=1, batch_size=2, accum_iter=1, seed=0, iteration=3, best=None),
    **dict(num_images=8, meters={"loss": [1.0, 3]}, random=[RANDOM]),
)
ARGS = dict(model="mae_vit_mini_patch4", input_size=32, patch_size=None, drop_path=0.1)
OPTIMIZER = {"state": {0: {}}, "param_groups": [{"params": [0], "lr": 0.1}]}
GOOD = dict(epoch=0, optimizer=OPTIMIZER, scaler={}, args=ARGS, class_names=["a"], state=STATE)

WRONG = [
    *(("epoch", value) for value in (-7, "5", None, 0.5, float("nan"), 10**12, True)),
    *(("optimizer", value) for value in (None, {}, [], {"state": {}, "param_groups": 3})),
    ("scaler", {"scale": "large"}),
    ("class_names", [1, 2]),
    ("state", 3),
    *(("state.iteration", value) for value in ("2", -1, 1.0, None)),
    *(("state.random", value) for value in ([], {}, [{}], [{**RANDOM, "torch": torch.zeros(3)}])),
    ("state.meters", {"loss": [1.0]}),
    ("state.best", "high"),
    ("state.batch_size", 0),
    ("state.num_images", -8),
    *(("args.input_size", value) for value in ("32", 10**9, -32, [32, 32, 32], 1.5)),
    *(("args.patch_size", value) for value in (0, "16")),
    *(("args.drop_path", value) for value in ("x", 1.0, -0.1, float("nan"))),
    ("args.mean", "gray"),
    ("args.weight_fm", 3),
    ("args.model", 7),
]


def replaced(name: str, value) -> dict:
    content = copy.deepcopy(GOOD)
    *outer, last = name.split(".")
    entries = content[outer[0]] if outer else content
    entries[last] = value
    return content


def test_good_content_passes():
    check_content(GOOD, "c.pth")
    check_content({}, "c.pth")


@pytest.mark.parametrize(
    "name, value", [pytest.param(*x, id=f"{x[0]}={x[1]!r:.20}") for x in WRONG]
)
def test_wrong_entry_is_named(name, value, tmp_path):
    torch.save(replaced(name, value), tmp_path / "c.pth")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "c.pth")
    message = str(caught.value)
    assert f"{tmp_path}/c.pth is not a valid checkpoint: {name} is " in message
    assert len(message.splitlines()) == 1 and "expected" in message


def stepped(optimizer_name: str):
    """A model and its optimizer after one step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    if optimizer_name == "adamw":
        optimizer = build_adamw(param_groups_weight_decay(model, 0.05), 1e-3, (0.9, 0.95))
    else:
        optimizer = build_lars(model.parameters(), 0.1, 0.0)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def poisoned(state: dict, how: str) -> dict:
    """A copy of an optimizer's state with one fault."""
    state = copy.deepcopy(state)
    name = "exp_avg_sq" if "exp_avg_sq" in state["state"][0] else "momentum_buffer"
    entry = next(x for x in state["state"].values() if x[name].ndim == 2)
    value = entry[name]
    if how == "too small":
        entry[name] = torch.zeros(3)
    elif how == "empty":
        entry[name] = torch.zeros(0)
    elif how == "one element short":
        entry[name] = value.flatten()[:-1]
    elif how == "transposed":
        entry[name] = value.T.contiguous()
    elif how == "integers":
        entry[name] = value.long()
    elif how == "no tensor":
        entry[name] = 0.5
    elif how == "missing":
        del entry[name]
    elif how == "renamed":
        entry["exp_avg_sqr"] = entry.pop(name)
    elif how == "unknown id":
        state["state"][99] = entry
    elif how == "id twice":
        state["param_groups"][0]["params"][0] = state["param_groups"][1]["params"][0]
    elif how == "group short":
        state["param_groups"][0]["params"].pop()
    return state


@pytest.mark.parametrize("optimizer_name", ["adamw", "lars"])
@pytest.mark.parametrize(
    "how",
    ["too small", "empty", "one element short", "transposed", "integers", "no tensor", "missing"]
    + ["renamed", "unknown id", "id twice", "group short"],
)
def test_optimizer_tensors_are_compared_with_parameters(optimizer_name, how):
    """Unchecked, fused AdamW reads and writes out of bounds: the process dies with signal 11."""
    _, optimizer = stepped(optimizer_name)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CheckpointError, match="^.*optimizer in c.pth.*$"):
        load_optimizer(optimizer, poisoned(before, how), "c.pth")
    after = optimizer.state_dict()
    assert str(after) == str(before)


def test_step_must_be_a_number():
    _, optimizer = stepped("adamw")
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["step"] = torch.zeros(4)
    with pytest.raises(CheckpointError, match="step of tensor 0"):
        load_optimizer(optimizer, state, "c.pth")


@pytest.mark.parametrize("optimizer_name", ["adamw", "lars"])
def test_hyperparameters_are_those_of_this_run(optimizer_name):
    """--weight_decay and the like act on a resumed run; groups gain no foreign keys.

    lr alone is restored: it is the schedule's.
    """
    _, optimizer = stepped(optimizer_name)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group |= {"weight_decay": 0.7, "lr": 3.0, "foreign": 1}
    expected = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    expected = [group | {"lr": 3.0} for group in expected]
    load_optimizer(optimizer, state, "c.pth")
    found = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    assert found == expected
