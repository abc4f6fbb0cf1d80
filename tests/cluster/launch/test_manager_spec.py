"""What engines are given, from the file to the spec that travels to their process."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from kvbaton.cluster.config.config_file import build
from kvbaton.cluster.launch.manager_spec import manager_spec
from kvbaton.cluster.launch.preflight import Launch, Preflight
from kvbaton.cluster.pools.actors import ManagerSpec
from kvbaton.cluster.store.store import StoreAddress
from kvbaton.engine.model.hf_config import load_model_config
from support.oracle import TinyModels


def spec_of(model: Path, device: str, **sections: dict[str, object]) -> ManagerSpec:
    config = build({"model": {"path": str(model), "name": "served"}, **sections})
    preflight = Preflight(load_model_config(model), device, num_gpus=1)
    return manager_spec(Launch(config, preflight, Path("/run"), StoreAddress("redis://r", "kv"), b"secret"))


@pytest.mark.parametrize(
    ("device", "num_gpus", "fraction", "step_limit_s"), [("cpu", 0.0, 0.45, 300.0), ("cuda", 0.5, 0.45, 60.0)]
)
def test_settings_reach_the_engines(
    tiny_model: TinyModels, device: str, num_gpus: float, fraction: float, step_limit_s: float
) -> None:
    """Guards a setting that is read, checked, documented, and then used by nobody."""
    transfer: dict[str, object] = {"lease_s": 4, "ucx_tls": "tcp", "bandwidth_floor": "1MB"}
    engine: dict[str, object] = {"gpus": 0.5, "start_timeout_s": 9, "max_running": 7, "block_size": 8}
    spec = spec_of(tiny_model("llama"), device, engine=engine, transfer=transfer)
    assert (spec.resources.num_gpus, spec.resources.start_timeout_s) == (num_gpus, 9.0)
    assert ("UCX_TLS", "tcp") in spec.resources.environment
    template = spec.template
    assert (template.model_id, template.step_limit_s, template.engine.device) == ("served", step_limit_s, device)
    assert (template.transfer.lease_s, template.transfer.bandwidth_floor_bytes_s) == (4.0, 10**6)
    assert (template.engine.batch.max_running, template.engine.cache.block_size) == (7, 8)
    assert template.engine.cache.gpu_memory_fraction == pytest.approx(fraction)


def test_a_spec_travels(tiny_model: TinyModels) -> None:
    """Guards the way to Ray's processes: frozen objects that check themselves must come out as they went in."""
    spec = spec_of(tiny_model("llama"), "cpu")
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_the_largest_share_of_the_smallest_gpu_share_is_allowed(tiny_model: TinyModels) -> None:
    """Guards the product of two fractions, which is checked like one that an operator sets."""
    spec = spec_of(tiny_model("llama"), "cuda", engine={"gpus": 0.01, "gpu_memory_fraction": 0.01})
    assert spec.template.engine.cache.gpu_memory_fraction == pytest.approx(1e-4)
