"""The decoder: token ids -> embedding -> blocks -> norm -> logits. Text and image tokens share one stream.

Shape suffixes: T tokens, D model width, V vocabulary, d size per head.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_dist.config.model_section import ModelConfig
from moe_dist.core.batch import TokenInfo
from moe_dist.core.costs import Product, Work, linear_product, no_products, num_weights
from moe_dist.core.seeding import seeded_normal_
from moe_dist.core.step import ModelOutput
from moe_dist.model.attention import Documents, locate_documents
from moe_dist.model.block import Block
from moe_dist.model.kv_cache import Decoding
from moe_dist.model.mixture_of_depths import MixtureOfDepths
from moe_dist.model.moe.moe_layer import MoELayer
from moe_dist.model.rope import rotation_of
from moe_dist.model.site import block_site, depth_site
from moe_dist.parallel.layout import Layout


class Transformer(nn.Module):
    """Decoder with the architecture of MoMa's base model (arXiv 2407.21770), which follows Chameleon.

    With other settings, it has the architecture of Llama, Mixtral, OLMoE and others (convert/families). If
    tie_embeddings is set, the output layer uses the embedding's matrix. The initial value of a parameter is a function
    of (seed, name, global expert id), so it does not depend on the layout. Under `torch.device("meta")`, construction
    allocates nothing.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, layout: Layout, seed: int):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, block_site(config, layer, seed), layout) for layer in range(config.num_layers)
        )
        self.depth = nn.ModuleDict()
        if config.depth is not None:
            for layer in config.depth_layers:
                site = depth_site(config, layer, seed)
                self.depth[str(layer)] = MixtureOfDepths(self._block(layer), config.depth, site)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_epsilon)
        self.output = nn.Linear(config.hidden_size, vocab_size, bias=False)
        if config.tie_embeddings:
            self.output.weight = self.embedding.weight  # one parameter, named embedding.weight
        stds = {"embedding": config.embedding_init_std or config.init_std, "output": config.init_std}
        for name in ("embedding",) if config.tie_embeddings else ("embedding", "output"):
            seeded_normal_(getattr(self, name).weight, seed=seed, name=f"{name}.weight", std=stds[name])

    @property
    def causal_routing(self) -> bool:
        """True if all routing is causal.

        Otherwise, the choice of the experts or blocks that process a token can depend on later tokens, and so can the
        token's loss.
        """
        return all(router.causal for router in self._routers())

    @property
    def can_route_causally(self) -> bool:
        """True if every router is causal or has an auxiliary router.

        In this case, all routing is causal when TokenInfo.causal is set.
        """
        return all(router.causal or router.has_auxiliary for router in self._routers())

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def expert_layers(self) -> list[int]:
        """The indices of the layers with experts."""
        return self.config.expert_layers

    def products(self, work: Work) -> Iterator[list[Product]]:
        """Yield the matrix products of the forward pass, divided into chains.

        A chain lists products in the order of computation. The first chain goes from embedding to logits. Each
        auxiliary router then has its own chain, because its input is detached.
        """
        of_layers = [(block, work.of_layer(layer)) for layer, block in enumerate(self._blocks())]
        products = (product for block, of_layer in of_layers for product in block.products(of_layer))
        output = linear_product(self.output, work.tokens)
        yield [no_products(self.embedding), *products, no_products(self.norm), output]
        for block, of_layer in of_layers:
            yield from block.detached_products(of_layer)

    def num_parameters(self, experts: float | None = None) -> float:
        """Count the parameters over all ranks.

        experts: the number of experts per layer to count. By default, all experts are counted. If it is the average
        number of experts per token, the result is the number of active parameters.
        """
        vocabulary = num_weights(self.output) * (1 if self.config.tie_embeddings else 2)
        return sum(block.num_parameters(experts) for block in self._blocks()) + self.config.hidden_size + vocabulary

    def _block(self, layer: int) -> Block:
        return cast(Block, self.layers[layer])

    def _blocks(self) -> Iterator[Block | MixtureOfDepths]:
        """Yield the blocks in order. If a block has mixture-of-depths, yield its MixtureOfDepths wrapper instead."""
        for layer in range(self.num_layers):
            key = str(layer)
            yield cast(MixtureOfDepths, self.depth[key]) if key in self.depth else self._block(layer)

    def _routers(self) -> Iterator[Any]:
        """Yield the routers of the expert layers, then the routers of mixture-of-depths."""
        yield from (block.ffn.router for block in self.layers if isinstance(block.ffn, MoELayer))
        yield from (depth.router for depth in self.depth.values())

    def forward(self, tokens_T: Tensor, info: TokenInfo, decoding: Decoding | None = None) -> ModelOutput:
        """Return the next-token logits at each of the T positions, and the records of the routers.

        info: facts about the tokens. If `info.causal` is true, routing is causal, as inference requires. If it is
        false, routing is the same as in training.
        decoding: if given, each document continues a sequence of the key-value cache. The positions in `info` must then
        continue the positions of the cached sequences.
        Raises UserError if `info.causal` is true but `can_route_causally` is false.
        """
        config = self.config
        x_TD = self.embedding(tokens_T)
        of_layers: list[Documents]
        if decoding is None:
            of_layers = [locate_documents(info.document_lengths, device=x_TD.device, dtype=x_TD.dtype)]
            of_layers *= config.num_layers
        else:
            of_layers = [decoding.documents(layer, info) for layer in range(config.num_layers)]
        turn_2T1d = rotation_of(config, info.position_T, x_TD.dtype)
        records, depths = [], []
        for block, documents in zip(self._blocks(), of_layers):
            run: Any = block
            if config.recompute and self.training:
                # Reentrant checkpointing would drop the gradients of the tensors in the records.
                run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
            x_TD, record, *depth = run(x_TD, info, documents, turn_2T1d)
            depths += depth
            if record is not None:
                records.append(record)
        return ModelOutput(self.output(self.norm(x_TD)), tuple(records), tuple(depths))
