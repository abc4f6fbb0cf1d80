"""The `kvbaton` command. What a subcommand needs is imported when it runs: `--version` needs only Python itself."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvbaton import __version__

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand: `run` gets the arguments after its name and returns the exit status."""

    name: str
    help: str
    run: Callable[[list[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 used wrongly, 130 when Ctrl-C came where the subcommand does not expect it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser("kvbaton", _COMMANDS)
    parser.add_argument("--version", action="version", version=f"kvbaton {__version__}")
    try:
        return _dispatch(parser, _COMMANDS, arguments)
    except KeyboardInterrupt:  # while the subcommand is still being imported, for one
        sys.stderr.write("interrupted\n")
        return EXIT_INTERRUPTED


def _parser(program: str, commands: Sequence[Command]) -> argparse.ArgumentParser:
    width = max(len(command.name) for command in commands)
    listed = "\n".join(f"  {command.name:<{width}}  {command.help}" for command in commands)
    parser = argparse.ArgumentParser(
        prog=program,
        description="A disaggregated prefill/decode LLM server.",
        epilog=f"commands:\n{listed}\n\n'{program} COMMAND --help' says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=[command.name for command in commands], metavar="COMMAND", nargs="?")
    return parser


def _dispatch(parser: argparse.ArgumentParser, commands: Sequence[Command], arguments: list[str]) -> int:
    """Options before the subcommand are the parser's; all after it belong to the subcommand."""
    chosen = parser.parse_args(arguments[:1])
    if chosen.command is None:
        parser.print_help()
        return EXIT_USAGE
    command = next(item for item in commands if item.name == chosen.command)
    return command.run(arguments[1:])


def _serve(arguments: list[str]) -> int:
    from kvbaton.cluster.launch import serve_command

    return serve_command.main(arguments)


def _config(arguments: list[str]) -> int:
    from kvbaton.cluster.config import config_command

    return config_command.main(arguments)


def _bench(arguments: list[str]) -> int:
    return _dispatch(_parser("kvbaton bench", _BENCHMARKS), _BENCHMARKS, arguments)


def _bench_serve(arguments: list[str]) -> int:
    from kvbaton.cluster.bench import serve

    return serve.main(arguments)


def _bench_transfer(arguments: list[str]) -> int:
    from kvbaton.kvtransfer.bench import main as bench_transfer

    return bench_transfer(arguments)


def _make_model(arguments: list[str]) -> int:
    from kvbaton.engine import tiny

    return tiny.main(arguments, program="kvbaton make-model")


def _env(arguments: list[str]) -> int:
    from kvbaton.cluster.launch import env_report

    argparse.ArgumentParser(prog="kvbaton env", description="Versions and devices, for bug reports.").parse_args(
        arguments
    )
    sys.stdout.write(env_report.report())
    return EXIT_OK


_COMMANDS = (
    Command("serve", "start a cluster with its endpoint; Ctrl-C stops all of it", _serve),
    Command("config", "print every setting with its default, or check a file", _config),
    Command("bench", "measure an endpoint (serve) or KV transfer (transfer)", _bench),
    Command("make-model", "write a tiny random checkpoint to try things with", _make_model),
    Command("env", "versions and devices, for bug reports", _env),
)
_BENCHMARKS = (
    Command("serve", "load on an OpenAI-compatible endpoint: TTFT, TPOT, ITL, goodput", _bench_serve),
    Command("transfer", "KV blocks through the real hand-off path, beside ucx_perftest", _bench_transfer),
)


if __name__ == "__main__":
    sys.exit(main())
