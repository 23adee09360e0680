"""launch/generate.py as a user starts it: the same files at every layout, and its errors."""

import json

import numpy as np
import pytest
from PIL import Image

from moe_dist.generate.pictures import Generated, contact_sheet, write_generated
from tests.support.launching import ALONE, TORCHRUN, launch, launch_tool

TOP_K = "model.ffn.router={type: top_k, num_experts: 4, top_k: 2}"
SMALL = ["parallel.expert=1", "train.stop_after=2", "eval.every=0", TOP_K]


def samples(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_one_process_and_two_expert_parallel_ranks_write_the_same(overrides, tokenizers, tmp_path):
    run = tmp_path / "run"
    trained = launch(ALONE, [*overrides, *SMALL])
    assert trained.returncode == 0, trained.stderr
    Image.linear_gradient("L").save(tmp_path / "grey.png")
    prompts = ["--caption", "a red heart", "the sun", "--picture", str(tmp_path / "grey.png")]
    prompts += ["--mixed", "two", f"@{tmp_path / 'grey.png'}", "--max-tokens", "9", "--samples", "2", "--batch", "3"]
    alone = launch_tool(ALONE, "generate.py", [str(run), *prompts])
    assert alone.returncode == 0, alone.stderr
    ranks = launch_tool(TORCHRUN, "generate.py", [str(run), "parallel.expert=2", *prompts])
    assert ranks.returncode == 0, ranks.stderr

    first, second = run / "samples" / "step_00000002", run / "samples" / "step_00000002-2"
    assert samples(first) == samples(second)
    tasks = [(line["task"], len(line["images"])) for line in samples(first)]
    assert tasks[:6] == [("image", 1)] * 4 + [("text", 0)] * 2 and [task for task, _ in tasks[6:]] == ["mixed"] * 2
    assert [len(line["tokens"]) for line in samples(first)[:4]] == [16] * 4
    assert samples(first)[0]["tokens"] != samples(first)[1]["tokens"] and samples(first)[0]["prompt"] == "a red heart"
    names = [name for line in samples(first) for name in line["images"]]
    assert sorted([*names, "samples.jsonl", "sheet.png"]) == sorted(file.name for file in first.iterdir())
    for name in [*names, "sheet.png"]:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    with Image.open(first / names[0]) as picture:
        assert picture.size == (32, 32)

    wrong = ["--caption", "a", "--picture", str(tmp_path / "missing.png")]
    refused = launch_tool(TORCHRUN, "generate.py", [str(run), "parallel.expert=2", *wrong])
    assert refused.returncode != 0
    assert "missing.png' cannot be read: No such file or directory" in refused.stderr
    guided = launch_tool(ALONE, "generate.py", [str(run), "--mixed", "a", "--guidance", "2"])
    assert guided.returncode == 2 and "error: --guidance is for images" in guided.stderr
    late = launch_tool(ALONE, "generate.py", [str(run), "--caption", "a", "parallel.expert=1"])
    assert late.returncode == 2 and "overrides of the recipe come right after RUN" in late.stderr
    latin = launch_tool(ALONE, "generate.py", [str(run), "--mixed", b"caf\xe9"])
    assert latin.returncode == 2 and latin.stderr.endswith("error: the prompt 'caf\\udce9' is not UTF-8 text\n")
    other = f"data.text_tokenizer={tokenizers / 'other.model'}"
    refused = launch_tool(ALONE, "generate.py", [str(run), other, "--caption", "a"])
    assert refused.returncode == 2 and "step_00000002 was trained with other tokenizers than" in refused.stderr


def test_files_of_samples(tmp_path):
    class Grey:
        def decode(self, codes):
            return codes[0, 0].float().mul(0.1).expand(1, 3, 8, 8)

    picture = Image.new("RGB", (20, 30), "red")
    made = [
        Generated(0, "image", ("a red heart",), [[3, 1]], [7, 8]),
        Generated(1, "text", (picture,), ["a text"], [5]),
        Generated(2, "mixed", ("many", picture), ["and", [0], "then", [9]], [1]),
        Generated(3, "mixed", ("nothing",), [], [2]),
    ]
    write_generated(tmp_path / "out", made, Grey(), {"seed": 4})
    lines = samples(tmp_path / "out")
    assert [line["images"] for line in lines] == [["0000.png"], [], ["0002.png", "0002_2.png"], []]
    assert [line["text"] for line in lines] == ["", "a text", "and then", ""]
    assert lines[2]["prompt"] == "many [picture]" and lines[0]["seed"] == 4 and lines[0]["tokens"] == [7, 8]
    with Image.open(tmp_path / "out" / "0000.png") as image:
        assert np.asarray(image)[0, 0].tolist() == [round(1.3 * 127.5)] * 3


def test_what_was_made_is_kept_where_it_cannot_be_drawn(tmp_path):
    class Broken:
        def decode(self, codes):
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        write_generated(tmp_path / "out", [Generated(0, "image", ("a red heart",), [[3, 1]], [7, 8])], Broken(), {})
    assert samples(tmp_path / "out")[0]["tokens"] == [7, 8]


def test_the_contact_sheet_has_a_cell_for_each_picture():
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    sheet = np.asarray(contact_sheet([(red, "first"), (None, "second " * 40), (blue, "third")]))
    for colour, count in (([255, 0, 0], 160 * 160), ([0, 0, 255], 160 * 160)):
        assert (sheet == colour).all(axis=2).sum() == count
    assert (sheet[170:, 168:330] < 100).any(), "a text is missing"
