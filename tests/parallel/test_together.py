"""An error on one rank is raised on all of them."""

import pytest

from moe_dist.errors import UserError
from moe_dist.parallel.together import together
from tests.distributed import run_ranks


def _fail_on(rank, failing, kind):
    try:
        with together():
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
        ("UserError", "KeyError('broken on 0') (rank 0)"),
    ]


def test_one_process_alone():
    with pytest.raises(UserError, match="broken on 0"), together():
        raise UserError("broken on 0")
