"""What every peer script shares; standard library only, for it runs in the peers' own environments.

A peer loads a model, says it is ready, then answers one JSON line with one JSON line:

    {"prompts": [[ids]], "new_tokens": n} -> {"first_wall", "first_cpu", "wall", "cpu", "tokens"}

`first_*` are seconds until every sequence has its first token, the others until all have `new_tokens`. CPU seconds are
those of all threads of the process. Whatever a library prints goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable


class Clock:
    """Wall and CPU seconds since the start, and at the moment when `first` is called for the first time."""

    def __init__(self):
        self.started = (time.perf_counter(), time.process_time())
        self.at_first = None

    def first(self):
        if self.at_first is None:
            self.at_first = self.now()

    def now(self):
        return time.perf_counter() - self.started[0], time.process_time() - self.started[1]


Generate = Callable[[list[list[int]], int, Clock], int]


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    return parser.parse_args()


def serve(load: Callable[[argparse.Namespace], tuple[str, Generate]]):
    """`load(arguments)` gives a version and a function that returns how many tokens it made."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    args = arguments()

    def reply(value):
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    try:
        version, generate = load(args)
    except Exception as error:  # any reason not to run is the answer
        reply({"error": f"{type(error).__name__}: {error}"})
        raise
    reply({"version": version})
    for line in sys.stdin:
        job = json.loads(line)
        clock = Clock()
        try:
            tokens = generate(job["prompts"], job["new_tokens"], clock)
        except Exception as error:
            reply({"error": f"{type(error).__name__}: {error}"})
            continue
        wall, cpu = clock.now()
        first_wall, first_cpu = clock.at_first or (wall, cpu)
        reply({"first_wall": first_wall, "first_cpu": first_cpu, "wall": wall, "cpu": cpu, "tokens": tokens})
