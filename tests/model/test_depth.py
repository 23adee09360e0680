"""Mixture-of-depths: the whole model against plain loops, forward and backward, and tokens that skip blocks."""

from dataclasses import replace

import pytest
import torch

from moe_dist.core.batch import TEXT, TokenInfo
from moe_dist.losses.language import language_loss
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout
from tests.support import depth_reference
from tests.support.model_batches import DENSE, EXPERT_CHOICE, MOMA, TOP_K, VOCAB, make_batch, model_config

SCOPES = ("group", "modality", "sequence")
FFNS = {"dense": DENSE, "top_k": TOP_K, "moe_8x": EXPERT_CHOICE, "moma": MOMA}


def build(ffn, scope="group", **changes) -> Transformer:
    depth = {"scope": scope, "capacity": changes.pop("capacity", 0.25), "every": changes.pop("every", 2)}
    return Transformer(model_config(ffn, depth=depth, **changes), VOCAB, Layout(), seed=1).double()


def batch_of(kind):
    """Make a batch of two selection groups of two packed sequences each."""
    batch = make_batch([9, 15, 12, 5, 4, 15], num_groups=2, num_sequences=4, padding=4, seed=7)
    if kind == "repeated":  # the first layer cannot tell tokens apart: all tie
        return replace(batch, tokens_T=torch.zeros_like(batch.tokens_T))
    if kind == "no_images_in_a_group":
        modality_T = torch.where(torch.arange(64) < 32, TEXT, batch.info.modality_T)
        return replace(batch, info=rebuilt(batch.info, modality_T=modality_T))
    if kind == "tiny":  # groups of three and one valid tokens: fewer than 1 / c_d
        valid_T = torch.zeros(64, dtype=torch.bool).index_fill(0, torch.tensor([3, 11, 20, 50]), True)
        return replace(batch, info=rebuilt(batch.info, valid_T=valid_T), loss_mask_T=valid_T)
    return batch


def rebuilt(info, **changes) -> TokenInfo:
    facts = {name: getattr(info, name) for name in ("modality_T", "valid_T", "position_T", "token_id_T")} | changes
    sizes = {"num_groups": info.num_groups, "num_sequences": len(info.sequence_counts)}
    return TokenInfo.build(**facts, **sizes, document_lengths=info.document_lengths)


def gradients(model, batch):
    output = model(batch.tokens_T, batch.info)
    loss = language_loss(output.logits_TV, batch).total
    loss.backward()
    return output, loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def oracle(model, batch):
    """Return the loss, the admitted tokens by layer and the gradients by name."""
    parameters = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    logits, admissions = depth_reference.transformer(batch, parameters, model)
    probs = torch.softmax(logits, dim=1)[torch.arange(len(logits)), batch.targets_T]
    loss = -probs.log()[batch.loss_mask_T].sum()
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    zero = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), found)]
    return loss.detach(), admissions, dict(zip(parameters, zero))


CASES = [
    *((kind, "moma", scope) for kind in ("mixed", "repeated") for scope in SCOPES),
    *((kind, "moma", "modality") for kind in ("no_images_in_a_group", "tiny")),
    *(("tiny", ffn, "group") for ffn in FFNS),
    *(("mixed", ffn, "group") for ffn in ("dense", "top_k", "moe_8x")),
]


@pytest.mark.parametrize(("kind", "ffn", "scope"), CASES)
def test_model_equals_the_loops_in_float64(kind, ffn, scope):
    model, batch = build(FFNS[ffn], scope), batch_of(kind)
    output, loss, ours = gradients(model, batch)
    expected, admissions, theirs = oracle(model, batch)
    assert [depth.layer for depth in output.depths] == [0, 2] == list(admissions)
    for depth in output.depths:
        routing = depth.routing
        assert set(routing.token_V[routing.kept_VE[:, 0]].tolist()) == admissions[depth.layer]
        assert sum(depth.document_lengths) == len(admissions[depth.layer])
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    for name, gradient in ours.items():
        assert gradient.any() or kind == "tiny", name
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_each_scope_admits_its_share():
    batch = batch_of("no_images_in_a_group")
    info = batch.info

    def counts(scope, of):
        depth = build(MOMA, scope)(batch.tokens_T, info).depths[0].routing
        kept = depth.token_V[depth.kept_VE[:, 0]]
        return torch.bincount(of[kept], minlength=4).tolist()

    group_T, sequence_T = torch.arange(64) // 32, torch.arange(64) // 16
    assert counts("group", group_T) == [8, 7, 0, 0]  # of 32 and 28 valid tokens
    assert counts("sequence", sequence_T) == [4, 4, 4, 3]
    images = sum(info.modality_counts[1])
    assert 8 < images < 20 and info.modality_counts[1][0] == 0
    kinds_T = group_T + 2 * info.modality_T
    text = [8, -(-info.modality_counts[0][1] // 4)]
    assert counts("modality", kinds_T) == [*text, 0, -(-images // 4)]


def test_a_token_that_is_not_admitted_passes_unchanged_and_an_admitted_one_by_its_gate():
    """One block is observed through the logits of a model whose norm and output are known."""
    model, batch = build(DENSE, num_layers=1), batch_of("mixed")
    output = model(batch.tokens_T, batch.info)
    routing = output.depths[0].routing
    untouched = model.output(model.norm(model.embedding(batch.tokens_T)))
    same_T = (output.logits_TV - untouched).abs().amax(1) < 1e-12
    passed_T = torch.ones(64, dtype=torch.bool)
    passed_T[routing.token_V[routing.kept_VE[:, 0]]] = False
    assert torch.equal(same_T, passed_T) and passed_T.sum() == 64 - 15


def test_everything_admitted_with_open_gates_is_the_model_without_it():
    model, plain = build(MOMA, capacity=1.0), Transformer(model_config(MOMA), VOCAB, Layout(), seed=1).double()
    for depth in model.depth.values():
        depth.router.gate.register_forward_hook(lambda module, args, logits: torch.full_like(logits, 60))
    batch = batch_of("mixed")
    ours, theirs = (m(batch.tokens_T, batch.info).logits_TV[batch.info.valid_T] for m in (model, plain))
    torch.testing.assert_close(ours, theirs)


def test_a_block_keeps_its_names_and_initial_values_within_mixture_of_depths():
    """A stage with mixture-of-depths can therefore start from a checkpoint without it and read older checkpoints."""
    plain = Transformer(model_config(MOMA), VOCAB, Layout(), seed=1).double()
    with_depth = dict(build(MOMA).named_parameters())
    gates = {f"depth.{layer}.router.gate.weight" for layer in (0, 2)}
    assert set(with_depth) == gates | set(dict(plain.named_parameters()))
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, with_depth[name]), name


def test_records_number_tokens_as_the_batch_does():
    """In the records that losses and telemetry read, every token of an expert was admitted by the layer."""
    batch = batch_of("mixed")
    output = build(MOMA)(batch.tokens_T, batch.info)
    for depth in output.depths:
        record = output.records[depth.layer]
        admitted_T = torch.zeros(64, dtype=torch.bool)
        admitted_T[depth.routing.token_V[depth.routing.kept_VE[:, 0]]] = True
        seen_V = torch.cat([part.token_V for part in record.routings])
        assert torch.equal(seen_V.sort().values, admitted_T.nonzero()[:, 0])
        for index, part in enumerate(record.routings):
            assert (batch.info.modality_T[part.token_V] == index).all()
        assert torch.equal(record.experts_of_T(64), torch.bincount(record.plan.token_ids_N, minlength=64))


def test_static_shapes_hold_as_many_as_any_group_admits():
    """If one group admits seven tokens and the other one, pad_to_capacity gives the same loss as no padding."""
    router = {"type": "top_k", "num_experts": 4, "top_k": 2, "capacity_factor": 1.0}
    valid_T = torch.zeros(64, dtype=torch.bool).index_fill(0, torch.tensor([*range(25), 50]), True)
    losses = []
    for pad in (False, True):
        model = build({**TOP_K, "router": router | {"pad_to_capacity": pad}})
        batch = batch_of("mixed")
        batch = replace(batch, info=rebuilt(batch.info, valid_T=valid_T), loss_mask_T=valid_T)
        losses.append(gradients(model, batch)[1])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)


def test_one_read_of_the_device_for_each_layer():
    model, batch, calls = build(DENSE), batch_of("mixed"), []
    for depth in model.depth.values():
        depth.split_sizes = lambda counts: calls.append(counts.shape) or counts.tolist()
    model(batch.tokens_T, batch.info)
    assert calls == [(2 * 2 + 4 + 7,)] * 2  # modalities by groups, sequences, documents
