"""TokenInfo's derived indices, against plain loops."""

import pytest
import torch

from moe_dist.core.batch import IMAGE, MODALITIES, TEXT, Batch, TokenInfo


def make_info(num_groups=3, group_tokens=20, seed=0, num_sequences=None, documents=None):
    generator = torch.Generator().manual_seed(seed)
    tokens = num_groups * group_tokens
    return TokenInfo.build(
        modality_T=torch.randint(2, (tokens,), generator=generator),
        valid_T=torch.rand(tokens, generator=generator) < 0.7,
        position_T=torch.zeros(tokens, dtype=torch.int64),
        token_id_T=torch.arange(tokens),
        document_lengths=documents or [group_tokens] * num_groups,
        num_groups=num_groups,
        num_sequences=num_sequences,
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
            modality_T=info.modality_T,
            valid_T=info.valid_T,
            position_T=info.position_T,
            token_id_T=info.token_id_T,
            document_lengths=[20] * 3,
            num_groups=7,
        )


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_selection_has_what_its_tokens_had(share):
    """Against loops; one read brings all counts to the host, and a document that loses all keeps its number."""
    info, reads = make_info(num_sequences=6, documents=[7, 13, 20, 5, 1, 14]), []
    keep_T = info.valid_T & (torch.rand(60, generator=torch.Generator().manual_seed(3)) < share)
    token_K, selected = info.select(keep_T, lambda counts: reads.append(1) or counts.tolist())
    kept = [t for t in range(60) if keep_T[t]]
    assert token_K.tolist() == kept and len(reads) == 1 and bool(selected.valid_T.all())
    for name in ("modality_T", "document_T", "position_T", "token_id_T"):
        assert getattr(selected, name).tolist() == [int(getattr(info, name)[t]) for t in kept], name
    assert list(selected.document_lengths) == [sum(int(info.document_T[t]) == d for t in kept) for d in range(6)]
    assert list(selected.sequence_counts) == [sum(t // 10 == s for t in kept) for s in range(6)]
    for modality in (TEXT, IMAGE):
        for group, members in enumerate(selected.members(modality)):
            expected = [t for t in kept if t // 20 == group and int(info.modality_T[t]) == modality]
            assert [kept[k] for k in members.tolist()] == expected
            assert selected.modality_counts[modality][group] == len(expected)
    token_V, sizes = selected.competing("sequence")
    for sequence, members in enumerate(token_V.split(sizes)):
        assert [kept[k] for k in members.tolist()] == [t for t in kept if t // 10 == sequence]
    again_K, twice = selected.select(torch.ones(len(kept), dtype=torch.bool), torch.Tensor.tolist)
    assert again_K.tolist() == list(range(len(kept))) and twice.modality_counts == selected.modality_counts


def test_every_tensor_is_copied_to_a_device_without_waiting(monkeypatch):
    """And pinned, the sidecar's and those of the batch's TokenInfo too; what is derived is not copied."""
    info, calls = make_info(), []
    info.competing("sequence")
    zeros = torch.zeros(info.num_tokens, dtype=torch.int64)
    batch = Batch(
        tokens_T=zeros,
        targets_T=zeros,
        loss_mask_T=info.valid_T,
        target_modality_T=zeros,
        info=info,
        sidecar={"domain_T": zeros},
    )
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *args, **kwargs: calls.append((args, kwargs)) or tensor)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: calls.append("pinned") or tensor)
    for made in (batch.to("cuda"), batch.pinned()):
        assert made.info.document_lengths == info.document_lengths and "_made" not in made.info.__dict__
    assert calls == [(("cuda",), {"non_blocking": True})] * 11 + ["pinned"] * 11
    assert info.to("cuda") is not info and calls[22:] == [(("cuda",), {"non_blocking": True})] * 6
