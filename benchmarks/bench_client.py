"""What the load generator costs: CPU per streamed token of `kvbaton bench serve` against a server that only writes.

    python benchmarks/bench_client.py --streams 32 --tokens 2000 --rate 50

A child process answers every stream with one token each `1 / rate` seconds, so only the client is measured. Prints
one JSON object. The lateness of tokens on the client's side is the gap's deviation from the server's period.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

from kvbaton.cluster.bench.serve import main as bench_main

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNK = (
    b'data: {"id":"cmpl-0123456789abcdef","object":"text_completion","created":1700000000,"model":"paced","choices":'
    b'[{"index":0,"text":" word","logprobs":null,"finish_reason":null,"token_ids":[1234]}],"usage":null}\n\n'
)
MODELS = b'{"object":"list","data":[{"id":"paced","object":"model","max_model_len":100000}]}'


def frame(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, period_s: float) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0] or b"0")
            body = json.loads(await reader.readexactly(length)) if length else {}
            if head.startswith(b"get"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(MODELS) + MODELS)
                continue
            await stream(writer, body["max_tokens"], period_s)
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def stream(writer: asyncio.StreamWriter, tokens: int, period_s: float) -> None:
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    writer.write(HEAD)
    for index in range(tokens):
        await asyncio.sleep(start_s + index * period_s - loop.time())
        writer.write(frame(CHUNK))
    writer.write(frame(b"data: [DONE]\n\n") + b"0\r\n\r\n")


def serve(port_sink: Connection, period_s: float) -> None:
    async def run() -> None:
        server = await asyncio.start_server(lambda r, w: answer(r, w, period_s), "127.0.0.1", 0)
        port_sink.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1000, help="tokens a stream")
    parser.add_argument("--rate", type=float, default=50.0, help="tokens a second of each stream")
    args = parser.parse_args()
    receiver, sender = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(sender, 1 / args.rate), daemon=True)
    server.start()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        bench_main(
            f"--url http://127.0.0.1:{receiver.recv()} --vocab-size 1000 --concurrency {args.streams} "
            f"--num-requests {args.streams} --output-tokens {args.tokens} --json {result}".split()
        )
        report = json.loads(result.read_text())["report"]
    server.terminate()
    server.join()
    itl = report["summary"]["latency"]["itl"]
    print(
        json.dumps(
            {
                "streams": args.streams,
                "tokens_per_s": report["summary"]["throughput"]["output_tokens_per_s"],
                "client_cpu_us_per_token": report["client"]["cpu_us_per_token"],
                "client_cpu_share": report["client"]["cpu_share"],
                "period_ms": 1000 / args.rate,
                "itl_p50_ms": 1000 * itl["p50"],
                "itl_p99_ms": 1000 * itl["p99"],
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
