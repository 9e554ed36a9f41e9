"""Ray Serve: replicas of the server's application behind Ray's proxy, as docs/ray.md tells. Needs the extra `ray`.

    serve run pjax.ray_serve:build_app model=path/to/model max_replicas=4

Importing this loads neither Ray nor JAX. Ray builds the application wherever it likes; a replica reads its settings where it runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pjax.cli.common import ONE_HOST, add_engine, server_config
from pjax.cli.flags import add_fields, parse_mapping, settings_parser, values
from pjax.cli.serve import FLAGS
from pjax.errors import ConfigError, EngineDeadError
from pjax.server.server_config import ServerConfig

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve import Application

NAME = "pjax"  # of the deployment, for the `deployments` of a Serve config file
RAYS_OWN = ("model", "engine", "host", "port", "root_path", "ssl_certfile", "ssl_keyfile")  # the proxy listens, not a replica
TPU_CHIPS = (1, 2, 4, 8)  # that Ray gives to one actor
LATE = 10.0  # seconds beyond drain_seconds after which Ray ends a replica by force


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """What Ray decides by. Raises ConfigError when a value is out of its bounds."""

    num_replicas: int | None = None
    """So many replicas; without it between min_replicas and max_replicas, by the length of their queues."""
    min_replicas: int = 1
    """0 lets go of all of them when nobody asks; the next request then waits for the model to load."""
    max_replicas: int = 1
    """The most that queues can start."""
    target_ongoing_requests: float = 128.0
    """Requests that run or wait, for each replica: more start a replica, fewer end one."""
    upscale_delay: float = 30.0
    """Seconds that queues must be too long before a replica is started."""
    downscale_delay: float = 600.0
    """Seconds that they must be too short before one is ended."""
    max_ongoing_requests: int = 256
    """Requests that a replica is given at once; the proxy holds the others back."""
    num_cpus: float = 1.0
    """Cores of a replica, by which Ray places it."""
    num_gpus: float = 0.0
    """GPUs of a replica; it sees no others, and none at 0."""
    num_tpus: int = 0
    """TPU chips of a replica, Ray's resource "TPU": 1, 2, 4 or 8, all of one host."""
    accelerator_type: str | None = None
    """Ray's name of what a replica must have, such as H100 or TPU-V6E."""

    def __post_init__(self) -> None:
        for name, least in (("num_replicas", 1), ("min_replicas", 0), ("max_replicas", 1), ("max_ongoing_requests", 1)):
            value = getattr(self, name)
            if name == "num_replicas" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name} is {value!r}, but must be an integer >= {least}")
        for name in ("target_ongoing_requests", "upscale_delay", "downscale_delay", "num_cpus", "num_gpus"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
                raise ConfigError(f"{name} is {value!r}, but must be a number >= 0")
        if not 0 < self.target_ongoing_requests <= self.max_ongoing_requests:
            bound = f"(0, max_ongoing_requests], and that is {self.max_ongoing_requests}"
            raise ConfigError(f"target_ongoing_requests is {self.target_ongoing_requests!r}, but must be in {bound}")
        if self.num_replicas is not None and (self.min_replicas, self.max_replicas) != (1, 1):
            raise ConfigError(f"num_replicas is {self.num_replicas}, but min_replicas or max_replicas is given too")
        if self.min_replicas > self.max_replicas:
            raise ConfigError(f"min_replicas is {self.min_replicas}, but must be at most max_replicas, {self.max_replicas}")
        if isinstance(self.num_tpus, bool) or self.num_tpus not in (0, *TPU_CHIPS):
            raise ConfigError(f"num_tpus is {self.num_tpus!r}, but must be 0, {', '.join(map(str, TPU_CHIPS[:-1]))} or {TPU_CHIPS[-1]}")
        if self.num_gpus and self.num_tpus:
            raise ConfigError(f"num_gpus is {self.num_gpus:g} and num_tpus is {self.num_tpus}, but a replica runs on one of them")

    def check_devices(self, tensor_parallel_size: int) -> None:
        """ConfigError when a replica has fewer devices than its model is divided over; of CPU devices Ray knows nothing."""
        devices = self.num_gpus or self.num_tpus
        if devices and math.ceil(devices) < tensor_parallel_size:
            raise ConfigError(f"tensor_parallel_size is {tensor_parallel_size}, but a replica has {devices:g} devices")

    def options(self, drain_seconds: float) -> dict[str, Any]:
        """What `ray.serve.deployment` is told."""
        actor: dict[str, Any] = {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}
        if self.num_tpus:
            actor["resources"] = {"TPU": self.num_tpus}
        if self.accelerator_type is not None:
            actor["accelerator_type"] = self.accelerator_type
        chosen: dict[str, Any] = {"num_replicas": self.num_replicas}
        if self.num_replicas is None:
            names = ("min_replicas", "max_replicas", "target_ongoing_requests")
            delays = {"upscale_delay_s": self.upscale_delay, "downscale_delay_s": self.downscale_delay}
            chosen = {"autoscaling_config": {name: getattr(self, name) for name in names} | delays}
        return chosen | {
            "name": NAME,
            "max_ongoing_requests": self.max_ongoing_requests,
            "ray_actor_options": actor,
            "graceful_shutdown_timeout_s": drain_seconds + LATE,
        }


def read(args: Mapping[str, Any]) -> tuple[RayConfig, ServerConfig]:
    """Settings from an application's arguments: the flags of `pjax serve` by their names, and RayConfig's fields.

    The environment wins over them, as over a file. Raises ConfigError for a wrong value or an unknown name.
    """
    parser = settings_parser("build_app")
    parser.add_argument("--model")
    add_fields(parser, RayConfig, "ray")
    add_fields(parser, ServerConfig, "server", leave_out=RAYS_OWN, flags=FLAGS)
    add_engine(parser, ONE_HOST)
    found = parse_mapping(parser, args)
    ray, server = RayConfig(**values(RayConfig, found)), server_config(found)
    ray.check_devices(server.engine.tensor_parallel_size)
    return ray, server


class Replica:
    """One engine with the server's application around it."""

    def __init__(self, args: Mapping[str, Any]) -> None:
        from pjax.server import lifecycle, logs

        _, config = read(args)
        logs.set_up(config.log_level, config.log_format)
        self.config = lifecycle.with_seed(lifecycle.with_template(config))
        self.llm = lifecycle.open_engine(self.config)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray once, in the event loop that will serve. The metrics' label `engine` is the replica's id."""
        from ray import serve

        from pjax.server import lifecycle

        return lifecycle.make_app(self.llm, self.config, serve.get_replica_context().replica_id.unique_id)

    async def check_health(self) -> None:
        """Asked by Ray every few seconds; it starts another replica when this raises."""
        if not self.llm.is_running:
            error = self.llm.error
            raise EngineDeadError(f"the engine died: {type(error).__name__}: {error}" if error else "the engine is shut down")

    def __del__(self) -> None:
        """Called by Ray when the last request has ended, or its time is up."""
        if hasattr(self, "llm"):
            self.llm.close()


def build_app(args: dict[str, Any]) -> Application:
    """The Serve application, for `serve run` and Serve config files; see `read` for its arguments.

    Raises ConfigError for a wrong setting, before anything is started.
    """
    from ray import serve

    ray, server = read(args)
    return serve.deployment(**ray.options(server.drain_seconds))(serve.ingress()(Replica)).bind(dict(args))
