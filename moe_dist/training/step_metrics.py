"""Metrics of an optimizer step, computed from the engine's result. Their names are listed in metrics/metric_keys.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_dist.config.model_section import MoEFFN
from moe_dist.config.recipe import Config
from moe_dist.core.batch import Batch
from moe_dist.core.costs import Costed
from moe_dist.core.step import ModelOutput
from moe_dist.metrics.router_agreement import decision_metrics
from moe_dist.metrics.routing_metrics import RoutingCounts, routing_metrics
from moe_dist.metrics.step_counts import StepCounts
from moe_dist.model.moe.moe_layer import routers
from moe_dist.model.moe.placement import Placement, make_placement
from moe_dist.model.moe.router import Router
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout

StepMetrics = dict[str, float | list[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMeter:
    """A meter that computes the metrics of an optimizer step.

    For each micro-batch, the meter counts the routing decisions and the processed tokens. It then computes routing
    metrics and FLOPs from the sums of these counts over the step.
    """

    model: Costed
    layout: Layout
    domains: Sequence[str]
    router: Router | None  # the first expert layer's; all layers have the same kind
    placement: Placement | None

    @classmethod
    def of(cls, model: Transformer, config: Config, layout: Layout, domains: Sequence[str]) -> StepMeter:
        """Create the meter for the training of `model`. domains: the names of the domains in the data."""
        router = next(iter(routers(model)), None)
        placement = None
        if router is not None and isinstance(config.model.ffn, MoEFFN):
            placement = make_placement(router.expert_groups, layout.expert, config.model.ffn.slices)
        return cls(
            model=model,
            layout=layout,
            domains=domains,
            router=router,
            placement=placement,
        )

    def count(self, batch: Batch, output: ModelOutput) -> StepCounts:
        """Count the routing decisions and the processed tokens of one micro-batch on this rank."""
        return StepCounts.of(batch, output, self.layout, len(self.domains))

    def metrics(self, counted: StepCounts, seconds: float) -> StepMetrics:
        """Return the metrics of a step that took `seconds` seconds. Collective.

        counted: the sum of this rank's counts over the step's micro-batches. The metrics are the same on all ranks,
        except for moe/flops_saved.
        """
        flops = counted.flops(self.model)
        totals = counted.over_ranks(flops, self.layout)
        found: StepMetrics = {"model_flops": totals.flops, "model_flops_per_second": totals.flops / seconds}
        if totals.routing is not None:
            found |= self._routing(totals.routing, counted)
        return found | decision_metrics(totals.decisions)

    def _routing(self, total: RoutingCounts, counted: StepCounts) -> StepMetrics:
        assert self.router is not None and self.placement is not None
        found: StepMetrics = routing_metrics(
            total,
            expert_groups=self.router.expert_groups,
            local_experts=self.placement.local_experts,
            domains=self.domains,
        )
        top_k, experts = self.router.reference_top_k, found["moe/experts_per_token"]
        if top_k is not None and isinstance(experts, float):
            found["moe/flops_saved"] = counted.flops_saved(self.model, experts=experts, top_k=top_k)
        return found
