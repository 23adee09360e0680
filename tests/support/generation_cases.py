"""A vocabulary of the real tokenizers, prompts of every kind, and a generator without a cache.

Shape suffixes: T tokens, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from moe_dist.config.model_section import ModelConfig
from moe_dist.core.batch import TokenInfo
from moe_dist.data.tokenizers.image_tokenizer import load_image_tokenizer
from moe_dist.data.tokenizers.text_tokenizer import load_text_tokenizer
from moe_dist.data.tokenizers.vocabulary import Vocabulary
from moe_dist.generate.decode import generate
from moe_dist.generate.prompt import Format, GenerationState
from moe_dist.generate.sampling import Sampling
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout, make_layout
from tests.generate.test_sampling import naive_choice
from tests.support.model_batches import model_config

CONTEXT = 48  # an image of the fixtures' tokenizer has 16 codes
CAPTIONS = ("a red heart", "the sun", "")


def make_format(tokenizers: Path, context: int = CONTEXT) -> Format:
    image = load_image_tokenizer(tokenizers / "vq")
    return Format(Vocabulary(load_text_tokenizer(tokenizers / "text.model"), image), context)


def make_model(recipe: dict, form: Format, layout: Layout | None = None) -> Transformer:
    """Build a model with weights so large that its predictions differ strongly; it sometimes begins images and ends
    documents.
    """
    config: ModelConfig = model_config(**recipe, init_std=0.3)
    model = Transformer(config, form.vocabulary.size, layout or Layout(), seed=1).double()
    with torch.no_grad():
        model.output.weight[[form.vocabulary.boi, form.vocabulary.eos]] *= 5
    return model


def make_samples(form: Format, *, guided: bool = False) -> list[GenerationState]:
    """Return images for captions; unless guided, also a text for a picture and mixed prompts. Two samples each, of
    different lengths.
    """
    prompts = [form.text_to_image(caption) for caption in CAPTIONS]
    if not guided:
        picture = Image.linear_gradient("L").convert("RGB")
        prompts += [form.image_to_text(picture), form.mixed(["two", picture, "of"]), form.mixed(["many"])] * 2
    return [form.start(number, prompt, 14 + 2 * number) for number, prompt in enumerate(prompts)]


def generate_on_rank(rank: int, tokenizers: Path, recipe: dict, sampling: Sampling, guided: bool) -> dict:
    """Return this rank's samples; with rank -1 all of them, without ranks."""
    layout = Layout() if rank < 0 else make_layout(expert=2, device=torch.device("cpu"))
    form = make_format(tokenizers)
    samples = make_samples(form, guided=guided)[layout.rank :: layout.world]
    generate(make_model(recipe, form, layout), samples, form, sampling, layout, lambda left: None)
    return {sample.number: sample.generated for sample in samples}


@torch.no_grad()
def without_cache(model: Transformer, form: Format, sample: GenerationState, sampling: Sampling) -> list[int]:
    """Generate one sample alone, each token from a forward pass over the whole document so far."""

    def logits(prompt: tuple[int, ...], unconditional: bool) -> torch.Tensor:
        tokens_T = torch.tensor([*prompt, *sample.generated])
        position_T = torch.arange(len(tokens_T))
        info = TokenInfo.build(
            modality_T=form.vocabulary.modality_of[tokens_T],
            valid_T=torch.ones_like(tokens_T, dtype=torch.bool),
            position_T=position_T,
            token_id_T=position_T + (2 * sample.number + unconditional) * form.context,
            document_lengths=[len(tokens_T)],
            num_groups=1,
        )
        return model(tokens_T, info.causally()).logits_TV[-1]

    while not sample.done:
        logits_V = logits(sample.prompt.tokens, False)
        if sampling.guidance != 1:
            other_V = logits(sample.prompt.unconditional, True)
            logits_V = other_V + sampling.guidance * (logits_V - other_V)
        allowed = form.masks_KV[form.next(sample)].tolist()
        form.add(sample, naive_choice(logits_V.tolist(), allowed, sampling, sample.number, sample.length))
    return sample.generated
