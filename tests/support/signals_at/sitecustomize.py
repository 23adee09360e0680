"""Send signals at exact moments of a rank's life. Python imports this module first if its folder is on PYTHONPATH.

SIGNALS="rank:NAME:function:call[:launcher],..." sends the signal when a function of moe_dist (its qualified name within
the module) begins for the call-th time on that rank. It goes to the rank itself, or to the launcher above it; then the
rank waits until the launcher has passed the signal on.
"""

import os
import signal
import sys
import time


def arm(rules):
    """Install the rules: function -> [(signal, number of the call, whether to the launcher)]."""
    calls = dict.fromkeys(rules, 0)
    left = {(function, rule) for function in rules for rule in rules[function]}

    def on_event(frame, event, _):
        function = frame.f_code.co_qualname
        if event != "call" or function not in rules or "/moe_dist/" not in frame.f_code.co_filename:
            return
        calls[function] += 1
        due = [rule for rule in rules[function] if rule[1] == calls[function]]
        left.difference_update((function, rule) for rule in due)
        if not left:
            sys.setprofile(None)  # profiling slows a rank down
        for number, _, to_launcher in due:
            (by_way_of_the_launcher if to_launcher else signal.raise_signal)(number)

    sys.setprofile(on_event)


def by_way_of_the_launcher(number):
    came = []
    own = signal.signal(number, lambda *_: came.append(number))
    os.kill(os.getppid(), number)
    while not came:
        time.sleep(0.01)
    signal.signal(number, own)
    signal.raise_signal(number)


def rules_of(rank):
    rules = {}
    for rule in os.environ.get("SIGNALS", "").split(","):
        if rule.startswith(f"{rank}:"):
            _, name, function, call, *to = rule.split(":")
            rules.setdefault(function, []).append((signal.Signals[name], int(call), to == ["launcher"]))
    return rules


if rules_of(os.environ.get("RANK")):
    arm(rules_of(os.environ["RANK"]))
