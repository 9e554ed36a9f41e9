"""Threads that the end of the server does not wait for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor


class Unjoined(ThreadPoolExecutor):
    """A pool whose shutdown drops what is queued and waits for nobody."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Takes no more work, whatever the arguments are."""
        super().shutdown(wait=False, cancel_futures=True)
