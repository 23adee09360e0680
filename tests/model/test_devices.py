"""A step on a device touches the host once in every expert layer and once where mixture-of-depths selects, and never
makes a tensor there (tests/support/devices.py)."""

import importlib
import inspect
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from moe_dist.config.losses import loss_settings
from moe_dist.losses.objective import make_objective
from moe_dist.losses.term import Context
from moe_dist.model.attention import BucketedDocuments
from moe_dist.model.moe import experts
from moe_dist.model.moe.experts import GroupedExperts
from moe_dist.model.moe.moe_layer import MoELayer
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout
from tests.support.devices import (
    HotPath,
    OnTheHost,
    PythonOperators,
    expert_layers,
    inject,
    model_on_fake_cuda,
    on_fake_cuda,
    read_counts,
    readers,
)
from tests.support.model_batches import DENSE, EXPERT_CHOICE, LORA_EXPERTS, MOMA, TOP_K, VOCAB, make_batch, model_config

LENGTHS, PADDING, GROUPS = [40, 24, 30, 26], 8, 2
DROPOUT = {"rank": 8, "alpha": 16.0, "dropout": 0.1}


def routed(**router):
    return {"type": "moe", "hidden_size": 48, "router": router}


NULL = routed(type="null_experts", num_experts=4, num_null_experts=4, top_k=3)
FULL = routed(type="top_k", num_experts=4, top_k=2, capacity_factor=0.8, pad_to_capacity=True)
MIXED = routed(
    type="modality",
    text={"type": "null_experts", "num_experts": 4, "num_null_experts": 2, "top_k": 2, "capacity_factor": 0.8},
    image={"type": "expert_choice", "num_experts": 2},
)
LORA_DROPOUT = {**LORA_EXPERTS, "experts": {"type": "lora", **DROPOUT}}
MODELS = {
    "dense": (DENSE, {}),
    "top_k": (TOP_K, {}),
    "padded": (FULL, {}),
    "null": (NULL, {}),
    "moe_8x": (EXPERT_CHOICE, {}),
    "moma": (MOMA, {}),
    "sliced": (MOMA | {"slices": 2}, {}),
    "null_in_text": (MIXED, {}),
    "lora": (LORA_EXPERTS, {"lora": {"rank": 8, "alpha": 16.0}}),
    "lora_dropout": (LORA_DROPOUT, {"lora": DROPOUT}),
    "lora_everywhere": (TOP_K | {"shared_expert": {"hidden_size": 40}}, {"lora": DROPOUT | {"targets": ["*"]}}),
    "llama": (TOP_K, {"norm": "pre", "qk_norm": False, "num_query_groups": 2, "tie_embeddings": True}),
    "recomputed": (MOMA, {"recompute": True}),
    "depth": (MOMA, {"depth": {}}),
    "depth_of_modalities": (DENSE, {"depth": {"scope": "modality"}, "recompute": True}),
}
DEVICES = ("cuda", "meta")
BATCH = make_batch(LENGTHS, padding=PADDING, num_groups=GROUPS)


@pytest.fixture
def two_ranks():
    """Make this process rank 0 of two with torch's fake process group, whose messages are empty."""
    fake_pg = importlib.import_module("torch.testing._internal.distributed.fake_pg")  # registers the backend
    dist.init_process_group("fake", rank=0, world_size=2, store=fake_pg.FakeStore())
    world = dist.group.WORLD
    yield Layout(rank=0, world=2, expert=2, ep_group=world, edp_group=world, dp_group=world)
    dist.destroy_process_group()


class Device:
    """A model and a micro-batch on a device that does not exist, with the counts that each layer reads."""

    def __init__(self, name, kind, dtype, layout=None):
        ffn, changes = MODELS[name]
        config = model_config(ffn, **changes)
        counts = read_counts(Transformer(config, VOCAB, Layout(), seed=0), BATCH.tokens_T, BATCH.info)
        self.kind, self.layout, self.mode = kind, layout or Layout(), FakeTensorMode() if kind == "cuda" else None
        with torch.device("cpu" if kind == "cuda" else kind):
            self.model = Transformer(config, VOCAB, self.layout, seed=0).to(dtype)
        if self.mode is not None:
            model_on_fake_cuda(self.model, self.mode)
        if layout is not None:
            counts = [_over_ranks(counts, layer) for counts, layer in zip(counts, expert_layers(self.model))]
            for layer in expert_layers(self.model) if self.mode is not None else ():
                layer.dispatcher.order_E = self.mode.from_tensor(layer.dispatcher.order_E)
        self.calls = inject(self.model, counts)
        self.batch = self.put(BATCH)

    def fake(self):
        stack = ExitStack()
        if self.mode is not None:
            stack.enter_context(torch.no_grad())  # autograd would ask for a real device, and abort the process
            stack.enter_context(self.mode)
            stack.enter_context(PythonOperators())
        return stack

    def put(self, value):
        return value.to("meta") if self.mode is None else on_fake_cuda(value, self.mode)

    def check(self, step):
        """Run step() on the hot path: forward on fake cuda, which has no backward pass, and both on meta."""
        with self.fake(), HotPath():
            loss = step()
            if self.mode is None:
                loss.backward()
        if self.mode is None:
            for name, parameter in self.model.named_parameters():
                assert not parameter.requires_grad or parameter.grad.shape == parameter.shape, name


def _over_ranks(counts, layer):
    """Return [sent, received] of rank 0, which receives as much as its plan sends."""
    sent = [[counts[number % len(counts)] for number in row] for row in layer.dispatcher.placement.local_experts]
    return [sent, sent[::-1]]


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """Let fake `cuda` tensors be on a Hopper GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.fixture(autouse=True)
def documents_of_real_lengths(monkeypatch):
    """Locate documents with real tensors, because their places are computed from values on the host."""
    build = BucketedDocuments.build

    def built(lengths, device):
        if device.type != "cuda":
            return build(lengths, device)
        mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        with _disable_current_modes():
            return on_fake_cuda(build(lengths, torch.device("cpu")), mode)

    monkeypatch.setattr(BucketedDocuments, "build", staticmethod(built))


def once_each(device):
    """Return the expected number of reads of each layer: one per forward pass, of which recomputation is a second."""
    model = device.model
    passes = 2 if model.config.recompute and device.kind == "meta" else 1
    return [passes] * len(readers(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_reads_once_a_layer_and_makes_nothing_on_the_host(name, kind, dtype):
    device = Device(name, kind, dtype)
    device.check(lambda: device.model(device.batch.tokens_T, device.batch.info).logits_TV.float().sum())
    assert device.calls == once_each(device)


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("name", ["top_k", "null", "moma", "sliced"])
def test_nor_where_experts_are_spread_over_ranks(name, kind, two_ranks):
    device = Device(name, kind, torch.bfloat16, two_ranks)
    device.check(lambda: device.model(device.batch.tokens_T, device.batch.info).logits_TV.float().sum())
    assert device.calls == once_each(device)


LOSSES = {"load_balance": {"weight": 0.01}, "pooled_balance": {"weight": 0.01}, "router_z": {"weight": 0.01}}


def with_neighbours(model):
    """Add two samples with three neighbours each to the micro-batch, for RoMA's loss term."""
    columns = sum(
        part.logits_VC.shape[1] for record in model(BATCH.tokens_T, BATCH.info).records for part in record.routings
    )
    sidecar = {
        "prompt_end_S": torch.tensor([10, 70]),
        "neighbour_weights_SK": torch.ones(2, 3),
        "neighbour_routing_SKR": torch.zeros(2, 3, columns),
    }
    return replace(BATCH, sidecar=sidecar)


@pytest.mark.parametrize("scope", ["group", "sequence", "global"])
@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("name", ["null", "moma"])
def test_nor_does_the_objective(name, kind, scope, two_ranks):
    device = Device(name, kind, torch.bfloat16, two_ranks)
    ffn, changes = MODELS[name]
    config = model_config(ffn, **changes)
    batch = with_neighbours(Transformer(config, VOCAB, Layout(), seed=0))
    losses = {
        **LOSSES,
        "load_balance": {"weight": 0.01, "scope": scope},
        "manifold": {"weight": 1.0, "last_layers": config.num_layers},
    }
    objective = make_objective(loss_settings(losses), Context(layout=two_ranks, group_sequences=1), step=0)
    counts = dict(zip(objective.names, objective.counts(batch)))
    placed = device.put(batch)
    device.check(lambda: objective(device.model(placed.tokens_T, placed.info), placed, counts).loss)


FAULTS = {
    "an index made on the CPU": lambda rows: torch.arange(rows.shape[1]),
    "a number made on the CPU": lambda rows: torch.tensor(1.5),
    "a copy that waits": lambda rows: torch.tensor([1.0, 2.0], device="cpu").to(rows.device),
    "a copy to the host": lambda rows: rows.to("cpu", non_blocking=True),
    "item": lambda rows: rows.sum().item(),
    "tolist": lambda rows: rows.sum(0).tolist(),
    "bool": lambda rows: bool((rows > 0).any()),
    "nonzero": lambda rows: rows.nonzero(),
    "a mask as an index": lambda rows: rows[rows.sum(1) > 0],
}
READS = ("item", "tolist", "bool", "nonzero", "a mask as an index")  # which PyTorch refuses by itself


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, kind, monkeypatch):
    device = Device("top_k", kind, torch.bfloat16)
    forward = GroupedExperts.forward

    def faulty(self, rows_RD, *arguments):
        FAULTS[fault](rows_RD)
        return forward(self, rows_RD, *arguments)

    monkeypatch.setattr(GroupedExperts, "forward", faulty)
    with pytest.raises(RuntimeError if fault in READS else (OnTheHost, RuntimeError)):
        device.check(lambda: device.model(device.batch.tokens_T, device.batch.info).logits_TV.float().sum())


def test_a_new_tensor_without_elements_is_no_fault():
    with HotPath():
        assert torch.empty(0, device="cpu").numel() == 0
        with pytest.raises(OnTheHost):
            torch.empty(1, device="cpu")


def test_a_copy_that_waits_is_found_also_where_host_work_is_allowed(monkeypatch):
    """The copy is made blocking in the only place of an expert layer that may copy from the host."""
    source = inspect.getsource(experts.grouped_matmul)
    waiting = source.replace("non_blocking=True", "non_blocking=False")
    assert waiting != source
    monkeypatch.setattr(experts, "grouped_matmul", experts.grouped_matmul)  # to be put back
    exec(waiting, experts.__dict__)
    device = Device("top_k", "meta", torch.bfloat16)
    with pytest.raises(OnTheHost, match=r"waits for a copy from \['cpu'\] to \['meta'\]"):
        device.check(lambda: device.model(device.batch.tokens_T, device.batch.info).logits_TV.float().sum())


def test_a_second_read_is_counted(monkeypatch):
    device = Device("top_k", "meta", torch.bfloat16)
    forward = MoELayer.forward

    def reads_again(self, x_TD, info):
        y_TD, record = forward(self, x_TD, info)
        self.dispatcher.split_sizes(record.plan.counts_E)
        return y_TD, record

    monkeypatch.setattr(MoELayer, "forward", reads_again)
    device.check(lambda: device.model(device.batch.tokens_T, device.batch.info).logits_TV.float().sum())
    assert device.calls == [2 * calls for calls in once_each(device)]
