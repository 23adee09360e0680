"""Experts by token against a loop over tokens, on one rank and on two; classes of tokens; the picture."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from moe_dist.core.errors import UserError
from moe_dist.data.tokenizers.text_tokenizer import load_text_tokenizer
from moe_dist.data.tokenizers.vocabulary import Vocabulary
from moe_dist.evaluate.experts_by_token import ExpertsByToken, count_experts, token_class
from moe_dist.metrics.heat_map import draw_heat_map
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout, make_layout
from tests.data.tokenizers.test_hugging_face_text import save as save_tokenizer
from tests.support.distributed import run_ranks
from tests.support.model_batches import TOP_K, VOCAB, make_batch, model_config

LAYERS = {"1": {"ffn": {"type": "dense", "hidden_size": 16}}}
NULL = {**TOP_K, "router": {"type": "null_experts", "num_experts": 4, "num_null_experts": 4, "top_k": 3}}


def batches():
    return [make_batch([9, 30], padding=7, seed=seed, first_token_id=100 * seed) for seed in range(4)]


def count_on_rank(rank, layout=None):
    layout = layout or make_layout(expert=2, device=torch.device("cpu"))
    model = Transformer(model_config(NULL, layers=LAYERS), VOCAB, layout, 0)
    mine = batches()[layout.dp_rank :: layout.dp]
    return count_experts(lambda batch: model(batch.tokens_T, batch.info), mine, VOCAB, layout)


def test_counts_are_those_of_a_loop_over_tokens():
    counted = count_on_rank(0, Layout())
    assert counted.layers == (0, 2)
    model = Transformer(model_config(NULL, layers=LAYERS), VOCAB, Layout(), 0)
    experts, seen = defaultdict(int), defaultdict(int)
    for batch in batches():
        for row, record in enumerate(model(batch.tokens_T, batch.info).records):
            (part,) = record.routings
            for place, token in enumerate(part.token_V.tolist()):
                experts[row, int(batch.tokens_T[token])] += int(part.kept_VE[place].sum())
        for token, valid in zip(batch.tokens_T.tolist(), batch.info.valid_T.tolist(), strict=True):
            seen[token] += valid
    for token in range(VOCAB):
        assert int(counted.seen_V[token]) == seen[token]
        assert [int(row[token]) for row in counted.experts_LV] == [experts[0, token], experts[1, token]]
    assert 0 < int(counted.experts_LV.sum()) < 3 * 2 * int(counted.seen_V.sum())


def test_two_ranks_count_what_one_counts():
    alone = count_on_rank(0, Layout())
    for counted in run_ranks(count_on_rank, 2):
        assert torch.equal(counted.seen_V, alone.seen_V) and torch.equal(counted.experts_LV, alone.experts_LV)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    folder = save_tokenizer(tmp_path_factory.mktemp("tokenizer"), bos_token="<|start|>", eos_token="<|end|>")
    return Vocabulary(load_text_tokenizer(folder), SimpleNamespace(codebook_size=8, sha256="x"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a", "inside a word"), ("7", "number"), ("!", "punctuation"), ("$", "punctuation"), (" ", "other text")],
)
def test_classes_of_text(text, expected, vocabulary):
    (token,) = vocabulary.text.encode(text)
    assert token_class(vocabulary, token) == expected


def test_classes_of_words_markers_and_codes(vocabulary):
    classes = {token_class(vocabulary, token): token for token in range(vocabulary.size)}
    assert set(classes) == {
        "word start", "inside a word", "number", "punctuation", "other text", "marker", "image code"
    }  # fmt: skip
    assert vocabulary.text.decode([classes["word start"]]).strip().isalpha()
    assert token_class(vocabulary, vocabulary.eos) == token_class(vocabulary, vocabulary.boi) == "marker"


def test_the_summary_names_the_extremes(vocabulary):
    seen_V = torch.zeros(vocabulary.size, dtype=torch.int64)
    experts_LV = seen_V.repeat(2, 1)
    few, many, rare = (vocabulary.text.encode(text)[0] for text in "a7!")
    for token, count, experts in ((few, 30, 10), (many, 40, 100), (rare, 5, 1)):
        seen_V[token], experts_LV[:, token] = count, experts
    found = ExpertsByToken((0, 3), experts_LV, seen_V).summary(vocabulary)
    assert found["fewest"][0] == {"token": few, "text": "a", "count": 30, "experts": pytest.approx(1 / 3)}
    assert found["most"][0] == {"token": many, "text": "7", "count": 40, "experts": 2.5} and len(found["most"]) == 2
    assert found["classes"]["number"] == {"tokens": 40, "experts": [2.5, 2.5]}
    assert found["experts_per_token"] == pytest.approx(111 / 75) and found["layers"] == {0: 111 / 75, 3: 111 / 75}


def test_a_dense_model_is_refused():
    model = Transformer(model_config(), VOCAB, Layout(), 0)
    with pytest.raises(UserError, match="the model is dense"):
        count_experts(lambda batch: model(batch.tokens_T, batch.info), batches(), VOCAB, Layout())


def test_the_picture_shows_every_cell(tmp_path):
    values, columns = [[0.1, 1.5], [2.0, 0.7]], ["word start", "number"]
    draw_heat_map(values, [0, 3], columns, tmp_path / "a.png", title="experts per token", row_label="layer")
    picture = Image.open(tmp_path / "a.png").convert("RGB")
    assert min(picture.size) > 200 and len(picture.getcolors(1 << 24)) > 4
