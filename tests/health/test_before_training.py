"""Ranks that differ, and a network that changes what it carries, are named with their host before training."""

import os

import pytest
import torch
import torch.distributed as dist

from moe_dist.config.recipe import load_config
from moe_dist.core.errors import UserError
from moe_dist.health import before_training as health
from moe_dist.health.before_training import check_health
from tests.support.distributed import run_ranks
from tests.support.launching import MOMA

CPU = torch.device("cpu")


def _check(rank, host_of, spoil):
    """The summary, or the sentence; `spoil` names what is different on rank 1."""
    os.environ["SLURMD_NODENAME"] = host_of[rank]
    kept = {name: getattr(health, name) for name in ("_version", "_digest")}
    device_count, all_to_all = torch.cpu.device_count, dist.all_to_all_single
    overrides = []
    if rank == 1:
        if spoil == "version":
            health._version = lambda package: "0.1" if package == "deepspeed" else kept["_version"](package)
        elif spoil == "code":
            health._digest = lambda *parts: "other" if len(parts) > 1 else kept["_digest"](*parts)
        elif spoil == "config":
            overrides = ["seed=1"]
        elif spoil == "devices":
            torch.cpu.device_count = lambda: 5
        elif spoil == "network":

            def flip(received, sent, *args, **kwargs):
                all_to_all(received, sent, *args, **kwargs)
                received[3] ^= 1  # within the block of rank 0

            dist.all_to_all_single = flip
    try:
        found = check_health(load_config(MOMA, overrides), CPU)
        return found.summary(), found.to_json()
    except UserError as error:
        return str(error), None
    finally:
        for name, value in kept.items():
            setattr(health, name, value)
        torch.cpu.device_count, dist.all_to_all_single = device_count, all_to_all
        del os.environ["SLURMD_NODENAME"]


def test_healthy_ranks_say_where_they_are():
    hosts = ["n1", "n1", "n2", "n2"]
    summary, found = run_ranks(_check, 4, hosts, None)[0]
    assert "n1: ranks 0-1 on cpu\nn2: ranks 2-3 on cpu\n" in summary
    assert f"torch {torch.__version__}" in summary and "all-to-all correct" in summary
    assert [rank["host"] for rank in found["ranks"]] == hosts
    assert len(found["bytes_per_second"]) == 4 and min(found["bytes_per_second"]) > 0


def test_the_version_of_torch_names_its_build(monkeypatch):
    """The installed package's metadata may say 2.11.0 for a build that calls itself 2.11.0+cu130."""
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    assert health.report(load_config(MOMA), CPU).versions["torch"] == "2.11.0+cu130"


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        ("version", "deepspeed is 0.1 on n2 (rank 1), but "),
        ("code", "code revision is other on n2 (rank 1), but "),
        ("config", "resolved recipe is "),
        ("devices", "number of devices is 5 on n2 (rank 1), but "),
        ("network", "rank 1 on n2 received other values than rank 0 on n1 sent"),
    ],
)
def test_what_does_not_match_stops_every_rank(spoil, sentence):
    (first, _), (second, _), (third, _) = run_ranks(_check, 3, ["n1", "n2", "n3"], spoil)
    assert first == second == third
    assert sentence in first and "n2" in first and "(rank 2)" not in first


def test_alone():
    found = check_health(load_config(MOMA), CPU)
    assert len(found.ranks) == 1 and found.bytes_per_second == ()
    assert "rank 0 on cpu" in found.summary()
