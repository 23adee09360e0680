"""The report: curves drawn from metrics.jsonl, labels, and sentences for what cannot be drawn."""

import json
import subprocess
import sys

import numpy as np
import pytest

from moe_dist.core.errors import UserError
from moe_dist.metrics.curves import domain_figure, loss_figure, read_baseline, read_run, routing_figure, write_report


def make_run(path, *, causal=False, experts=3, images=True, steps=40):
    path.mkdir()
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "tokens": 100 * step, "causal": causal, "loss": 5 / step, "loss/text": 4 / step}
        if images:
            line["loss/image"] = 6 / step
        if step % 20 == 0:
            line |= {"eval/loss": 2.0, "eval/loss/text": 1.5, "eval/bigram/text": 3.5}
        for layer in range(2 if experts else 0):
            load = [1.0] * experts if not causal else [2.0, *[0.5] * (experts - 1)]
            line |= {f"moe/{layer}/utilization": load, f"moe/{layer}/unrouted_fraction/text": 0.1 * layer}
            line["moe/rank_imbalance"] = 1.0
        if step == 3:
            line |= {key: None for key in line if key.startswith(("loss", "moe/rank"))}
            line |= {key: [None] * experts for key in line if key.endswith("utilization")}
        lines.append(json.dumps(line))
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n" + '{"step": 41, "tok')
    return path


def texts(figure):
    parts = [figure.get_suptitle()]
    for axis in figure.axes:
        legend = axis.get_legend()
        parts += [axis.get_title(), axis.get_ylabel(), *(entry.get_text() for entry in legend.texts if legend)]
    return parts


def test_losses_are_drawn_with_held_out_points_and_baselines(tmp_path):
    run = read_run(make_run(tmp_path / "run"))
    figure = loss_figure([run], {"image": 5.5})
    everything, text, image = figure.axes
    raw, smooth, held_out, bigram = text.lines
    assert len(raw.get_xdata()) == len(smooth.get_xdata()) == 39  # the step without a loss is left out
    assert (raw.get_xdata()[0], raw.get_ydata()[0], raw.get_xdata()[-1]) == (100, 4.0, 4000)
    assert list(held_out.get_xdata()) == [2000, 4000] and list(held_out.get_ydata()) == [1.5, 1.5]
    assert set(bigram.get_ydata()) == {3.5}
    assert set(image.lines[-1].get_ydata()) == {5.5} and "bigram baseline, 5.50" in texts(figure)
    assert everything.get_title() == "all tokens"


def test_non_causal_losses_are_labelled_and_causal_ones_are_not(tmp_path):
    non_causal = read_run(make_run(tmp_path / "moma"))
    causal = read_run(make_run(tmp_path / "dense", causal=True, experts=0))
    one = texts(loss_figure([non_causal], {}))
    assert "loss, nats/token, non-causal (expert choice)" in one and "non-causal" in one[0]
    assert not any("non-causal" in text for text in texts(loss_figure([causal], {})))
    both = texts(loss_figure([causal, non_causal], {}))
    assert "moma (non-causal)" in both and "dense" in both and "loss, nats/token" in both


def test_smoothing_follows_the_curve_without_lag(tmp_path):
    run = read_run(make_run(tmp_path / "run", steps=400))
    _, smooth = loss_figure([run], {}).axes[0].lines[:2]
    line = np.polyfit(*run.series("step"), 1)
    assert line[0] == pytest.approx(0.01)
    assert smooth.get_ydata()[200] == pytest.approx(5 / 202, rel=0.01)  # point 200 is step 202: one has no loss


def test_a_text_only_run_has_no_image_panel(tmp_path):
    figure = loss_figure([read_run(make_run(tmp_path / "run", images=False))], {})
    assert [axis.get_title() for axis in figure.axes] == ["all tokens", "text"]


def test_the_heat_map_has_a_row_an_expert_and_a_block_a_layer(tmp_path):
    figure = routing_figure(read_run(make_run(tmp_path / "run", causal=True, steps=700)))
    heat = figure.axes[0]
    values = heat.images[0].get_array()
    assert values.shape == (2 * 3, 300)
    assert np.allclose(values[:, 5], [2, 0.5, 0.5, 2, 0.5, 0.5])
    assert [label.get_text() for label in heat.get_yticklabels()] == ["layer 0", "layer 1"]


def test_an_even_load_is_said_in_words(tmp_path):
    figure = routing_figure(read_run(make_run(tmp_path / "run")))
    assert "every expert has its fair share" in figure.get_suptitle()
    assert not any(axis.images for axis in figure.axes)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("steps", [1, 2, 3, 40])
@pytest.mark.parametrize("causal", [True, False])
def test_short_runs_draw_too(tmp_path, steps, causal):
    files = write_report(make_run(tmp_path / "run", steps=steps, causal=causal))
    assert [file.name for file in files] == ["loss.png", "routing.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def with_domains(path, layers=2):
    """Early and late shares differ; layer 1 has never seen the second domain."""
    lines = [json.loads(line) for line in (make_run(path) / "metrics.jsonl").read_text().splitlines()[:-1]]
    for line in lines:
        late = line["step"] > 36
        for layer in range(layers):
            line[f"moe/{layer}/domain_share/emoji"] = [0.5, 0.25, 0.25] if late else [0.0, 0.0, 1.0]
        line["moe/0/domain_share/clip/art"] = [0.0, 1.0, 0.0]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_domains_have_a_map_a_layer_of_the_end_of_the_run(tmp_path):
    run = with_domains(tmp_path / "run")
    assert [file.name for file in write_report(run)] == ["loss.png", "routing.png", "domains.png"]
    first, second, _ = domain_figure(read_run(run)).axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["clip/art", "emoji"]
    assert first.images[0].get_array().tolist() == [[0, 1, 0], [0.5, 0.25, 0.25]]
    assert second.images[0].get_array().mask[0].all() and second.get_title() == "layer 1"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("layers", [1, 4, 7])
def test_domain_maps_of_any_number_of_layers_draw(tmp_path, layers):
    figure = domain_figure(read_run(with_domains(tmp_path / "run", layers)))
    assert sum(axis.get_visible() for axis in figure.axes) == layers + 1  # the colour bar


def test_a_dense_run_has_no_routing_picture(tmp_path):
    assert [file.name for file in write_report(make_run(tmp_path / "run", experts=0))] == ["loss.png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a run folder: there is no"),
        ("", "holds no loss yet"),
        ('{"step": 1, "tokens": 5}\n', "holds no loss yet"),
        ('{"step": 1, "tokens": 5, "loss": 1.0}\nnonsense\n', "line 2 is not a line of metrics"),
        ('{"step": 1, "loss": 1.0}\n', "line 1 is not a line of metrics with a token count"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_sentence(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        write_report(tmp_path)


def test_a_broken_baseline_is_named(tmp_path):
    (tmp_path / "b.json").write_text('{"text": "much"}')
    for file in ("b.json", "missing.json"):
        with pytest.raises(UserError, match=file):
            read_baseline(tmp_path / file)


@pytest.mark.slow
def test_the_command_line(tmp_path):
    runs = [str(make_run(tmp_path / name)) for name in ("a", "b")]
    (tmp_path / "b.json").write_text('{"text": 4.0, "image": 6}')
    options = ["--out", str(tmp_path / "both.png"), "--baseline", str(tmp_path / "b.json")]
    command = [sys.executable, "launch/report.py"]
    done = subprocess.run([*command, *runs, *options], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 5 and (tmp_path / "both.png").exists()
    failed = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ") and len(failed.stderr.splitlines()) == 1
