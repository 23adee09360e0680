"""The bytes that a model, its gradients and its optimizer take on one rank, computed from the model's shapes.

The model may be on the meta device, so a recipe's memory is known before anything is allocated. With offloading, some
of these bytes are in host memory. The following are not counted: activations, layers that ZeRO-3 gathers temporarily,
copies of a bucket during its reduction, and buffers of the communication library and the allocator.

Symbols: n is the number of a parameter's elements that a rank holds before ZeRO divides them. For stacked experts, only
the rank's own experts count. d is the number of ranks that hold the same elements: `edp` for experts, `dp` for all
other parameters. ZeRO divides the elements among these ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from torch import Tensor, nn

from moe_dist.config.deepspeed_section import DeepSpeedSection, SGDSection, ZeroSection
from moe_dist.core.errors import UserError
from moe_dist.core.expert_rows import is_stacked
from moe_dist.parallel.layout import Layout

MASTER_BYTES = 4  # per element of a master weight or a moment
EXPERT_GROUP, SUB_GROUP = 178_956_971, 1_000_000_000  # elements at which DeepSpeed divides a group


@dataclass(frozen=True, slots=True, kw_only=True)
class RankBytes:
    """Bytes on one rank, by purpose. ZeRO's padding, a few elements per parameter or optimizer group, is left out."""

    parameters: int  # trained parameters in the working precision, n each (ZeRO-3: n / d)
    frozen: int  # frozen parameters in the working precision, n each (ZeRO-3: n / d); they have nothing else
    buffers: int
    masters: int  # float32, n / d, also if the working precision is float32
    moments: int  # float32, n / d for each moment
    gradients: int  # the most that a step needs at once, including the bucket in which gradients are reduced

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


class _Parameter(NamedTuple):
    """A parameter as one rank holds it."""

    numel: int  # n
    ranks: int  # d
    is_expert: bool
    is_vector: bool  # or a stack of vectors, one per expert: it gets no weight decay
    is_trained: bool

    @property
    def part(self) -> int:
        """The number of elements that ZeRO assigns to a rank: n / d, rounded up."""
        return -(-self.numel // self.ranks)


def rank_bytes(model: nn.Module, layout: Layout, section: DeepSpeedSection) -> RankBytes:
    """Return the bytes of a model, its gradients and its optimizer on one rank. All ranks have the same result.

    Raises UserError if the ranks cannot divide the experts equally.

    model: the whole model, as built for a single rank, with all untrained parameters frozen.
    layout: the layout in which the model will be trained. Its process groups are not used.
    section: the ZeRO stage, the precision and the optimizer.
    """
    parameters = [_on_rank(parameter, layout) for parameter in model.parameters()]
    trained = [p for p in parameters if p.is_trained]
    kept = list(zip(parameters, _kept(parameters, section.zero_optimization), strict=True))
    width = _working_width(section)
    masters = MASTER_BYTES * sum(p.part for p in trained)
    return RankBytes(
        parameters=width * sum(numel for p, numel in kept if p.is_trained),
        frozen=width * sum(numel for p, numel in kept if not p.is_trained),
        buffers=sum(buffer.nbytes for buffer in model.buffers()),
        masters=masters,
        moments=masters * _num_moments(section),
        gradients=_gradients(trained, section) if trained else 0,
    )


def _on_rank(parameter: Tensor, layout: Layout) -> _Parameter:
    is_expert = is_stacked(parameter)
    if is_expert and len(parameter) % layout.expert:
        raise UserError(f"parallel.expert={layout.expert} does not divide the model's {len(parameter)} experts")
    return _Parameter(
        numel=parameter.numel() // (layout.expert if is_expert else 1),
        ranks=layout.edp if is_expert else layout.dp,
        is_expert=is_expert,
        is_vector=parameter.dim() - is_expert < 2,
        is_trained=parameter.requires_grad,
    )


def _working_width(section: DeepSpeedSection) -> int:
    return 2 if section.bf16.enabled else 4


def _kept(parameters: Sequence[_Parameter], zero: ZeroSection) -> Iterator[int]:
    """Yield the number of elements of each parameter that a rank keeps in the working precision.

    ZeRO-1 and ZeRO-2 do not divide the parameters. With ZeRO-3, a rank keeps only its part of each parameter. It also
    keeps gathered copies of small parameters, up to a limit on their total size.
    """
    largest = 100_000 if (given := zero.stage3_param_persistence_threshold) is None else given
    room = float("inf") if (limit := zero.stage3_model_persistence_threshold) is None else limit
    for parameter in parameters:
        if zero.stage < 3:
            yield parameter.numel
            continue
        stays = parameter.numel <= min(largest, room)
        room -= parameter.numel * stays
        yield parameter.part + parameter.numel * (stays and parameter.ranks > 1)


def _num_moments(section: DeepSpeedSection) -> int:
    optimizer = section.optimizer
    return int(optimizer.params.momentum > 0) if isinstance(optimizer, SGDSection) else 2


def _gradients(trained: Sequence[_Parameter], section: DeepSpeedSection) -> int:
    """Return the largest number of bytes that gradients take during a step. With ZeRO-1, this is an upper bound.

    ZeRO-1 accumulates all gradients of the rank. ZeRO-2 and ZeRO-3 accumulate only the gradients of the elements that
    ZeRO assigns to the rank. Gradients are reduced in a bucket. If the bucket cannot hold all gradients, the newest
    gradient takes extra memory until the bucket is reduced. Finally, the optimizer gets the gradients in float32, one
    group at a time.
    """
    zero, working = section.zero_optimization, _working_width(section)
    width = 2 if section.data_types and section.data_types.grad_accum_dtype == "bf16" else 4
    numel, part = sum(p.numel for p in trained), sum(p.part for p in trained)
    bucket = zero.bucket_elements(numel)
    is_one_bucket = bucket >= numel
    waiting = 0 if is_one_bucket else working * max(p.numel for p in trained)
    bucket *= 2 if zero.overlap_comm and zero.stage < 3 else 1
    copy = MASTER_BYTES * _largest_group(trained, zero)
    if zero.stage == 3:
        return width * (part + bucket) + max(copy, waiting)
    if zero.stage == 2 and width != working:
        return width * part + working * bucket + waiting
    if zero.stage == 2:  # the parts of two micro-batches are added
        return max(width * (2 * part + bucket) + waiting, width * part + copy)
    if width == working:
        return max(width * (numel + bucket) + waiting, width * part + copy)
    divided = sum(p.part for p in trained if p.ranks > 1)
    return width * (numel + (max(bucket, divided) if is_one_bucket else bucket + divided)) + waiting


def _largest_group(trained: Iterable[_Parameter], zero: ZeroSection) -> int:
    """Return how many elements of the optimizer's largest parameter group one rank holds.

    The optimizer has separate groups for dense and for expert parameters, each with and without weight decay. DeepSpeed
    splits large groups of expert parameters. With ZeRO-3, it splits all large groups.
    """
    largest = 0
    groups: dict[tuple[bool, bool], tuple[int, int]] = {}
    for parameter in trained:
        key = parameter.is_expert, parameter.is_vector
        numel, part = groups.get(key, (0, 0))
        if parameter.is_expert and numel + parameter.numel > EXPERT_GROUP:
            numel = part = 0
        part += parameter.part
        largest = max(largest, part)
        is_full = zero.stage == 3 and part >= (SUB_GROUP if zero.sub_group_size is None else zero.sub_group_size)
        groups[key] = numel + parameter.numel, 0 if is_full else part
    return largest
