"""ucxx and the UCX below it, loaded when a UcxTransport is made and not before.

These settings of UCX differ from its defaults, each left alone where the environment sets it:

* POSIX/SYSV_ERROR_HANDLING=y: UCX drops shared memory in silence from an endpoint that must survive its peer's death,
  and falls back to TCP.
* RNDV_THRESH=inf, ZCOPY_THRESH=0 for blocks in host memory: every landing block has its receive posted before the
  sender may send, so the eager protocol needs no round trip, copies nothing on the sender's side and, unlike
  rendezvous, never lets one process address the other's memory. On a GPU rendezvous stays: it is how UCX moves GPU
  memory directly.
* TCP segments of 256 KiB for the same path.
* NET_DEVICES=lo for an engine that listens on a loopback address: UCX's own TCP sockets else listen on every interface.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
from collections.abc import Mapping
from typing import Any

from kvbaton.kvtransfer.transport import BlockMemory, TransportError

_ALWAYS = {"POSIX_ERROR_HANDLING": "y", "SYSV_ERROR_HANDLING": "y"}
_HOST_MEMORY = {
    "RNDV_THRESH": "inf",
    "ZCOPY_THRESH": "0",
    "TCP_TX_SEG_SIZE": "256K",
    "TCP_RX_SEG_SIZE": "256K",
}


def load_ucxx() -> Any:
    """The low-level module of ucxx. Raises TransportError when it is not installed: nothing stands in for UCX."""
    chosen = {name: os.environ.get(f"UCX_{name}") for name in _HOST_MEMORY}
    os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
    try:
        import ucxx._lib.libucxx as libucxx
    except ImportError as error:
        raise TransportError(f"KV transfer needs UCX: install ucxx-cu13 ({error})") from error
    for name, value in chosen.items():  # importing ucxx writes defaults of its own into the environment
        if value is None:
            os.environ.pop(f"UCX_{name}", None)
    return libucxx


def ucx_config(host: str, on_gpu: bool, overrides: Mapping[str, str]) -> dict[str, str]:
    """Settings for UCXContext, without the UCX_ prefix. The environment wins over ours, `overrides` over both."""
    ours = dict(_ALWAYS) if on_gpu else {**_ALWAYS, **_HOST_MEMORY}
    if is_loopback(host):
        ours["NET_DEVICES"] = "lo"
    return {name: v for name, v in ours.items() if f"UCX_{name}" not in os.environ} | dict(overrides)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name that may be anywhere
        return False


def array_of(buffer: Any) -> Any:
    """ucxx's view of a buffer or of an object with `__cuda_array_interface__`; copies nothing."""
    from ucxx._lib.arr import Array

    return Array(buffer)


class BlockArrays:
    """ucxx's views of a memory's blocks, made once each: a view costs more than the call that uses it."""

    def __init__(self, memory: BlockMemory) -> None:
        self._memory = memory
        self._arrays: dict[int, Any] = {}
        self.empty = array_of(bytearray())

    def of(self, block_id: int) -> Any:
        array = self._arrays.get(block_id)
        if array is None:
            array = self._arrays[block_id] = array_of(self._memory.block(block_id))
        return array


class _TransportEntry(ctypes.Structure):
    _fields_ = (("transport_name", ctypes.c_char_p), ("device_name", ctypes.c_char_p))


class _Transports(ctypes.Structure):
    _fields_ = (
        ("entries", ctypes.POINTER(_TransportEntry)),
        ("num_entries", ctypes.c_uint),
        ("entry_size", ctypes.c_size_t),
    )


class _EndpointAttributes(ctypes.Structure):
    """ucp_ep_attr_t of UCX 1.12 and later."""

    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("name", ctypes.c_char * 32),
        ("local_sockaddr", ctypes.c_char * 128),
        ("remote_sockaddr", ctypes.c_char * 128),
        ("transports", _Transports),
        ("user_data", ctypes.c_void_p),
    )


_FIELD_TRANSPORTS = 1 << 3
_MAX_TRANSPORTS = 32


def endpoint_transports(endpoint_handle: int) -> str:
    """The transports and devices that UCX has chosen for an endpoint, such as "cma/memory, posix/memory"."""
    entries = (_TransportEntry * _MAX_TRANSPORTS)()
    attributes = _EndpointAttributes(field_mask=_FIELD_TRANSPORTS)
    attributes.transports = _Transports(entries, _MAX_TRANSPORTS, ctypes.sizeof(_TransportEntry))
    query = ctypes.CDLL("libucp.so.0").ucp_ep_query
    query.argtypes = (ctypes.c_void_p, ctypes.POINTER(_EndpointAttributes))
    status = query(endpoint_handle, ctypes.byref(attributes))
    if status != 0:
        return f"unknown (UCX status {status})"
    chosen = entries[: attributes.transports.num_entries]
    names = {f"{e.transport_name.decode()}/{e.device_name.decode()}" for e in chosen if e.transport_name}
    return ", ".join(sorted(names))
