"""Meters and progress lines, with a clock that the test moves."""

import logging
import re
import time

import pytest
import torch

from util.metrics import MetricLogger, SmoothedValue


@pytest.fixture
def clock(monkeypatch):
    """time.perf_counter under control: clock(seconds) lets time pass."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


class Batches:
    """Batches of 8 images; each takes wait(i) seconds to load."""

    def __init__(self, length: int, clock, wait):
        self.length, self.clock, self.wait = length, clock, wait

    def __len__(self):
        return self.length

    def __iter__(self):
        for index in range(self.length):
            self.clock(self.wait(index))
            yield torch.zeros(8, 3, 2, 2), None


def test_progress_lines(clock, caplog):
    """Times, images per second and the fraction of waiting, over the last 20 iterations.

    Loading takes 1 s for the first iteration and 0.25 s after it, a step 0.75 s.
    """
    caplog.set_level(logging.INFO)
    metrics = MetricLogger()
    batches = Batches(42, clock, lambda index: 1.0 if index == 0 else 0.25)
    for i, (imgs, _) in metrics.log_every(batches, 20, "Epoch: [3]"):
        clock(0.75)
        metrics.update(loss=i)
        assert len(imgs) == 8
    lines = [line for line in caplog.messages if "eta" in line]
    assert [re.search(r"\[ ?(\d+)/42\]", line)[1] for line in lines] == ["0", "20", "40", "41"]
    first, second, third, last = (
        {k: v for k, v in re.findall(r"(eta|loss|time|data|img/s|wait): (\S+)", line)}
        for line in lines
    )
    assert first == {
        **{"eta": "0:01:11", "loss": "0.0000", "time": "1.7500", "data": "1.0000"},
        **{"img/s": f"{8 / 1.75:.1f}", "wait": f"{100 / 1.75:.0f}%"},
    }
    mean = (1.75 + 20) / 21  # seconds per iteration so far
    assert second["eta"] == f"0:00:{int(mean * 21)}"
    assert (second["time"], second["data"]) == ("1.0000", "0.2500")  # the first has left the window
    assert (second["img/s"], second["wait"]) == ("8.0", "25%")
    assert second["loss"] == "10.0000" and "loss: 10.0000 (10.0000)" in lines[1]
    assert third["loss"] == "30.0000" and "loss: 30.0000 (20.0000)" in lines[2]
    assert last["eta"] == "0:00:00"
    seconds = 1.75 + 41
    assert metrics.data_wait == pytest.approx((1 + 41 * 0.25) / seconds)
    assert metrics.images_per_second == pytest.approx(42 * 8 / seconds)
    assert caplog.messages[-1] == f"Epoch: [3] Total time: 0:00:42 ({seconds / 42:.4f} s / it)"


def test_rest_of_an_epoch(clock, caplog):
    """A resumed epoch counts from its first iteration; times are those of this process."""
    caplog.set_level(logging.INFO)

    class Rest(Batches):
        def __iter__(self):
            self.length -= 30
            return super().__iter__()

    metrics = MetricLogger()
    seen = [i for i, _ in metrics.log_every(Rest(42, clock, lambda i: 0.5), 20, "E", first=30)]
    assert seen == list(range(30, 42))
    assert caplog.messages[-1] == "E Total time: 0:00:06 (0.5000 s / it)"
    assert metrics.data_wait == 1 and metrics.images_per_second == 16


def test_smoothed_value():
    """Median and average of the window, mean of the whole series, the last value."""
    meter = SmoothedValue(window_size=3, fmt="{median} {avg} {global_avg} {value}")
    assert str(meter) == "-"
    for value in (8.0, 1.0, 4.0, 7.0):
        meter.update(value)
    assert str(meter) == "4.0 4.0 5.0 7.0"
    meter.update(10.0, n=4)
    assert meter.global_avg == (8 + 1 + 4 + 7 + 40) / 8
