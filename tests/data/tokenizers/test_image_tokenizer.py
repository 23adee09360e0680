"""Image tokenizers: the contract of encode, errors of bad folders, and training that learns to reconstruct."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from moe_dist.core.errors import UserError
from moe_dist.data.shards.samples import decode_image
from moe_dist.data.tokenizers.image_tokenizer import load_image_tokenizer
from moe_dist.data.tokenizers.pixels import crop_and_resize, scale_pixels
from moe_dist.data.tokenizers.vq import VQConfig, VQTokenizer
from moe_dist.data.tokenizers.vq_training import VQTraining, measure, reconstruction_grid, train_vq

SMALL = VQConfig(image_size=32, codebook_size=32, code_width=8, channels=(8, 16), blocks=1)


@pytest.fixture(scope="module")
def pixels(emoji_samples):
    return np.stack([crop_and_resize(decode_image(sample.png), 32) for sample in emoji_samples[:96]])


@pytest.fixture(scope="module")
def tokenizer(pixels):
    return train_vq(pixels, SMALL, VQTraining(steps=80, warmup_steps=5, lr=5e-3))


def test_training_reconstructs_and_uses_the_codebook(pixels, tokenizer):
    untrained = train_vq(pixels, SMALL, VQTraining(steps=1, warmup_steps=5, lr=5e-3))
    before, after = measure(untrained, pixels), measure(tokenizer, pixels)
    mean_image = 10 * np.log10(255**2 / pixels.astype(float).var())  # about the PSNR of the best constant colour
    assert after.psnr > mean_image + 1 and after.psnr > before.psnr + 2
    assert after.codes_used > 16 and 8 < after.code_perplexity <= after.codes_used
    assert reconstruction_grid(tokenizer, pixels[:32]).size == (16 * 32, 4 * 32)


def test_quality_of_a_perfect_tokenizer_by_hand(pixels):
    class Perfect:
        codebook_size = 4
        encode = staticmethod(lambda x: torch.tensor([[0, 1], [0, 1]]))
        decode = staticmethod(lambda codes: scale_pixels(pixels[:2]) + 0.2)  # error of 0.1 in [0, 1]

    quality = measure(Perfect(), pixels[:2])
    assert quality.psnr == pytest.approx(20, abs=1e-3) and quality.l1 == pytest.approx(0.1)
    assert quality.codes_used == 2 and quality.code_perplexity == pytest.approx(2)


def test_training_is_repeatable_and_leaves_the_global_generator_alone(pixels):
    state = torch.random.get_rng_state()
    first, second = (train_vq(pixels, SMALL, VQTraining(steps=3)) for _ in range(2))
    assert first.sha256 == second.sha256
    assert torch.equal(state, torch.random.get_rng_state())


def test_codes_do_not_depend_on_the_batch(pixels, tokenizer):
    x = scale_pixels(pixels)
    codes = tokenizer.encode(x)
    assert codes.shape == (96, tokenizer.num_codes) and codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < tokenizer.codebook_size
    assert torch.equal(codes, tokenizer.encode(x))
    assert torch.equal(codes, torch.cat([tokenizer.encode(part) for part in x.split(5)]))
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(codes[order], tokenizer.encode(x[order]))


def test_codes_are_the_nearest_codebook_entries(pixels, tokenizer):
    x = scale_pixels(pixels[:4])
    with torch.no_grad():
        z = tokenizer.encoder(x).double().flatten(2).transpose(1, 2)
    distance = (z[:, :, None] - tokenizer.quantizer.codebook.double()).square().sum(-1)
    chosen = distance.gather(2, tokenizer.encode(x)[:, :, None])[..., 0]
    assert torch.allclose(chosen, distance.min(2).values, atol=1e-4)


def test_save_and_load(pixels, tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_image_tokenizer(tmp_path)
    x = scale_pixels(pixels[:7])
    assert torch.equal(loaded.encode(x), tokenizer.encode(x))
    assert torch.equal(loaded.decode(loaded.encode(x)), tokenizer.decode(tokenizer.encode(x)))
    assert loaded.sha256 == tokenizer.sha256
    weights = load_file(tmp_path / "model.safetensors")
    weights["decoder.0.bias"] += 1e-3
    save_file(weights, tmp_path / "model.safetensors")
    assert load_image_tokenizer(tmp_path).sha256 != tokenizer.sha256


def test_default_is_64_codes_of_a_64_pixel_image():
    with torch.device("meta"):
        tokenizer = VQTokenizer(VQConfig())
    assert (tokenizer.image_size, tokenizer.num_codes, tokenizer.codebook_size) == (64, 64, 512)


def test_centre_crop_resize_and_scale():
    picture = Image.new("RGB", (96, 32), "red")
    picture.paste("blue", (32, 0, 64, 32))
    pixels = crop_and_resize(picture, 16)
    assert pixels.shape == (16, 16, 3) and (pixels[:, 3:-3] == [0, 0, 255]).all()
    assert scale_pixels(pixels[None])[0, :, 8, 8].tolist() == [-1, -1, 1]


def test_too_few_images(pixels):
    with pytest.raises(UserError, match="3 images are too few"):
        train_vq(pixels[:3], SMALL, VQTraining())


def _drop_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.0.bias"]
    save_file(weights, folder / "model.safetensors")


def _edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (shutil.rmtree, "no image tokenizer folder"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is missing or is not JSON"),
        (lambda f: (f / "config.json").write_text("{}"), "neither a moe_dist VQ tokenizer nor a Chameleon"),
        (lambda f: _edit_config(f, codebok=3), "unknown key 'codebok'"),
        (lambda f: _edit_config(f, image_size=30), "image_size=30"),
        (lambda f: _edit_config(f, codebook_size=64), r"do not match its config.json: .* has the shape"),
        (lambda f: _edit_config(f, blocks=2), "do not match its config.json"),
        (_drop_weight, "'encoder.0.bias' is missing"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing, damaged"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "model.safetensors is missing, damaged"),
    ],
)
def test_a_folder_that_does_not_fit_is_one_sentence(tokenizer, tmp_path, spoil, message):
    folder = tmp_path / "vq"
    tokenizer.save(folder)
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_image_tokenizer(folder)
    assert str(folder) in str(caught.value)
