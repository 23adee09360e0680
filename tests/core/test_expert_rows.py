"""Rows of stacked expert parameters: their names, and how a flat range is cut into them."""

import torch

from moe_dist.core.expert_rows import (
    expert_ids,
    is_stacked,
    named_rows,
    row_name,
    rows_between,
    set_expert_ids,
    split_row_name,
)


def stacked(*ids, shape=(2, 3)):
    parameter = torch.arange(len(ids) * 6).view(len(ids), *shape)
    set_expert_ids(parameter, ids)
    return parameter


def test_a_parameter_says_whose_rows_it_holds():
    assert expert_ids(stacked(5, 2)) == (5, 2) and is_stacked(stacked(5))
    assert expert_ids(torch.zeros(2)) is None and not is_stacked(torch.zeros(2))


def test_a_row_has_the_same_name_on_whichever_rank_it_is():
    rows = named_rows("layers.0.down", stacked(5, 2))
    assert list(rows) == ["layers.0.down[5]", "layers.0.down[2]"] and rows["layers.0.down[2]"][0, 0] == 6
    assert list(named_rows("norm.weight", torch.zeros(2))) == ["norm.weight"]
    for name in (("layers.0.down", 12), ("norm.weight", None)):
        assert split_row_name(row_name(*name) if name[1] is not None else name[0]) == name


def test_a_flat_range_is_cut_at_the_rows():
    parameter = stacked(4, 0, 7)
    flat = parameter.flatten()
    for start in range(19):
        for stop in range(start, 19):
            values, found = flat[start:stop], {}
            for expert, first, part in rows_between((4, 0, 7), parameter.shape, start, stop):
                found[expert] = (first, values[part].tolist())
            expected = {}
            for number in range(start, stop):
                expert = (4, 0, 7)[number // 6]
                expected.setdefault(expert, (number % 6, []))[1].append(number)
            assert found == expected
