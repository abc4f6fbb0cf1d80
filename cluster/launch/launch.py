"""Starts a whole cluster from one process and takes it down again: what `kvbaton serve` runs.

    check ── Redis (embedded or given) ── Ray ── manager and engines ── endpoint ── wait ── everything down, in reverse

Each part that starts registers its own end at once. What is left after that, or after a launcher that was killed, the
`Reaper` ends: a small process that was started first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvbaton.cluster.config.cluster_config import ClusterConfig
from kvbaton.cluster.launch import ray_cluster
from kvbaton.cluster.launch.devices import count_cores
from kvbaton.cluster.launch.ports import PortClaims
from kvbaton.cluster.launch.preflight import Launch, LaunchFailed, Preflight, check_launch
from kvbaton.cluster.launch.reaper import MARKER_VARIABLE, Reaper
from kvbaton.cluster.launch.screen import Screen, Step
from kvbaton.cluster.launch.stop_signals import StopSignals
from kvbaton.cluster.pools.manager import ManagerLost, PoolView
from kvbaton.cluster.store.store import StoreAddress
from kvbaton.cluster.store.valkey import EmbeddedValkey
from kvbaton.router.engine_info import EngineInfo
from kvbaton.settings import ConfigError

if TYPE_CHECKING:
    from kvbaton.cluster.pools.manager_client import ManagerClient

log = logging.getLogger(__name__)

_SPARE_CPUS = 64  # tickets for engines that are added later; a private cluster counts engines, not cores


@dataclass(frozen=True, slots=True)
class Cluster:
    """The engines that are up, and the manager that keeps them so."""

    manager: ManagerClient
    view: PoolView

    @property
    def engines(self) -> list[EngineInfo]:
        return [engine.info for engine in self.view.engines if engine.info is not None]


def serve(config: ClusterConfig, screen: Screen, signals: StopSignals) -> int:
    """Run a cluster until Ctrl-C. Returns the exit status: 0 after Ctrl-C, 1 when a part failed to start, 2
    for a configuration that cannot work."""
    marker = secrets.token_hex(16)
    with _run_dir(marker) as run_dir, ExitStack() as stack:
        os.environ[MARKER_VARIABLE] = marker
        stack.enter_context(_library_output(run_dir, config.ray.log_level))
        try:
            signals.catch()
            with _own_port(config) as config:
                launch = _start_base(config, run_dir, screen, stack, signals)
                cluster = _start_engines(launch, screen, stack, signals)
                _start_endpoint(launch, cluster, screen, stack, signals)
            signals.catch()
            _watch(cluster, screen)
        except KeyboardInterrupt:
            screen.line(_farewell(config))
        except ConfigError as error:
            screen.error(str(error))
            return 2
        except (LaunchFailed, ManagerLost) as error:
            screen.error(str(error))
            return 1
        finally:
            signals.ending(screen.line)
            stack.close()
    screen.line("stopped")
    return 0


def _farewell(config: ClusterConfig) -> str:
    return f"stopping ... (responses in progress have {config.http.shutdown_timeout_s:g} s; Ctrl-C again cuts them)"


@contextmanager
def _run_dir(marker: str) -> Iterator[Path]:
    """The folder of this launch, with a reaper that removes it."""
    folder = ray_cluster.make_run_dir()
    with Reaper(marker, folder):
        yield folder


def _start_base(config: ClusterConfig, run_dir: Path, screen: Screen, stack: ExitStack, signals: StopSignals) -> Launch:
    """Checks, the shared state and Ray."""
    with screen.step("checks", "model, port, devices") as step:
        preflight = check_launch(config)
        pools = config.pools
        step.result = (
            f"{config.model_id}: {preflight.model.architecture.value}, {pools.prefill} prefill, "
            f"{pools.decode} decode, {pools.hybrid} hybrid on {preflight.device}"
        )
    with screen.step("state", "starting") as step:
        store_url, step.result = _open_store(config, run_dir, stack)
    with screen.step("ray", "starting") as step:
        _open_ray(config, preflight, run_dir, stack, signals)
        signals.catch()
        step.result = config.ray.address or f"private cluster, its logs in {run_dir}"
    secret = (config.security.cluster_secret or secrets.token_hex(32)).encode()
    return Launch(config, preflight, run_dir, StoreAddress(store_url, config.store.prefix), secret)


@contextmanager
def _own_port(config: ClusterConfig) -> Iterator[ClusterConfig]:
    """The configuration with its endpoint's port, claimed against other launches of this machine in the meantime. Port
    0 asks for any that is free."""
    with closing(PortClaims()) as claims:
        if config.http.port == 0:
            config = replace(config, http=replace(config.http, port=claims.free(1)[0]))
        elif config.ray.address is None:  # else the Serve of that cluster, on other machines too, has its ports
            claims.endpoint(config.http)
        yield config


def _open_store(config: ClusterConfig, run_dir: Path, stack: ExitStack) -> tuple[str, str]:
    """(URL, what to show)."""
    if config.store.redis is not None:
        return config.store.redis, "Redis as given"
    server = EmbeddedValkey(run_dir)
    stack.callback(server.stop)
    return server.start(), f"embedded Valkey on 127.0.0.1:{server.port}"


def _open_ray(
    config: ClusterConfig, preflight: Preflight, run_dir: Path, stack: ExitStack, signals: StopSignals
) -> None:
    if config.ray.address is None:
        claims = stack.enter_context(closing(PortClaims()))  # to the end: Serve may open one of these ports late
        os.environ.update(ray_cluster.private_environment(run_dir, config.http, claims))
    with signals.kept():
        import ray
    if config.ray.address is not None:
        ray_cluster.join(config.ray)
    else:
        tickets = max(count_cores(), 2 * config.pools.total + config.http.replicas) + _SPARE_CPUS
        ray_cluster.start_private(run_dir, config.ray, ray_cluster.RayResources(tickets, preflight.num_gpus))
    stack.callback(_quietly, ray.shutdown)


def _start_engines(launch: Launch, screen: Screen, stack: ExitStack, signals: StopSignals) -> Cluster:
    """The manager, and the engines once every one is up."""
    with signals.kept():
        from kvbaton.cluster.launch.manager_spec import manager_spec
        from kvbaton.cluster.pools.manager_client import ManagerClient

    with screen.step("engines", "starting") as step:
        manager = ManagerClient.start(manager_spec(launch), launch.config.pools)
        stack.callback(_quietly, manager.stop)
        view = _settled(manager.views(), step)
        step.result = f"{len(view.engines)} ready"
    return Cluster(manager, view)


def _settled(views: Iterator[PoolView], step: Step) -> PoolView:
    """The first view in which every engine is up. Raises `LaunchFailed` when one does not start."""
    for view in views:
        for engine in view.engines:
            if engine.failures > 0:
                raise LaunchFailed(f"{engine.engine_id} ({engine.role}) did not start: {engine.reason}")
        ready = sum(engine.ready for engine in view.engines)
        step.note(f"{ready} of {view.desired.total if view.desired else '?'} ready")
        if view.settled:
            return view
    raise LaunchFailed("the manager ended before the engines were up")


def _start_endpoint(launch: Launch, cluster: Cluster, screen: Screen, stack: ExitStack, signals: StopSignals) -> None:
    with signals.kept():
        from kvbaton.cluster.launch.first_request import links_of, send_first_request
        from kvbaton.cluster.launch.serve_app import ServeApp

    app = ServeApp(launch)
    with screen.step("endpoint", "starting") as step:
        stack.callback(_quietly, app.stop)
        base_url = app.start()
        step.result = base_url
    with screen.step("check", "first request") as step:
        seconds = send_first_request(base_url, launch, cluster.engines)
        step.result = f"first request answered in {seconds * 1000:.0f} ms"
    screen.pools(cluster.engines)
    screen.links(links_of(cluster.manager.stats(cluster.view)))
    screen.endpoint(base_url, launch.config.model_id, bool(launch.config.security.api_keys))


def _watch(cluster: Cluster, screen: Screen) -> None:
    """Say what happens to engines, until a signal ends it."""
    shown = {engine.engine_id: (engine.generation, engine.state) for engine in cluster.view.engines}
    for view in cluster.manager.views():
        for engine in view.engines:
            now = (engine.generation, engine.state)
            if shown.get(engine.engine_id) != now:
                reason = f": {engine.reason}" if engine.reason else ""
                screen.line(f"{engine.engine_id}/{engine.generation} ({engine.role}) {engine.state}{reason}")
            shown[engine.engine_id] = now


@contextmanager
def _library_output(run_dir: Path, log_level: str) -> Iterator[None]:
    """What libraries print by themselves goes to a file, unless the user asked for details."""
    if log_level in ("debug", "info"):
        yield
        return
    with (
        (run_dir / "launcher.log").open("a", buffering=1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        yield


def _quietly(end: Callable[[], object]) -> None:
    """Run one ending; what it raises must not keep the others from running."""
    try:
        end()
    except Exception as error:  # the process ends: said, not raised
        log.warning("while stopping: %s: %s", type(error).__name__, error)
