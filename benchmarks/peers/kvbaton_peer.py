"""kvbaton's own engine as a peer: the worker that serves, driven by hand, without sockets."""

from __future__ import annotations

import itertools
from pathlib import Path

from protocol import serve

import kvbaton
from kvbaton.cluster.host.worker import Worker
from kvbaton.engine.config import BatchConfig, CacheConfig, EngineConfig
from kvbaton.engine.engine import Engine, configure_threads
from kvbaton.engine.orders import LegKind, Submit, Submitted
from kvbaton.engine.request import Request, SamplingParams


class NoHandoffs:
    """Requests stay local; a call would be a mistake."""

    def __getattr__(self, name):
        raise RuntimeError(f"a local request called {name} on the transfer agent")


def load(args):
    configure_threads(args.threads)
    cache = CacheConfig(kv_memory_bytes=2 << 30, prefix_cache=False)
    batch = BatchConfig(max_tokens_per_step=4096)
    engine = Engine.load(EngineConfig(Path(args.model), dtype=args.dtype, cache=cache, batch=batch))
    engine.cache.pool.zero_()  # memory that has been used before, as after the first minute of a server
    worker = Worker(engine, NoHandoffs(), batch)
    numbers = itertools.count()

    def generate(prompts, new_tokens, clock):
        sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        for prompt in prompts:
            request = Request(f"r{next(numbers)}", tuple(prompt), sampling, (0,))
            worker.handle(Submitted(1, Submit(request, LegKind.LOCAL, None)), 0.0)
        made, begun = 0, set()
        while worker.step(0.0):
            for outputs in worker.take_outputs().values():
                made += len(outputs)
                begun.update(output.request_id for output in outputs)
            if len(begun) == len(prompts):
                clock.first()
        return made

    return kvbaton.__version__, generate


if __name__ == "__main__":
    serve(load)
