"""From the configuration of a cluster to what its manager and engines are given."""

from __future__ import annotations

from kvbaton.cluster.host.engine_host import EngineHostSpec
from kvbaton.cluster.launch.devices import threads_per_engine
from kvbaton.cluster.launch.preflight import Launch
from kvbaton.cluster.pools.actors import EngineResources, ManagerSpec
from kvbaton.router.engine_info import Role

ENGINE_CPUS = 1.0


def manager_spec(launch: Launch) -> ManagerSpec:
    """Engine id, generation and role are left open: the manager fills them in for each engine."""
    config, device = launch.config, launch.preflight.device
    threads = threads_per_engine(config, device)
    template = EngineHostSpec(
        engine_id="",
        generation=0,
        role=Role.HYBRID,
        engine=config.engine_config(device, threads),
        secret=launch.secret,
        host="127.0.0.1" if config.ray.address is None else "",
        model_id=config.model_id,
        transfer=config.transfer,
        step_limit_s=config.hosting.step_timeout_on(device),
    )
    resources = EngineResources(
        num_cpus=ENGINE_CPUS,
        num_gpus=config.hosting.gpus if device == "cuda" else 0.0,
        environment=_environment(launch, threads),
        start_timeout_s=config.hosting.start_timeout_s,
        log_level=config.ray.log_level,
    )
    return ManagerSpec(launch.store, template, resources)


def _environment(launch: Launch, threads: int | None) -> tuple[tuple[str, str], ...]:
    """What must be set before an engine's process imports torch or UCX."""
    variables = [("UCX_TLS", launch.config.transfer.ucx_tls), ("HF_HUB_OFFLINE", "1")]
    if threads is not None:
        variables.append(("OMP_NUM_THREADS", str(threads)))
    return tuple(variables)
