"""An error on one rank is raised on all of them."""

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from moe_dist.core.errors import UserError
from moe_dist.parallel.agreement import raise_on_all_ranks
from tests.support.distributed import Pool, run_ranks


def _fail_on(rank, failing, kind):
    try:
        with raise_on_all_ranks():
            if rank in failing:
                raise kind(f"broken on {rank}")
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def test_every_rank_hears_of_a_user_error():
    assert run_ranks(_fail_on, 2, (), UserError) == [None, None]
    assert run_ranks(_fail_on, 2, (1,), UserError) == [
        ("UserError", "broken on 1 (rank 1)"),
        ("UserError", "broken on 1"),
    ]


def test_a_defect_keeps_its_type_where_it_happened():
    assert run_ranks(_fail_on, 2, (0,), KeyError) == [
        ("KeyError", "'broken on 0'"),
        ("PeerError", "KeyError('broken on 0') (rank 0)"),
    ]


def _open_nothing(rank):
    try:
        with raise_on_all_ranks():
            Path("/nowhere").read_text()
    except UserError as error:
        return type(error).__name__, str(error)
    return None


def test_what_the_operating_system_refuses_is_the_users_to_put_right():
    assert run_ranks(_open_nothing, 2) == [("UserError", "/nowhere: No such file or directory")] * 2


def _be_late(rank, patient, meeting):
    """The default group gives up after a second; rank 1 takes three."""
    dist.destroy_process_group()
    # Meet in a file: at the old port a rank might still find the old store.
    second = timedelta(seconds=1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=second)
    with raise_on_all_ranks(patient=patient):
        if rank == 1:
            time.sleep(3)


@pytest.fixture
def ranks():
    """Two ranks of this test's own, since it takes away their default group."""
    pool = Pool(2)
    yield pool
    pool.close()


def test_patient_ranks_wait_for_a_late_one(ranks, tmp_path):
    ranks.run(_be_late, (True, tmp_path / "meeting"))


def test_other_ranks_give_up(ranks, tmp_path):
    with pytest.raises(RuntimeError, match=r"Timed out waiting 1000ms"):
        ranks.run(_be_late, (False, tmp_path / "meeting"))


def test_one_process_alone():
    with pytest.raises(UserError, match="broken on 0"), raise_on_all_ranks():
        raise UserError("broken on 0")
