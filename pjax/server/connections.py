"""HTTP connections with a limit of time for the headers of each request, which uvicorn has none for."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol


def protocol(header_timeout: float) -> type[H11Protocol]:
    """uvicorn's protocol for connections that are closed when a request's headers take longer than so many seconds.

    The time runs from the connection's start, and later from the first byte that comes while no request is being answered; more bytes
    do not prolong it. It covers what a client sends of a body that nobody reads, too.
    """

    class Protocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._stop()

        def on_response_complete(self) -> None:
            self._stop()
            super().on_response_complete()

        def _watch(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop()
            elif self._deadline is None and not self.transport.is_closing():
                self._deadline = self.loop.call_later(header_timeout, self.transport.close)

        def _stop(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def shutdown(self) -> None:
            self._stop()
            super().shutdown()

    return Protocol
