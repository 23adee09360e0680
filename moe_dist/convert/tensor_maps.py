"""Exact conversion between the tensors of Hugging Face's models ("theirs") and our parameters ("ours").

Shape suffixes: V vocabulary, D model width, F feed-forward width, E experts, H heads, G query groups, d size per head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.config.model_section import ModelConfig, MoEFFN
from moe_dist.config.routers import TopKSettings
from moe_dist.core.errors import UserError
from moe_dist.core.expert_rows import row_name
from moe_dist.core.tensor_files import LazyTensor

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorMapping:
    """The conversion between one of our parameters and the Hugging Face tensors that make it up."""

    name: str
    shape: Shape
    sources: Mapping[str, Shape]  # by their name
    join: Callable[..., Tensor] = lambda tensor: tensor  # theirs, in order -> ours
    split: Callable[[Tensor], Sequence[Tensor]] = lambda tensor: (tensor,)  # the inverse of join


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertNames:
    """The names of an expert layer's tensors in a Hugging Face model, relative to the name of the layer."""

    block: str = "mlp"  # holds the router's `gate`, and `experts`
    gate: str = "gate_proj"  # the three matrices of an expert
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_expert"  # its gate, if it has one, is called `shared_expert_gate`


def attention_mappings(model: ModelConfig, ours: str, theirs: str) -> Iterator[TensorMapping]:
    """Yield the mappings for an attention layer. Hugging Face has three projections; we have one fused projection.

    As in Megatron, the rows of the fused projection, and of its bias, are ordered by query group. The rows of a group
    are the queries of its heads, then its key, then its value.
    """
    D, H, G, d = model.hidden_size, model.num_heads, model.query_groups, model.size_per_head

    def join(*projections: Tensor) -> Tensor:
        return torch.cat([x.unflatten(0, (G, -1)) for x in projections], dim=1).flatten(0, 1)

    def split(qkv: Tensor) -> list[Tensor]:
        return [x.flatten(0, 1) for x in qkv.unflatten(0, (G, -1)).split([H // G * d, d, d], dim=1)]

    rows = {"q": H * d, "k": G * d, "v": G * d}
    kinds: dict[str, tuple[int, ...]] = {"weight": (D,)} | ({"bias": ()} if model.attention_bias != "none" else {})
    for kind, columns in kinds.items():
        qkv: dict[str, Shape] = {f"{theirs}.{key}_proj.{kind}": (number, *columns) for key, number in rows.items()}
        yield TensorMapping(f"{ours}.linear_qkv.{kind}", ((H + 2 * G) * d, *columns), qkv, join, split)
    output: dict[str, Shape] = {"weight": (D, H * d)} | ({"bias": (D,)} if model.attention_bias == "all" else {})
    for kind, shape in output.items():
        yield TensorMapping(f"{ours}.linear_proj.{kind}", shape, {f"{theirs}.o_proj.{kind}": shape})
    if model.qk_norm != "none":
        for key, heads in (("q", H), ("k", G)):
            shape = (heads * d if model.qk_norm == "rms_norm_full" else d,)
            yield TensorMapping(f"{ours}.{key}_layernorm.weight", shape, {f"{theirs}.{key}_norm.weight": shape})


def dense_mappings(D: int, F: int, ours: str, theirs: str, *, bias: bool = False) -> Iterator[TensorMapping]:
    """Yield the mappings for a SwiGLU feed-forward part. bias: whether its three projections have biases."""
    for kind, columns, rows in (("weight", (D,), (D, F)), ("bias", (), (D,))) if bias else (("weight", (D,), (D, F)),):
        gate_up: dict[str, Shape] = {f"{theirs}.{key}_proj.{kind}": (F, *columns) for key in ("gate", "up")}
        shape = (2 * F, *columns)
        yield TensorMapping(
            f"{ours}.gate_up.{kind}", shape, gate_up, lambda *two: torch.cat(two), lambda both: both.chunk(2)
        )
        yield TensorMapping(f"{ours}.down.{kind}", rows, {f"{theirs}.down_proj.{kind}": rows})


def expert_mappings(D: int, ffn: MoEFFN, ours: str, layer: str, names: ExpertNames) -> Iterator[TensorMapping]:
    """Yield the mappings for a router, its experts and the shared expert. layer: Hugging Face's name of the layer.

    The experts' weights are transposed, because our experts compute x W and Hugging Face's compute x W^T.
    """
    assert isinstance(ffn.router, TopKSettings)
    E, F, theirs = ffn.router.num_experts, ffn.hidden_size, f"{layer}.{names.block}"
    yield TensorMapping(f"{ours}.router.gate.weight", (E, D), {f"{theirs}.gate.weight": (E, D)})
    for expert in range(E):
        of_expert = f"{theirs}.experts.{expert}"
        gate_up: dict[str, Shape] = {f"{of_expert}.{key}.weight": (F, D) for key in (names.gate, names.up)}
        yield TensorMapping(
            row_name(f"{ours}.experts.gate_up", expert),
            (D, 2 * F),
            gate_up,
            lambda *two: torch.cat(two).T,
            lambda both: both.T.chunk(2),
        )
        yield TensorMapping(
            row_name(f"{ours}.experts.down", expert),
            (F, D),
            {f"{of_expert}.{names.down}.weight": (D, F)},
            lambda down: down.T,
            lambda down: (down.T,),
        )
    if (shared := ffn.shared_expert) is not None:
        yield from dense_mappings(D, shared.hidden_size, f"{ours}.shared_expert.ffn", f"{theirs}.{names.shared}")
        if shared.gate:
            gate = f"{theirs}.shared_expert_gate.weight"
            yield TensorMapping(f"{ours}.shared_expert.gate.weight", (1, D), {gate: (1, D)})


def from_theirs(
    of_model: Iterable[TensorMapping], source: Mapping[str, LazyTensor], where: str
) -> dict[str, LazyTensor]:
    """Convert Hugging Face tensors to our parameters in float32.

    Each tensor is read and converted only when it is used. where: the path of the Hugging Face folder, for error
    messages. Raises UserError if a tensor is missing or unexpected, or has the wrong shape or a non-float dtype.
    """
    ours = list(of_model)
    wanted = {name: shape for part in ours for name, shape in part.sources.items()}
    # Old conversions also stored the rotary frequencies, which follow from rope_theta.
    source = {name: tensor for name, tensor in source.items() if not name.endswith(".rotary_emb.inv_freq")}
    _check(source, wanted, where)

    def reader(part: TensorMapping) -> Callable[[], Tensor]:
        return lambda: part.join(*(source[name].read().float() for name in part.sources))

    return {part.name: LazyTensor(part.shape, torch.float32, reader(part)) for part in ours}


def to_theirs(
    of_model: Iterable[TensorMapping], stored: Mapping[str, LazyTensor], dtype: torch.dtype, where: str
) -> dict[str, LazyTensor]:
    """Convert our parameters to Hugging Face tensors in `dtype`.

    Each tensor is read and converted only when it is used. A parameter that becomes several tensors is read once for
    each of them, so only one parameter is in memory at a time. where: the path of the checkpoint, for error messages.
    Raises UserError if a parameter is missing or unexpected, or has the wrong shape or a non-float dtype.
    """
    ours = list(of_model)
    _check(stored, {part.name: part.shape for part in ours}, where)

    def reader(part: TensorMapping, place: int) -> Callable[[], Tensor]:
        return lambda: part.split(stored[part.name].read())[place].to(dtype)

    return {
        name: LazyTensor(shape, dtype, reader(part, place))
        for part in ours
        for place, (name, shape) in enumerate(part.sources.items())
    }


def _check(source: Mapping[str, LazyTensor], wanted: Mapping[str, Shape], where: str) -> None:
    missing = [name for name in wanted if name not in source]
    surplus = [name for name in source if name not in wanted]
    for problem, names in (("lacks", missing), ("has no place in its configuration for", surplus)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"{where} {problem} the tensor '{names[0]}'{more}")
    for name, shape in wanted.items():
        if source[name].shape != shape:
            found = list(source[name].shape)
            raise UserError(
                f"{where}: the tensor '{name}' has the shape {found}, its configuration needs {list(shape)}"
            )
        if not source[name].dtype.is_floating_point:
            raise UserError(f"{where}: the tensor '{name}' holds {source[name].dtype}, not floating-point numbers")
