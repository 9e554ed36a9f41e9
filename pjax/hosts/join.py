"""How hosts find each other: rank 0 listens, the others come and say who they are."""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection

from pjax.errors import ConfigError
from pjax.hosts.codec import decode, encode
from pjax.hosts.group import Group
from pjax.hosts.link import secure
from pjax.hosts.place import Place

log = logging.getLogger(__name__)

AGAIN = 0.2  # seconds between two tries to reach rank 0
Comer = tuple[int, int, Connection, str]  # rank, number of hosts, connection, address


def join(place: Place) -> Group:
    """All hosts, once every one of them is there. ConfigError, with names and numbers, when one does not come or is not like the others."""
    group = Group(place)
    if place.rank == 0:
        with listen(place) as listener:
            _gather(group, listener)
    else:
        connection, address = _reach(place)
        group.connect(0, connection, address)
    return group


def listen(place: Place) -> socket.socket:
    """Rank 0's socket. ConfigError when the port can't be taken."""
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", place.port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", place.port))
    except OSError as error:
        raise ConfigError(f"master_port {place.port} can't be taken by rank 0: {error.strerror or error}") from error


def _gather(group: Group, listener: socket.socket) -> None:
    """Connects every other rank as it comes."""
    place = group.place
    log.info("rank 0 waits at port %d for %d other hosts", place.port, place.size - 1)
    comers: queue.SimpleQueue[Comer] = queue.SimpleQueue()
    deadline = time.monotonic() + place.timeout
    listener.settimeout(AGAIN)
    try:
        while not group.all_here():
            if time.monotonic() > deadline:
                here = group.addresses()
                missing = [str(rank) for rank in range(1, place.size) if rank not in here]
                shown = f"rank {missing[0]} has" if len(missing) == 1 else f"ranks {', '.join(missing)} have"
                raise ConfigError(f"nnodes is {place.size}, but {shown} not come to {place.leader} in {place.timeout:g} seconds")
            with contextlib.suppress(TimeoutError):
                sock, address = listener.accept()
                # In a thread: a stranger who says nothing, a port scanner say, keeps nobody waiting.
                threading.Thread(target=_greet, args=(sock, address[0], place, comers), daemon=True).start()
            while not comers.empty():
                _take(group, comers.get())
    except BaseException as error:
        group.dismiss(str(error))
        raise


def _greet(sock: socket.socket, address: str, place: Place, comers: queue.SimpleQueue[Comer]) -> None:
    address = address.removeprefix("::ffff:")
    try:
        connection = secure(sock, place.key, listening=True)
        kind, head, _ = decode(connection.recv_bytes(1 << 16))
        if kind != "hello":
            raise ValueError(f"{kind!r} came before hello")
        comers.put((int(head["rank"]), int(head["size"]), connection, f"{head['host']} ({address})"))
    except AuthenticationError:
        log.warning("%s was turned away: its master_key is another", address)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        log.warning("%s was turned away: %s", address, error or "it left")


def _take(group: Group, comer: Comer) -> None:
    rank, size, connection, address = comer
    place, here, message = group.place, group.addresses(), None
    if size != place.size:
        message = f"rank {rank} at {address} has nnodes {size}, rank 0 has {place.size}"
    elif not 0 < rank < place.size:
        message = f"{address} has node_rank {rank}, but must be in [1, {place.size})"
    elif rank in here:
        message = f"node_rank {rank} was given to two hosts: {here[rank]} and {address}"
    if message is not None:
        with contextlib.suppress(OSError):
            connection.send_bytes(encode("lost", {"message": message}))
            connection.close()
        raise ConfigError(message)
    group.connect(rank, connection, address)
    log.info("rank %d came from %s: %d of %d hosts", rank, address, len(here) + 2, place.size)


def _reach(place: Place) -> tuple[Connection, str]:
    """A connection to rank 0, which may start later than this one."""
    deadline, why = time.monotonic() + place.timeout, ""
    log.info("rank %d looks for rank 0 at %s", place.rank, place.leader)
    while time.monotonic() < deadline:
        try:
            sock = socket.create_connection((place.address, place.port), timeout=max(min(deadline - time.monotonic(), 10.0), 0.1))
            connection = secure(sock, place.key, listening=False)
            connection.send_bytes(encode("hello", {"rank": place.rank, "size": place.size, "host": socket.gethostname()}))
            return connection, place.leader
        except AuthenticationError as error:
            raise ConfigError(f"rank 0 at {place.leader} has another master_key than rank {place.rank}") from error
        except (OSError, EOFError) as error:
            why = str(error) or type(error).__name__
            time.sleep(AGAIN)
    raise ConfigError(f"rank {place.rank} can't reach rank 0 at {place.leader} in {place.timeout:g} seconds: {why}")
