"""An engine on several hosts: how its processes start together, and what those of rank 1 and up do (docs/decisions/0012-multi-host.md)."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from pjax import native
from pjax.config import EngineConfig
from pjax.errors import ConfigError
from pjax.hosts import Group, find_place, join
from pjax.hosts.facts import of_code_and_flags, of_devices, of_model
from pjax.models import ModelSource
from pjax.runner import InFlight, ModelRunner
from pjax.runner.batch import Bucket
from pjax.runner.mirror import COMPILE, STEP

log = logging.getLogger(__name__)

AHEAD = 2  # steps under way on a follower, as on rank 0


def gather_hosts(model: Any, config: EngineConfig, params: Any) -> Group | None:
    """All hosts of an engine, which agree on code, flags and devices; None for an engine on one. JAX then has the devices of all.

    Raises ConfigError when one does not come or is not like the others.
    """
    place = find_place(config)
    if place is None:
        return None
    if not isinstance(model, str | Path) or params is not None:
        raise ConfigError(
            f"nnodes is {config.nnodes}, but {'params' if params is not None else 'a module'} was given: give the checkpoint's path"
        )
    from pjax.hosts import runtime

    group = join(place)
    atexit.register(end, group)
    with told(group):
        group.agree(of_code_and_flags(config) | {"a native kernel": native.library() is not None})
        runtime.start(group)
        group.agree(of_devices())
    _mind_signals(group)
    log.info("rank %d of %d: %d devices here, %d in all", group.rank, group.size, len(jax.local_devices()), len(jax.devices()))
    return group


@contextmanager
def told(group: Group | None) -> Iterator[None]:
    """What goes wrong in here on this host is told to all others, and ends them."""
    try:
        yield
    except BaseException as error:
        if group is not None:
            group.refuse(error)
        raise


def agree_on_model(group: Group | None, source: ModelSource) -> None:
    """Raises ConfigError unless every host has the same checkpoint."""
    if group is not None:
        group.agree(of_model(source.config, source.dtype, source.path))


def agree_on_sizes(group: Group | None, *sizes: int) -> list[int]:
    """The least that any host has of each."""
    return list(sizes) if group is None else [group.minimum(size) for size in sizes]


def begin(group: Group, runner: ModelRunner) -> None:
    """Once everything is loaded and compiled, everywhere: rank 0's steps are told to the others from now on, who follow.

    On the others this ends the process, with status 0, when rank 0 ends.
    """
    with told(group):
        group.ready()
    # Collectives give up on a host that comes to them half a minute late (Gloo's do).
    runner.programs.on_compiled = lambda: group.agree({})
    if group.rank == 0:
        runner.announce = group.announce
        return
    compiled, num_steps = runner.num_compilations, follow(group, runner)
    late = runner.num_compilations - compiled
    log.info("rank %d ends with rank 0: %d steps, %d programs compiled meanwhile", group.rank, num_steps, late)
    runner.close()
    end(group)
    raise SystemExit(0)


def follow(group: Group, runner: ModelRunner) -> int:
    """Runs what rank 0 says, until it ends; the number of steps."""
    under_way: deque[InFlight] = deque()
    num_steps = 0
    try:
        while True:
            kind, head, arrays = group.receive()
            if kind == STEP:
                under_way.append(runner.follow(head, arrays))
                num_steps += 1
            elif kind == COMPILE:
                runner.prefetch(Bucket(**head))
            elif kind == "bye":
                break
            while len(under_way) > AHEAD:
                under_way.popleft().wait()
        for step in under_way:
            step.wait()
    except Exception as error:  # whatever it is, the others can't go on
        raise group.fail(error) from error
    return num_steps


def raise_of_hosts(group: Group, error: BaseException) -> None:
    """A step that did not end on rank 0 is the end of the instance: hosts that are a step apart hang. Raises what it ended of."""
    if isinstance(error, Exception):
        raise group.fail(error) from error
    end(group)  # Ctrl-C, or a signal
    raise error


def end(group: Group) -> None:
    """Ends all hosts in order; registered for the interpreter's end, too.

    A host that could not start or follow ends with status 1 there: JAX would wait for the others first, and abort.
    """
    if group.error is None and group.close():
        from pjax.hosts import runtime

        runtime.stop()
        return
    if group.error is not None:
        group.quit()


def _mind_signals(group: Group) -> None:
    """SIGTERM ends an instance in order, whichever host gets it: rank 0 ends all, and a follower asks it to."""
    if threading.current_thread() is not threading.main_thread():
        return

    def leave(number: int, frame: FrameType | None) -> None:
        group.leave(f"was told to end ({signal.Signals(number).name})")

    def quit_(number: int, frame: FrameType | None) -> None:
        group.interrupt(KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number))

    if group.rank == 0:
        group.on_leave = _end_by_signal
    for number, default in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if group.rank:
            signal.signal(number, leave)
        elif signal.getsignal(number) == default:
            signal.signal(number, quit_)


def _end_by_signal(why: str) -> None:
    log.warning("%s: the instance ends", why)
    os.kill(os.getpid(), signal.SIGTERM)
