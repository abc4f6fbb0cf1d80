"""Compiles `native/*.c` once for this machine and keeps the library in the user's cache folder.

    <cache>/kvbaton/native-<digest>.so      digest of sources, compiler, flags and the processor's features

A home folder shared by different machines holds one library for each kind. Any number of processes may start at once:
one compiles, the others wait for it at a lock on the folder, which its holder's death releases too. Where a file
system has no such locks several compile the same thing; a library appears under its name only when complete (rename).
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "native"
SWITCH = "KVBATON_NATIVE"  # "0" turns native kernels off; KVBATON_AMX=0 only what native/amx.h does
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared", "-fvisibility=default")
LIBRARIES = ("-lpthread", "-lm")
_TIMEOUT_S = 600


class NativeUnavailable(RuntimeError):
    """There is no native library here; the message says why."""


def built_library() -> Path:
    """The library's path, compiled now if it is not there yet. Raises `NativeUnavailable`."""
    if os.environ.get(SWITCH) == "0":
        raise NativeUnavailable(f"{SWITCH}=0")
    compiler = _compiler()
    path = _cache_folder() / f"native-{_digest(compiler)}.so"
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NativeUnavailable(f"{path.parent} cannot be made: {error}") from error
    with _alone(path.parent):
        if not path.exists():
            _compile(compiler, path)
    return path


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; nobody is kept out where the file system has no locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("another process is compiling CPU kernels; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            log.info("no lock on %s: %s", folder, error)
        yield
    finally:
        os.close(handle)


def _compiler() -> str:
    named = os.environ.get("CC")
    for name in (named,) if named else ("gcc", "cc"):
        found = shutil.which(name)
        if found:
            return found
    raise NativeUnavailable(f"no C compiler: {named or 'gcc or cc'} is not on the PATH; install one or name it in CC")


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kvbaton"


def _digest(compiler: str) -> str:
    state = hashlib.blake2b(digest_size=12)
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".c", ".h"):
            state.update(source.name.encode() + source.read_bytes())
    state.update(" ".join((compiler, _version(compiler), *FLAGS, _processor())).encode())
    return state.hexdigest()


def _version(compiler: str) -> str:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailable(f"{compiler} --version failed: {error}") from error


def _processor() -> str:
    """What `-march=native` looks at, as far as Linux says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    wanted = ("model name", "cpu family", "model", "flags", "Features", "CPU part")
    seen = {line for line in lines if line.split(":")[0].strip() in wanted}
    return platform.machine() + "\n".join(sorted(seen))


def _compile(compiler: str, path: Path) -> None:
    """Into a temporary file, then renamed into place."""
    try:
        handle, name = tempfile.mkstemp(suffix=".so", dir=path.parent)
    except OSError as error:
        raise NativeUnavailable(f"{path.parent} is not writable: {error}") from error
    os.close(handle)
    unfinished = Path(name)
    sources = [str(source) for source in sorted(SOURCES.glob("*.c"))]
    command = [compiler, *FLAGS, *sources, "-o", name, *LIBRARIES]
    log.info("compiling CPU kernels into %s", path)
    try:
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S)
        unfinished.replace(path)
    except subprocess.CalledProcessError as error:
        raise NativeUnavailable(f"{compiler} failed: {error.stderr.strip()[-500:]}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailable(f"{compiler} failed: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
