"""Python's garbage collection during training: at the same steps on every rank, never by itself, no cycle for ever."""

import gc
import weakref

import pytest
import torch

from moe_dist.config.recipe import load_config
from moe_dist.parallel import garbage
from moe_dist.parallel.garbage import EVERY, FULL, AlignedCollection
from moe_dist.training.run import Run, train
from tests.support import ROOT
from tests.support.distributed import run_ranks


class Cycle:
    def __init__(self):
        self.me = self


def cycle():
    """A weak reference to an object that only a garbage collection frees."""
    return weakref.ref(Cycle())


@pytest.mark.parametrize("automatic", [True, False])
def test_cycles_go_at_the_steps_that_are_due_and_at_no_other(automatic):
    (gc.enable if automatic else gc.disable)()
    try:
        with pytest.raises(KeyError), AlignedCollection() as collection:
            young = cycle()
            many = [[] for _ in range(100_000)]  # far more than Python's threshold
            collection.after(EVERY - 1)
            assert young() is not None and len(many) == 100_000
            collection.after(EVERY)
            assert young() is None
            old = Cycle()
            gone = weakref.ref(old)
            collection.after(EVERY), collection.after(EVERY)
            del old  # after two collections it is of the oldest generation
            collection.after(2 * EVERY)
            assert gone() is not None
            collection.after(FULL)
            assert gone() is None
            raise KeyError
        assert gc.isenabled() == automatic
    finally:
        gc.enable()


def _leave_a_cycle(rank):
    Cycle().tensor = torch.zeros(3)


def _collections(rank, overrides):
    """How many steps were done at each collection between the first step and the last, and the generation; the shapes
    of the tensors that the collections found."""
    seen, steps, tensors = [], [], []
    step, thresholds = Run.train_step, gc.get_threshold()

    def counted(run):
        if not steps:  # from here on: what was left before training was freed when it began
            gc.set_debug(gc.DEBUG_SAVEALL)
        steps.append(run.step + 1)
        return step(run)

    def note(phase, facts):
        if phase == "start" and 0 < len(steps) < 8:
            seen.append((steps[-1], facts["generation"]))
            gc.garbage.clear()
        if phase == "stop" and 0 < len(steps) < 8:
            tensors.extend(tuple(found.shape) for found in gc.garbage if isinstance(found, torch.Tensor))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "train_step", counted)
        patch.setattr(garbage, "EVERY", 2)
        patch.setattr(garbage, "FULL", 6)
        gc.callbacks.append(note)
        gc.set_threshold(10)  # as if very many objects were made
        try:
            train(load_config(ROOT / "configs" / "moma_quickstart.yaml", overrides))
        finally:
            gc.callbacks.remove(note)
            gc.set_threshold(*thresholds)
            gc.set_debug(0)
            gc.garbage.clear()
    return seen, tensors, gc.isenabled()


@pytest.mark.parametrize("recompute", [False, True])
def test_every_rank_collects_after_the_same_steps_and_no_tensor_waits_for_it(recompute, overrides, tmp_path):
    """On a GPU tensors in cycles would take up memory for many steps."""
    run_ranks(_leave_a_cycle, 2)  # the same processes may have run another test: its cycles are none of training's
    changes = [f"run.dir={tmp_path / 'run'}", f"model.recompute={str(recompute).lower()}"]
    results = run_ranks(_collections, 2, [*overrides, *changes])
    assert results == [([(2, 1), (4, 1), (6, 2)], [], True)] * 2
