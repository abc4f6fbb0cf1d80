"""The endpoint: a Ray Serve deployment of ingress replicas behind HAProxy, one port.

HAProxy sends each connection straight to a replica's own HTTP server. A client that leaves does not cancel work in an
engine by itself: the response generator's end does, through the session plane.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, ProxyLocation

from kvbaton.cluster.config import ClusterConfig
from kvbaton.cluster.ingress import Ingress, IngressSettings
from kvbaton.cluster.launch_types import Launch, LaunchFailed
from kvbaton.cluster.preflight import check_port
from kvbaton.cluster.reaper import MARKER_VARIABLE, processes_of

APP_NAME = "kvbaton"
INGRESS_CPUS = 1.0


class IngressDeployment:
    """The replica's shell: builds the application in its own process, after the replica's event loop runs."""

    def __init__(self, settings: IngressSettings, log_level: str) -> None:
        logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._settings = settings
        self._ingress: Ingress | None = None

    async def __serve_build_asgi_app__(self) -> Any:
        self._ingress = await Ingress.open(self._settings)
        return self._ingress.app()

    async def __del__(self) -> None:
        """Serve awaits this when it takes a replica down, after the last response."""
        if self._ingress is not None:
            await self._ingress.close()


class ServeApp:
    """Starts and stops the endpoint of a launch. Blocking calls, for the main thread."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def start(self) -> str:
        """Deploy and wait until it answers; returns the base URL. Raises `LaunchFailed` and `ConfigError`."""
        config = self._launch.config
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        try:
            serve.start(
                proxy_location=ProxyLocation.HeadOnly if config.ray.address is None else ProxyLocation.EveryNode,
                http_options=HTTPOptions(host=config.http.host, port=config.http.port),
            )
            serve.run(_application(self._launch), name=APP_NAME, route_prefix="/")
        except (RuntimeError, RayError) as error:
            # Somebody else may have taken the port since the first check: that says more.
            marker = os.environ.get(MARKER_VARIABLE, "")
            check_port(config.http, ours=processes_of(marker, str(self._launch.run_dir)))
            raise LaunchFailed(f"the endpoint did not start: {_last_line(error)}") from error
        return f"http://{_shown_host(config)}:{config.http.port}"

    def stop(self) -> None:
        """Take the endpoint down; responses in progress get `shutdown_timeout_s`."""
        serve.delete(APP_NAME)  # waits for them, which `shutdown` does not
        if self._launch.config.ray.address is None:
            serve.shutdown()


def _application(launch: Launch) -> Any:
    config = launch.config
    settings = IngressSettings(
        store=launch.store,
        secret=launch.secret,
        model=config.model.path.resolve(),
        model_id=config.model.served_name,
        max_model_len=config.model.max_model_len,
        router=config.router,
        http=config.http,
        api_keys=config.security.api_keys,
    )
    deployment = serve.deployment(
        serve.ingress()(IngressDeployment),
        name="ingress",
        num_replicas=config.http.replicas,
        max_ongoing_requests=config.http.max_ongoing_requests,
        graceful_shutdown_timeout_s=config.http.shutdown_timeout_s,
        ray_actor_options={"num_cpus": INGRESS_CPUS},
        health_check_period_s=5.0,
    )
    return deployment.bind(settings, config.ray.log_level)


def _shown_host(config: ClusterConfig) -> str:
    return "127.0.0.1" if config.http.host in ("0.0.0.0", "::", "") else config.http.host


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
