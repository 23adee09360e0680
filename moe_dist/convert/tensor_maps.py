"""Exact conversion between the tensors of Hugging Face's Llama and Mixtral ("theirs") and our parameters ("ours").

Shape suffixes: V vocabulary, D model width, F feed-forward width, E experts, H heads, G query groups, d size per head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_dist.config.model_section import DenseFFN, ModelConfig
from moe_dist.config.routers import TopKSettings
from moe_dist.core.errors import UserError
from moe_dist.core.expert_rows import row_name
from moe_dist.core.tensor_files import LazyTensor
from moe_dist.model.site import block_name

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorMapping:
    """The conversion between one of our parameters and the Hugging Face tensors that make it up."""

    name: str
    shape: Shape
    sources: Mapping[str, Shape]  # by their name
    join: Callable[..., Tensor] = lambda tensor: tensor  # theirs, in order -> ours
    split: Callable[[Tensor], Sequence[Tensor]] = lambda tensor: (tensor,)  # the inverse of join


def tensor_mappings(model: ModelConfig, vocab_size: int) -> Iterator[TensorMapping]:
    """Yield a mapping for every parameter of the model.

    Heads need no reordering: Hugging Face's rotary embedding and ours both pair the first half of a head with the
    second.
    """
    D = model.hidden_size
    matrix, vector = (vocab_size, D), (D,)
    yield TensorMapping("embedding.weight", matrix, {"model.embed_tokens.weight": matrix})
    for layer in range(model.num_layers):
        ours, theirs = block_name(layer), f"model.layers.{layer}"
        yield from _attention(model, f"{ours}.attention.core", f"{theirs}.self_attn")
        yield TensorMapping(f"{ours}.attention_norm.weight", vector, {f"{theirs}.input_layernorm.weight": vector})
        if isinstance(model.ffn, DenseFFN):
            yield from _dense(D, model.ffn.hidden_size, f"{ours}.ffn", f"{theirs}.mlp")
        else:
            assert isinstance(model.ffn.router, TopKSettings)
            number = model.ffn.router.num_experts
            yield from _experts(D, model.ffn.hidden_size, number, f"{ours}.ffn", f"{theirs}.block_sparse_moe")
        yield TensorMapping(f"{ours}.ffn_norm.weight", vector, {f"{theirs}.post_attention_layernorm.weight": vector})
    yield TensorMapping("norm.weight", vector, {"model.norm.weight": vector})
    if not model.tie_embeddings:
        yield TensorMapping("output.weight", matrix, {"lm_head.weight": matrix})


def _attention(model: ModelConfig, ours: str, theirs: str) -> Iterator[TensorMapping]:
    """Yield the mappings for an attention layer.

    Hugging Face has separate projections for queries, keys and values. We have one fused projection, whose rows are
    ordered by query group, as in Megatron. The rows of a group are the queries of its heads, then its key, then its
    value.
    """
    D, H, G, d = model.hidden_size, model.num_heads, model.query_groups, model.size_per_head

    def join(*projections: Tensor) -> Tensor:
        return torch.cat([x.unflatten(0, (G, -1)) for x in projections], dim=1).flatten(0, 1)

    def split(qkv: Tensor) -> list[Tensor]:
        return [x.flatten(0, 1) for x in qkv.unflatten(0, (G, -1)).split([H // G * d, d, d], dim=1)]

    qkv = {f"{theirs}.{key}_proj.weight": (n * d, D) for key, n in (("q", H), ("k", G), ("v", G))}
    yield TensorMapping(f"{ours}.linear_qkv.weight", ((H + 2 * G) * d, D), qkv, join, split)
    yield TensorMapping(f"{ours}.linear_proj.weight", (D, H * d), {f"{theirs}.o_proj.weight": (D, H * d)})


def _dense(D: int, F: int, ours: str, theirs: str) -> Iterator[TensorMapping]:
    gate_up: dict[str, Shape] = {f"{theirs}.{key}_proj.weight": (F, D) for key in ("gate", "up")}
    yield TensorMapping(
        f"{ours}.gate_up.weight", (2 * F, D), gate_up, lambda *two: torch.cat(two), lambda both: both.chunk(2)
    )
    yield TensorMapping(f"{ours}.down.weight", (D, F), {f"{theirs}.down_proj.weight": (D, F)})


def _experts(D: int, F: int, E: int, ours: str, theirs: str) -> Iterator[TensorMapping]:
    """Yield the mappings for a router and its experts.

    The experts' weights are transposed, because our experts compute x W and Hugging Face's compute x W^T.
    """
    yield TensorMapping(f"{ours}.router.gate.weight", (E, D), {f"{theirs}.gate.weight": (E, D)})
    for expert in range(E):
        of_expert = f"{theirs}.experts.{expert}"
        gate_up: dict[str, Shape] = {f"{of_expert}.{key}.weight": (F, D) for key in ("w1", "w3")}
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
            {f"{of_expert}.w2.weight": (D, F)},
            lambda down: down.T,
            lambda down: (down.T,),
        )


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
