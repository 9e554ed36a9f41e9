"""The server from start to end: port, engine, requests, drain."""

from __future__ import annotations

import asyncio
import errno
import logging
import secrets
import signal
import socket
import ssl
import sys
from dataclasses import replace
from types import FrameType

import uvicorn
from fastapi import FastAPI
from sse_starlette.sse import AppStatus

from pjax.ending import end_now
from pjax.engine import AsyncLLM
from pjax.errors import ConfigError
from pjax.hosts import find_place
from pjax.server.app import create_app
from pjax.server.bridge import Bridge
from pjax.server.connections import protocol
from pjax.server.logs import set_up
from pjax.server.server_config import ServerConfig
from pjax.server.threads import Unjoined
from pjax.text.chat_template import read_template

log = logging.getLogger("pjax.server")

BACKLOG = 2048  # connections that wait until they are accepted; those that come while the model is loaded wait for it
WATCH = 0.25  # seconds between two looks at the engine
LATE = 5.0  # seconds that requests get to say that they were cut off


def serve(config: ServerConfig) -> int:
    """Serves until it is told to end; see `pjax.server.run`. Ends the process itself when the engine's thread does not end."""
    set_up(config.log_level, config.log_format)
    config = with_template(config)
    check_certificate(config)
    if (place := find_place(config.engine)) is not None and place.rank > 0:
        open_engine(config)  # runs what rank 0 says and ends the process with it: it takes no port and answers nobody
    config = with_seed(config)
    with bind(config.host, config.port) as listener:
        llm = open_engine(config)
        status = serve_llm(llm, config, listener)
    if not llm.has_ended:  # it hangs in a step, or waits for a compilation: what ends an interpreter would wait for that too, or crash
        end_now(status)
    return status


def with_template(config: ServerConfig) -> ServerConfig:
    """The settings with their chat template's text instead of its file, before a model is loaded in vain."""
    return config if config.chat_template is None else replace(config, chat_template=read_template(config.chat_template))


def check_certificate(config: ServerConfig) -> None:
    """ConfigError when the certificate and its key cannot be used together, before a model is loaded in vain."""
    if config.ssl_certfile is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password=_no_password)
    except (OSError, ValueError) as error:
        files = f"ssl_certfile {config.ssl_certfile!r} and ssl_keyfile {config.ssl_keyfile or config.ssl_certfile!r}"
        raise ConfigError(f"{files} can't be used: {error}") from error


def _no_password() -> str:
    raise ValueError("the key has a password, but must have none")


def with_seed(config: ServerConfig) -> ServerConfig:
    """The settings with a random seed where none is given, so that replicas do not give the same samples. The log names it."""
    if config.engine.seed is not None:
        return config
    seed = secrets.randbits(63)
    log.info("seed %d was drawn at random for requests without one; --seed %d repeats their samples", seed, seed)
    return replace(config, engine=replace(config.engine, seed=seed))


def open_engine(config: ServerConfig) -> AsyncLLM:
    """The engine that the settings ask for; the caller closes it."""
    return AsyncLLM(
        config.model,
        tokenizer=config.tokenizer,
        max_waiting=config.max_waiting,
        step_timeout=config.step_timeout,
        **vars(config.engine),
    )


def make_app(llm: AsyncLLM, config: ServerConfig, engine_label: str = "0") -> FastAPI:
    """`create_app` for settings that `with_template` gave; streams end when they are done, not at once on SIGTERM."""
    if config.chat_template is not None and llm.engine.tokenizer is not None:
        llm.engine.tokenizer.chat_template = config.chat_template
    AppStatus.enable_automatic_graceful_drain = False
    return create_app(llm, config, engine_label)


def serve_llm(llm: AsyncLLM, config: ServerConfig, listener: socket.socket) -> int:
    """Serves an engine that is there, at a socket that is bound, and closes the engine; the exit status."""
    try:
        app = make_app(llm, config)
        server = Server(uvicorn_config(app, config), app.state.service.bridge, config.drain_seconds)
        scheme = "https" if config.ssl_certfile else "http"
        log.info("serving %s at %s://%s:%d", config.model_names[0], scheme, config.host, listener.getsockname()[1])
        server.run(sockets=[listener])
    finally:
        llm.close()
    if llm.error is None:
        return 0
    print(f"pjax: the engine died: {type(llm.error).__name__}: {llm.error}", file=sys.stderr, flush=True)
    return 1


def bind(host: str, port: int) -> socket.socket:
    """The port, taken before the model is loaded: one that is in use is told at once. ConfigError when it can't be taken."""
    try:
        [*_, (family, kind, _, _, address)] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)  # else another server could take the port too, and one of the two would get no connection
        except OSError:
            listener.close()
            raise
    except OSError as error:
        reason = "it is in use" if error.errno == errno.EADDRINUSE else str(error)
        raise ConfigError(f"port {port} of {host!r} can't be taken: {reason}") from error
    return listener


def uvicorn_config(app: object, config: ServerConfig) -> uvicorn.Config:
    """uvicorn's settings; the log of requests is ours."""
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=protocol(config.header_timeout),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        ws="none",
        timeout_keep_alive=max(int(config.keep_alive_seconds), 5),
        timeout_graceful_shutdown=int(config.drain_seconds + LATE) + 1,
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
        root_path=config.root_path,
    )


class Server(uvicorn.Server):
    """uvicorn's, with a drain: requests that run may end, for so many seconds; and an end when the engine dies."""

    def __init__(self, config: uvicorn.Config, bridge: Bridge, drain_seconds: float) -> None:
        super().__init__(config)
        self._bridge = bridge
        self._drain_seconds = drain_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On SIGTERM or Ctrl-C; a second Ctrl-C waits for nobody."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True

    async def main_loop(self) -> None:
        """Until a signal comes or the engine dies."""
        asyncio.get_running_loop().set_default_executor(Unjoined(thread_name_prefix="pjax-server"))
        watch = asyncio.create_task(self._watch())
        try:
            await super().main_loop()
        finally:
            watch.cancel()

    async def _watch(self) -> None:
        while self._bridge.llm.error is None:
            await asyncio.sleep(WATCH)
        log.error("the engine has died; the server ends")
        self.config.timeout_graceful_shutdown = int(LATE) + 1  # its requests have been told, and nothing else can come
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no more connections, and lets requests end."""
        if self._bridge.num_unfinished:
            log.info("%d requests have %g seconds to end", self._bridge.num_unfinished, self._drain_seconds)
        self._bridge.drain()
        late = asyncio.get_running_loop().call_later(self._drain_seconds, self._bridge.end_all)
        await super().shutdown(sockets)
        late.cancel()
