"""The parts of benchmarks/ whose mistakes would not show in their tables."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from moe_dist.parallel.layout import Layout
from tests.support import ROOT


@pytest.mark.parametrize(
    ("world", "device", "clock"), [(1, "cpu", "processor time"), (2, "cpu", "clock"), (1, "cuda", "clock")]
)
def test_a_step_on_a_gpu_is_timed_by_the_clock_until_the_device_is_done(world, device, clock, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    throughput = importlib.import_module("throughput")
    layout, calls, times = Layout(world=world, expert=1, device=torch.device(device)), [], iter([3.0, 5.0])

    def read():
        calls.append("read")
        return next(times)

    def train_step(*arguments):
        calls.append("step")

    monkeypatch.setitem(throughput.CLOCKS, clock, read)
    stand_in = SimpleNamespace(synchronize=lambda: calls.append("wait"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: stand_in)
    contestant = object.__new__(throughput.Contestant)
    contestant.layout, contestant.batches, contestant.engine = layout, [], SimpleNamespace(train_step=train_step)
    contestant.config = SimpleNamespace(data=SimpleNamespace(group_sequences=1))
    assert contestant.step() == 2.0 and calls == ["wait", "read", "step", "wait", "read"]
