"""Chameleon's image tokenizer compared with transformers' class, on random weights in the real layouts."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import ChameleonVQVAE, ChameleonVQVAEConfig

from moe_dist.core.errors import UserError
from moe_dist.data.tokenizers.chameleon import ChameleonVQ
from moe_dist.data.tokenizers.image_tokenizer import load_image_tokenizer

SMALL = {
    "resolution": 32,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 2],
    "num_res_blocks": 1,
    "latent_channels": 8,
    "embed_dim": 8,
    "num_embeddings": 24,
}


@pytest.fixture(scope="module")
def images():
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def model(images):
    """Make a random model whose codebook is drawn from its own latents, so that all entries are in use."""
    torch.manual_seed(0)
    model = ChameleonVQVAE(ChameleonVQVAEConfig(**SMALL))
    with torch.no_grad():
        latents = model.quant_conv(model.encoder(images)).movedim(1, -1).flatten(0, 2)
        model.quantize.embedding.weight.copy_(latents[torch.randperm(len(latents))[:24]])
    return model


@pytest.mark.slow
def test_codes_equal_those_of_transformers(model, images, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer = load_image_tokenizer(tmp_path)
    assert (tokenizer.image_size, tokenizer.num_codes, tokenizer.codebook_size) == (32, 64, 24)
    with torch.no_grad():
        expected = torch.stack([model.encode(image[None]).image_tokens for image in images])
    codes = tokenizer.encode(images)
    assert len(codes.unique()) > 12  # so the comparison can fail
    assert (codes == expected).float().mean() > 0.99  # transformers encodes one image; we pad to a fixed chunk
    assert torch.equal(codes, torch.cat([tokenizer.encode(image[None]) for image in images]))


def test_a_whole_chameleon_model_gives_its_vqmodel(model, images, tmp_path):
    model.save_pretrained(tmp_path / "vq")
    whole = tmp_path / "whole"
    whole.mkdir()
    tensors = {f"model.vqmodel.{name}": value.contiguous() for name, value in model.state_dict().items()}
    first = dict(list(tensors.items())[:10])
    save_file({**first, "model.norm.weight": torch.ones(4)}, whole / "model-00001-of-00002.safetensors")
    rest = {name: value for name, value in tensors.items() if name not in first}
    save_file({**rest, "model.vqmodel.decoder.w": torch.ones(4)}, whole / "model-00002-of-00002.safetensors")
    (whole / "config.json").write_text(json.dumps({"model_type": "chameleon", "vq_config": SMALL}))
    one, other = load_image_tokenizer(tmp_path / "vq"), load_image_tokenizer(whole)
    assert torch.equal(one.encode(images), other.encode(images))
    assert one.sha256 == other.sha256


def test_the_real_configuration_is_1024_codes_over_8192_entries():
    with torch.device("meta"):
        config = ChameleonVQVAEConfig()
        tokenizer = ChameleonVQ(config, ChameleonVQVAE(config)).eval()
        codes = tokenizer.encode(torch.zeros(2, 3, 512, 512))
    assert codes.shape == (2, tokenizer.num_codes) == (2, 1024)
    assert (tokenizer.image_size, tokenizer.codebook_size) == (512, 8192)


def test_decoding_says_that_there_is_no_decoder(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no decoder"):
        load_image_tokenizer(tmp_path).decode(torch.zeros(1, 64, dtype=torch.int64))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_embeddings": 25}, "quantize.embedding.weight"),
        ({"num_res_blocks": 2}, "is missing"),
        ({"resolution": "big"}, "not a ChameleonVQVAE configuration"),
    ],
)
def test_a_configuration_that_does_not_fit_is_one_sentence(model, tmp_path, change, message):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message) as caught:
        load_image_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
