"""The bytes that a model, its gradients and its optimizer take on one rank, computed from the model's shapes.

The model may be on the meta device, so a recipe's memory is known before anything is allocated. Not counted: the
activations; with ZeRO-3, the layers that are gathered for the moment; copies of a bucket while it is reduced; the
buffers of the communication library and of the allocator. With offloading, part of these bytes is host memory.

Symbols: n is the number of elements of a parameter on a rank. A stacked expert parameter has the rows of the rank's
experts only. d is the number of ranks with the same elements, among which ZeRO divides them: dp, or edp for experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from torch import Tensor, nn

from moe_dist.config.deepspeed_section import DeepSpeedSection, SGDSection
from moe_dist.core.expert_rows import is_stacked
from moe_dist.parallel.layout import Layout

MASTER_BYTES = 4  # per element of a master weight or a moment


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


def rank_bytes(model: nn.Module, layout: Layout, section: DeepSpeedSection) -> RankBytes:
    """Return the bytes of a model and its optimizer on one rank.

    model: built for `layout`, not yet in an engine, with the parameters frozen that are not trained (freeze_others).
    layout: its process groups are not used. section: the ZeRO stage, the precision and the optimizer.
    """
    zero, width = section.zero_optimization, 2 if section.bf16.enabled else 4
    trained = [p for p in model.parameters() if p.requires_grad]
    parts = sum(_part(p, layout) for p in trained)
    persistent = _persistent(model, section) if zero.stage == 3 else None
    return RankBytes(
        parameters=width * _working(trained, layout, persistent),
        frozen=width * _working((p for p in model.parameters() if not p.requires_grad), layout, persistent),
        buffers=sum(buffer.nbytes for buffer in model.buffers()),
        masters=MASTER_BYTES * parts,
        moments=MASTER_BYTES * parts * _num_moments(section),
        gradients=_gradients(trained, layout, section),
    )


def _part(parameter: Tensor, layout: Layout) -> int:
    """Return n / d of a parameter, rounded up."""
    return -(-parameter.numel() // _copies(parameter, layout))


def _copies(parameter: Tensor, layout: Layout) -> int:
    """Return d of a parameter."""
    return layout.edp if is_stacked(parameter) else layout.dp


def _working(parameters: Iterable[Tensor], layout: Layout, persistent: set[int] | None) -> int:
    """Return the number of elements that a rank keeps of the working copies of some parameters.

    persistent: the ids of the parameters that ZeRO-3 keeps gathered beside their parts; None: ZeRO-1 or 2.
    """
    if persistent is None:
        return sum(p.numel() for p in parameters)
    return sum(_part(p, layout) + p.numel() * (id(p) in persistent and _copies(p, layout) > 1) for p in parameters)


def _persistent(model: nn.Module, section: DeepSpeedSection) -> set[int]:
    """Return the ids of the parameters that ZeRO-3 keeps gathered: the small ones, up to a sum of their sizes."""
    zero = section.zero_optimization
    largest = 100_000 if (given := zero.stage3_param_persistence_threshold) is None else given
    room = float("inf") if (limit := zero.stage3_model_persistence_threshold) is None else limit
    found: set[int] = set()
    for parameter in model.parameters():
        if parameter.numel() <= min(largest, room):
            found.add(id(parameter))
            room -= parameter.numel()
    return found


def _num_moments(section: DeepSpeedSection) -> int:
    optimizer = section.optimizer
    return int(optimizer.params.momentum > 0) if isinstance(optimizer, SGDSection) else 2


def _gradients(trained: Sequence[Tensor], layout: Layout, section: DeepSpeedSection) -> int:
    """Return the most bytes of gradients that a step needs at once. With ZeRO-1, this is an upper bound.

    ZeRO-1 accumulates all gradients of the rank, ZeRO-2 and 3 those of its parts. They are reduced in a bucket. If not
    all fit into it, the gradient computed last waits outside. In the end, the optimizer gets float32 gradients of one
    group at a time.
    """
    zero, working = section.zero_optimization, 2 if section.bf16.enabled else 4
    width = 2 if section.data_types and section.data_types.grad_accum_dtype == "bf16" else 4
    numel, part = (sum(sizes) for sizes in zip(*((p.numel(), _part(p, layout)) for p in trained)))
    bucket = zero.bucket_elements(numel)
    waiting = working * max(p.numel() for p in trained) * (bucket < numel)
    bucket *= 2 if zero.overlap_comm and zero.stage < 3 else 1
    copy = MASTER_BYTES * max(_groups(trained, layout).values())
    if zero.stage == 3:
        return width * (part + bucket) + max(copy, waiting)
    if zero.stage == 2 and width != working:
        return width * part + working * bucket + waiting
    if zero.stage == 2:  # the parts of two micro-batches are added
        return max(width * (2 * part + bucket) + waiting, width * part + copy)
    if width == working:
        return max(width * (numel + bucket) + waiting, width * part + copy)
    divided = sum(_part(p, layout) for p in trained if _copies(p, layout) > 1)
    return width * (numel + (max(bucket, divided) if bucket >= numel else bucket + divided)) + waiting


def _groups(trained: Iterable[Tensor], layout: Layout) -> Counter[tuple[bool, bool]]:
    """Return the number of elements of the optimizer's groups: dense or expert parameters, with or without decay."""
    groups = Counter[tuple[bool, bool]]()
    for parameter in trained:
        groups[is_stacked(parameter), parameter.dim() - is_stacked(parameter) < 2] += _part(parameter, layout)
    return groups
