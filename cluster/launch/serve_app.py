"""The endpoint: a Ray Serve deployment of ingress replicas behind HAProxy, one port.

HAProxy sends each connection straight to a replica's own HTTP server. A client that leaves does not cancel work in an
engine by itself: the response generator's end does, through the session plane.

Shutdown: every replica is told how much time its responses have left, and ends those that run out of it with an error.
Serve, which would cut them without a word, waits a little longer.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.exceptions import RayServeException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvbaton.cluster.config.cluster_config import ClusterConfig
from kvbaton.cluster.ingress.ingress import Ingress, IngressSpec
from kvbaton.cluster.launch.ports import check_port
from kvbaton.cluster.launch.preflight import Launch, LaunchFailed
from kvbaton.cluster.launch.reaper import MARKER_VARIABLE, processes_of

APP_NAME = "kvbaton"
INGRESS_CPUS = 1.0
_TELL_S = 5.0
_LAST_WORDS_S = 10.0  # for responses to end after their time: Serve looks for the end of the last one every 0.5 s
_DRAIN_POLL_S = 0.5

log = logging.getLogger(__name__)


class IngressDeployment:
    """The replica's shell: builds the application in its own process, after the replica's event loop runs."""

    def __init__(self, spec: IngressSpec, log_level: str) -> None:
        logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._spec = spec
        self._ingress: Ingress | None = None

    async def __serve_build_asgi_app__(self) -> Any:
        self._ingress = await Ingress.open(self._spec)
        return _without_own_id(self._ingress.app())

    async def stop_in(self, seconds: float) -> None:
        """See `Ingress.stop_in`."""
        if self._ingress is not None:
            self._ingress.stop_in(seconds)

    async def __del__(self) -> None:
        """Serve awaits this when it takes a replica down, after the last response."""
        if self._ingress is not None:
            await self._ingress.close()


def _without_own_id(app: ASGIApp) -> ASGIApp:
    """`app` without the X-Request-Id of its answers: Serve puts one on each, the client's own where it sent one, and
    clients would read the two as one id."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [header for header in message["headers"] if header[0].lower() != b"x-request-id"]
                message = {**message, "headers": headers}
            await send(message)

        await app(scope, receive, send_on)

    return answer


class ServeApp:
    """Starts and stops the endpoint of a launch. Blocking calls, for the main thread."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._deployed = False

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
            # Somebody else may have taken the port since the first check: that says more, if it is known who.
            marker = os.environ.get(MARKER_VARIABLE, "")
            check_port(config.http, ours=[None, *processes_of(marker, str(self._launch.run_dir))])
            raise LaunchFailed(f"the endpoint did not start: {_last_line(error)}") from error
        self._deployed = True
        return f"http://{_shown_host(config)}:{config.http.port}"

    def stop(self) -> None:
        """Take the endpoint down; responses in progress get `shutdown_timeout_s`."""
        config = self._launch.config
        if self._deployed:
            self._tell_replicas(config.http.shutdown_timeout_s)
        deadline = time.monotonic() + config.http.shutdown_timeout_s + _LAST_WORDS_S
        while not _deleted() and time.monotonic() < deadline:
            pass
        if config.ray.address is None:
            serve.shutdown()

    def _tell_replicas(self, seconds: float) -> None:
        """What is not told is cut when Serve's own patience ends."""
        try:
            serve.get_app_handle(APP_NAME).broadcast("stop_in", seconds).results(timeout_s=_TELL_S)
        except (RuntimeError, TimeoutError, RayError, RayServeException) as error:
            log.warning("the end was not told to every ingress: %s", error)


def _deleted() -> bool:
    """Waits for responses in progress, which `serve.shutdown` does not, but for a minute at most: False then."""
    try:
        serve.delete(APP_NAME)
    except TimeoutError:
        return False
    return True


def _application(launch: Launch) -> Any:
    config = launch.config
    spec = IngressSpec(
        store=launch.store,
        secret=launch.secret,
        model=config.engine.model.resolve(),
        model_id=config.model_id,
        max_model_len=config.engine.max_model_len,
        router=config.router,
        client=config.client,
        http=config.http,
        api_keys=config.security.api_keys,
    )
    deployment = serve.deployment(
        serve.ingress()(IngressDeployment),
        name="ingress",
        num_replicas=config.http.replicas,
        max_ongoing_requests=config.http.max_ongoing_requests,
        graceful_shutdown_wait_loop_s=_DRAIN_POLL_S,
        graceful_shutdown_timeout_s=config.http.shutdown_timeout_s + _LAST_WORDS_S,
        ray_actor_options={"num_cpus": INGRESS_CPUS},
        health_check_period_s=5.0,
    )
    return deployment.bind(spec, config.ray.log_level)


def _shown_host(config: ClusterConfig) -> str:
    return "127.0.0.1" if config.http.host in ("0.0.0.0", "::", "") else config.http.host


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
