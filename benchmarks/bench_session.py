"""CPU per streamed token of the session plane and the cluster client, without any model.

    python benchmarks/bench_session.py --streams 32 --steps 2000

wire    encoding one step's tokens into a frame, and decoding that frame
path    session server -> TCP -> session client -> cluster client -> one reader a stream, both ends in this process
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from dataclasses import dataclass, field

from kvbaton.cluster.client.client import ClusterClient
from kvbaton.cluster.session.messages import ToIngress
from kvbaton.cluster.session.server import SessionServer
from kvbaton.cluster.session.wire import Encoder, FrameReader, decode_message
from kvbaton.cluster.store.registry import Membership, Registration
from kvbaton.cluster.store.store import MemoryStore
from kvbaton.engine.orders import Submit
from kvbaton.engine.request import FinishReason, Request, SamplingParams, TokenOutput
from kvbaton.router.engine_info import EngineInfo, EngineLoad, EngineState, Role
from kvbaton.router.placement import RouterConfig
from kvbaton.router.router import Router

SECRET = b"benchmark"
LOAD = EngineLoad(running_requests=32, free_blocks=1000, step_s=0.01)


@dataclass
class SilentEngine:
    """Takes requests; the benchmark makes their tokens."""

    submits: list[tuple[int, Submit]] = field(default_factory=list)

    def submit(self, session_id: int, submit: Submit) -> None:
        self.submits.append((session_id, submit))

    def abort(self, session_id: int, request_id: str, sample: int | None) -> None: ...

    def session_lost(self, session_id: int) -> None: ...


def outputs_of(requests: list[Request], index: int, last: bool) -> list[TokenOutput]:
    finish = FinishReason.LENGTH if last else None
    return [TokenOutput(r.request_id, 0, 0, index, 151_000, finish=finish) for r in requests]


def measure_wire(requests: list[Request], steps: int) -> tuple[float, float]:
    """(encode, decode) in seconds a token."""
    encoder, reader = Encoder(), FrameReader(1 << 20)
    outputs = outputs_of(requests, 100, last=False)
    tokens = steps * len(requests)
    started = time.process_time()
    for _ in range(steps):
        frame = encoder.step(outputs, LOAD)
    encoded = time.process_time()
    for _ in range(steps):
        for body in reader.feed(frame):
            decode_message(body, ToIngress)
    return (encoded - started) / tokens, (time.process_time() - encoded) / tokens


async def read_to_end(client: ClusterClient, request: Request) -> int:
    return sum([len(batch) async for batch in client.generate(request)])


async def measure_path(requests: list[Request], steps: int) -> float:
    """Seconds of CPU a token, making the outputs not counted."""
    engine, store = SilentEngine(), MemoryStore()
    server = SessionServer(engine, "127.0.0.1", 0, SECRET, "h0", 1)
    port = await server.start()
    info = EngineInfo(
        "h0", 1, Role.HYBRID, EngineState.READY, "127.0.0.1", port, 1, "none", 1 << 20, 16, 1000, 512, 1 << 20
    )
    registration, membership = Registration(store, info), Membership(store)
    await registration.start()
    await membership.start()
    client = ClusterClient(membership, Router(RouterConfig(), time.monotonic, random.Random(0)), SECRET, "bench")
    await client.start()
    frames = [outputs_of(requests, index, index == steps - 1) for index in range(steps)]
    while not client.ready():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    readers = [asyncio.create_task(read_to_end(client, request)) for request in requests]
    while len(engine.submits) < len(requests):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    session_id = engine.submits[0][0]
    started = time.process_time()
    for frame in frames:
        server.publish(session_id, frame, LOAD)
        await asyncio.sleep(0.0005)  # a step's time, so that each frame is read by itself
    counts = await asyncio.gather(*readers)
    cpu_s = time.process_time() - started
    if set(counts) != {steps}:
        raise RuntimeError(f"expected {steps} tokens a stream, got {set(counts)}")
    await client.close()
    await registration.stop()
    await membership.close()
    await server.close()
    return cpu_s / (steps * len(requests))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    sampling = SamplingParams(max_tokens=options.steps)
    requests = [Request(f"chatcmpl-{i:032x}", (1, 2, 3), sampling) for i in range(options.streams)]
    encode_s, decode_s = measure_wire(requests, options.steps)
    path_s = asyncio.run(measure_path(requests, options.steps))
    print(f"wire   encode {encode_s * 1e6:.2f} us, decode {decode_s * 1e6:.2f} us a token at {options.streams} streams")
    print(f"path   {path_s * 1e6:.2f} us a token, both ends; the goal for the whole serving path is 400 us")


if __name__ == "__main__":
    main()
