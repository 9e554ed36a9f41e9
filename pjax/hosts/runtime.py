"""JAX's own distributed runtime under a group of hosts."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import socket
import time
from typing import Any

import jax

from pjax.errors import ConfigError
from pjax.hosts.group import Group
from pjax.hosts.place import join_port

HEARTBEAT = 3600  # seconds after which JAX gives a host up, and aborts: the links take a few, and no pause of a whole machine for a loss
SHUTDOWN = 5  # seconds that JAX waits for hosts to leave together
_handlers: list[Any] = []  # of signals: ctypes does not keep them


def start(group: Group) -> None:
    """Joins JAX's processes of all hosts; must come before anything that asks JAX for devices.

    Raises ConfigError when JAX has looked at its devices already, or has been started for several hosts by somebody else.
    """
    if jax.distributed.is_initialized():
        raise ConfigError("nnodes is more than 1, but jax.distributed runs in this process already: a process is one host of one engine")
    port = group.share(_free_port() if group.rank == 0 else None)
    with contextlib.suppress(AttributeError, KeyError):  # a service for notices of preemption, which are not read here
        jax.config.update("jax_enable_preemption_service", False)
    guard_aborts(group)
    try:
        jax.distributed.initialize(
            join_port(group.place.address, port),
            group.size,
            group.rank,
            cluster_detection_method="deactivate",  # under Slurm it would leave a process one device
            initialization_timeout=int(group.place.timeout),
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=SHUTDOWN,
        )
    except RuntimeError as error:
        raise ConfigError(f"rank {group.rank} can't start JAX's distributed runtime at port {port} of rank 0: {error}") from error


def stop() -> None:
    """Leaves JAX's processes, together with all other hosts. What is on this host's devices stays."""
    jax.distributed.shutdown()


def guard_aborts(group: Group) -> None:
    """Has an abort of this process wait until the group has said why it ends.

    JAX's client aborts, with a stack trace of its own, the moment that rank 0's process is gone. The links know it at the
    same moment, and name the host. Without a reason from them an abort goes on as it would have.
    """

    def wait(number: int) -> None:
        if group.ended.wait(3.0):
            time.sleep(5.0)  # the process ends meanwhile

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(wait)
    _handlers.append(handler)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(int(signal.SIGABRT), ctypes.cast(handler, ctypes.c_void_p))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])
