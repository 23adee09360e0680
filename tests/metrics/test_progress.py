"""The progress line, on a terminal and in a log file, with a clock of the test's own."""

import io

from rich.console import Console

from moe_dist.metrics.progress import Progress

METRICS = {"loss": 5.25, "loss/text": 4.5, "loss/image": 6.0, "tokens_per_second": 12345.6}


def make_progress(*, terminal=False, is_main=True, causal=False, step=0, total=100):
    out, now = io.StringIO(), [0.0]
    console = Console(file=out, force_terminal=terminal, width=160)
    return (Progress(total, step=step, is_main=is_main, causal=causal, console=console, clock=lambda: now[0]), now, out)


def test_the_line_says_everything_and_labels_what_is_not_causal():
    progress, now, out = make_progress(step=10)
    with progress:
        now[0] = 4.0
        progress.update(12, METRICS | {"eval/loss": 5.5})
    assert out.getvalue() == (
        "step 12/100 | non-causal loss 5.250 (text 4.500, image 6.000) | held-out non-causal loss 5.500"
        " | 12,346 tokens/s | ETA 0:02:56\n"
    )


def test_causal_losses_carry_no_label_and_the_held_out_loss_stays_shown():
    progress, now, _ = make_progress(causal=True)
    now[0] = 1.0
    progress.update(1, METRICS | {"eval/loss": 5.5})
    line = progress.line(2, {"loss": 3.0})
    assert line.startswith("step 2/100 | loss 3.000 | held-out loss 5.500 | ETA ") and "non-causal" not in line


def test_null_experts_show_how_many_true_ones_a_token_takes_and_what_that_saves():
    progress, _, _ = make_progress(causal=True)
    line = progress.line(3, {"loss": 3.0, "moe/experts_per_token": 1.512, "moe/flops_saved": 0.1234})
    assert line == "step 3/100 | loss 3.000 | 1.51 true experts/token | 12.3% FLOPs saved | ETA ?"
    assert "experts" not in progress.line(3, {"loss": 3.0, "moe/experts_per_token": 1.0}), "without null experts"


def test_a_log_file_gets_a_line_now_and_then_and_always_the_evaluations_and_the_end():
    progress, now, out = make_progress()
    with progress:
        for step in range(1, 101):
            now[0] += 1.0
            progress.update(step, METRICS | ({"eval/loss": 5.0} if step == 25 else {}))
    steps = [int(line.split()[1].split("/")[0]) for line in out.getvalue().splitlines()]
    assert steps == [1, 11, 21, 25, 35, 45, 55, 65, 75, 85, 95, 100]


def test_a_terminal_gets_one_live_line():
    progress, now, out = make_progress(terminal=True)
    with progress:
        for step in (1, 2):
            now[0] += 1.0
            progress.update(step, METRICS)
    text = out.getvalue()
    assert "\x1b[" in text and "step 2/100" in text and "0:01:38" in text


def test_other_ranks_are_silent():
    for terminal in (False, True):
        progress, now, out = make_progress(terminal=terminal, is_main=False)
        with progress:
            now[0] += 1.0
            progress.update(100, METRICS | {"eval/loss": 1.0})
        assert out.getvalue() == ""
