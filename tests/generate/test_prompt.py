"""The document format: tokens allowed next, prompts compared with the loader's documents, and errors."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from moe_dist.core.errors import UserError
from moe_dist.data.stream.packing import Assembler
from moe_dist.data.tokenizers.text_tokenizer import load_text_tokenizer
from moe_dist.data.tokenizers.vocabulary import Vocabulary
from moe_dist.generate.prompt import Format, read_picture
from tests.support.generation_cases import CONTEXT, make_format
from tests.support.synthetic_store import MemoryDocument, MemoryStore

PICTURE = Image.linear_gradient("L").convert("RGB")


@pytest.fixture(scope="module")
def form(tokenizers):
    return make_format(tokenizers)


def loader_tokens(form, caption, codes, *, image_first, caption_dropout=0.0):
    """Return the document as training reads it."""
    text = np.array(form.vocabulary.text.encode(caption), dtype=np.int64)
    store = MemoryStore([MemoryDocument(text, form.vocabulary.image_code(np.array(codes)))])
    assemble = Assembler(
        store=store,
        vocabulary=form.vocabulary,
        seed=0,
        sequence_length=CONTEXT,
        image_first=image_first,
        caption_dropout=caption_dropout,
    )
    return assemble(0, 0).tokens.tolist()


def test_prompts_are_the_beginnings_of_the_loaders_documents(form):
    codes = list(range(16))
    trained = loader_tokens(form, "a red heart", codes, image_first=0.0)
    prompt = form.text_to_image("a red heart")
    assert trained[: len(prompt.tokens)] == list(prompt.tokens) and len(trained) == len(prompt.tokens) + 16 + 2
    dropped = loader_tokens(form, "a red heart", codes, image_first=0.0, caption_dropout=1.0)
    assert dropped[:2] == list(prompt.unconditional) and len(dropped) == 2 + 16 + 2

    image = form.vocabulary.image
    pixels = torch.from_numpy(np.array(PICTURE.resize((32, 32), Image.Resampling.LANCZOS)))[None]
    codes = image.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1)[0].tolist()
    trained = loader_tokens(form, "a red heart", codes, image_first=1.0)
    prompt = form.image_to_text(PICTURE)
    assert trained[:19] == list(prompt.tokens)
    mixed = form.mixed([PICTURE, "a red heart"])
    assert trained[:-1] == list(mixed.tokens)


@pytest.mark.parametrize("seed", range(30))
def test_any_walk_through_what_is_allowed_is_a_document(form, seed):
    """An image has exactly its number of codes between BOI and EOI and is never cut. No code occurs elsewhere."""
    draw, v = random.Random(seed), form.vocabulary
    prompts = (form.mixed(["a"]), form.mixed([PICTURE]), form.image_to_text(PICTURE), form.text_to_image("a"))
    sample = form.start(0, prompts[seed % 4], max_tokens=draw.randint(1, 40))
    while not sample.done:
        allowed = form.masks_KV[form.next(sample)].nonzero().flatten().tolist()
        assert allowed
        form.add(sample, v.boi if v.boi in allowed and draw.random() < 0.5 else draw.choice(allowed))
    document = [*sample.prompt.tokens, *sample.generated]
    assert len(document) <= min(CONTEXT, sample.limit)
    if sample.prompt.task == "image":
        document += [v.eoi]
        assert sample.length == len(sample.prompt.tokens) + 16
    text = {v.pad, v.bos, v.boi, v.eoi}
    position, images = 1, 0
    while position < len(document):
        if document[position] == v.boi:
            block = document[position : position + 18]
            assert len(block) == 18 and block[17] == v.eoi, "an image is cut"
            assert all(v.first_image_code <= token < v.size for token in block[1:17])
            position, images = position + 18, images + 1
        else:
            assert document[position] < v.first_image_code and document[position] not in text
            assert document[position] != v.eos or position == len(document) - 1
            position += 1
    assert images <= 1 or sample.prompt.task == "mixed"


def test_an_image_begins_only_where_it_fits(form):
    sample = form.start(0, form.mixed(["a"]), max_tokens=18)
    assert form.next(sample) == form.TEXT_OR_IMAGE
    form.add(sample, 7)
    assert form.next(sample) == form.TEXT


def test_parts_are_texts_and_pictures(form):
    v = form.vocabulary
    words, codes = v.text.encode("a red heart"), [3] * 16
    tokens = [*words, v.boi, *(v.image_code(code) for code in codes), v.eoi, *v.text.encode("sun"), v.eos]
    assert form.parts(tokens) == ["a red heart", codes, "sun"]
    assert form.parts([v.eos]) == []


def test_a_tokenizer_whose_markers_are_one_token_can_end_a_text(tokenizers):
    text = load_text_tokenizer(tokenizers / "text.model")
    text.pad = text.bos = text.eos  # as in GPT-2
    form = Format(Vocabulary(text), CONTEXT)
    assert form.masks_KV[form.TEXT, text.eos]


def test_bad_prompts(form, tokenizers, tmp_path):
    with pytest.raises(UserError, match=r"an image of 16 codes and 4 markers need \d+, and data.sequence_length=48 "):
        form.text_to_image("a long caption " * 10)
    room = len(form.text_to_image("the sun").tokens) + 16 + 2  # BOS, BOI, codes, EOI, EOS
    make_format(tokenizers, room).text_to_image("the sun")
    with pytest.raises(UserError, match=f"need {room}, and data.sequence_length={room - 1} would cut the image"):
        make_format(tokenizers, room - 1).text_to_image("the sun")
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens: data.sequence_length=48 has no room for more"):
        form.mixed(["one two three " * 20])
    with pytest.raises(UserError, match=r"the prompt has 19 tokens: data\.sequence_length=19"):
        make_format(tokenizers, 19).image_to_text(PICTURE)
    textual = Format(Vocabulary(load_text_tokenizer(tokenizers / "text.model")), CONTEXT)
    assert textual.next(textual.start(0, textual.mixed(["a"]), 9)) == textual.TEXT
    with pytest.raises(UserError, match=r"no image tokenizer .* cannot make a picture"):
        textual.text_to_image("a")
    with pytest.raises(UserError, match=r"no image tokenizer .* cannot read a picture"):
        textual.mixed(["a", PICTURE])
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for name, sentence in (("broken.png", "undecodable image"), ("none.png", "No such file")):
        with pytest.raises(UserError, match=f"the picture '.*{name}' cannot be read: {sentence}"):
            read_picture(tmp_path / name)


def test_weights_without_a_decoder_say_so_at_once(form, tokenizers):
    class Blind:
        image_size, num_codes, codebook_size, sha256 = 32, 16, 32, "blind"

        def decode(self, codes):
            raise UserError("holds no decoder")

    blind = Format(Vocabulary(load_text_tokenizer(tokenizers / "text.model"), Blind()), CONTEXT)
    with pytest.raises(UserError, match="holds no decoder"):
        blind.text_to_image("a")
    allowed = [f.next(f.start(0, f.mixed(["a"]), max_tokens=18)) for f in (form, blind)]
    assert allowed == [Format.TEXT_OR_IMAGE, Format.TEXT]  # a text continues without images, which could not be decoded


@pytest.mark.parametrize("text", [r"caf\udce9", r"half \ud83d"])
@pytest.mark.parametrize("task", ["text_to_image", "mixed"])
def test_a_prompt_that_is_not_utf_8_is_refused_in_one_sentence(form, task, text):
    prompt = text.encode().decode("unicode_escape")
    with pytest.raises(UserError) as refused:
        getattr(form, task)(prompt if task == "text_to_image" else [PICTURE, prompt])
    assert str(refused.value) == f"the prompt '{text}' is not UTF-8 text"
