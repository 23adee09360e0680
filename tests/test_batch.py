"""TokenInfo's derived indices, against plain loops."""

import pytest
import torch

from moe_dist.batch import IMAGE, MODALITIES, TEXT, TokenInfo


def make_info(num_groups=3, group_tokens=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = num_groups * group_tokens
    return TokenInfo.build(
        modality_T=torch.randint(2, (tokens,), generator=generator),
        valid_T=torch.rand(tokens, generator=generator) < 0.7,
        position_T=torch.zeros(tokens, dtype=torch.int64),
        token_id_T=torch.arange(tokens),
        document_lengths=[group_tokens] * num_groups,
        num_groups=num_groups,
    )


def test_members_are_the_valid_tokens_of_each_group():
    info = make_info()
    for modality in (TEXT, IMAGE, None):
        for group, members in enumerate(info.members(modality)):
            expected = [
                t
                for t in range(group * 20, group * 20 + 20)
                if info.valid_T[t] and modality in (None, int(info.modality_T[t]))
            ]
            assert sorted(members.tolist()) == expected
            if modality is not None:
                assert info.modality_counts[modality][group] == len(expected)
    assert len(info.modality_counts) == len(MODALITIES)


def test_documents_and_groups_must_cover_the_tokens():
    info = make_info()
    assert info.document_T.tolist() == [0] * 20 + [1] * 20 + [2] * 20
    with pytest.raises(ValueError, match="60 tokens do not form 7 groups"):
        TokenInfo.build(
            modality_T=info.modality_T, valid_T=info.valid_T, position_T=info.position_T, token_id_T=info.token_id_T,
            document_lengths=[20] * 3, num_groups=7,
        )
