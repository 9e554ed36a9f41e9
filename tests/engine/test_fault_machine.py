"""Faults at every point of a step, while eight requests of different kinds run in a pool that is too small: none of them notices.

Bystanders are the eight; each must get exactly what it gets in an undisturbed run. Victims are requests beside them: they are aborted,
their ids are used again, and what fails for one request on the host fails for one of them, and ends it alone.
"""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pjax import LLM, BeamSearchParams, LLMEngine, RequestOutput, SamplingParams
from pjax.outputs import Logprob
from pjax.runner import runner as runner_module
from pjax.scheduler import Request
from tests.budget import examples
from tests.engine import common
from tests.engine.common import greedy

OPTIONS: dict[str, Any] = common.TIGHT | {"preemption_mode": "swap", "swap_space": 1 << 20}
KINDS: dict[str, tuple[Any, SamplingParams | BeamSearchParams]] = {
    "greedy": ("hello", greedy(14)),
    "sampled": (
        "world",
        SamplingParams(
            temperature=1, seed=1, max_tokens=12, ignore_eos=True, frequency_penalty=0.9, repetition_penalty=1.3, logit_bias={70: 4.0}
        ),
    ),
    "beams": ("some beams", BeamSearchParams(beam_width=3, max_tokens=7, ignore_eos=True)),
    "two": ("both of them", SamplingParams(n=2, temperature=0.8, seed=3, max_tokens=10, ignore_eos=True)),
    "stops": ("a text", SamplingParams(temperature=1.5, seed=4, max_tokens=30, stop=["=\x15", "never"], ignore_eos=True)),
    "scored": ("a longer prompt, of several pages, of which", greedy(6, prompt_logprobs=2)),
    "logprobs": ("with log-probabilities", greedy(9, logprobs=3)),
    "long": ([3 + index % 90 for index in range(75)], greedy(8)),
}
VICTIMS = [*KINDS, "beams", "two", "scored"]
STEP_POINTS = [
    "scheduler.schedule",
    "pack",
    "runner.dispatch",
    "runner._start",
    "runner.fetch",
    "scheduler.commit",
    "on_step",
    "_record",
    "runner.restore_pages",
]
"""What fails here fails for all, and the step is tried again."""
KV_POINTS = ["scheduler.kv.find_cached", "scheduler.kv.start", "scheduler.kv.extend", "scheduler.kv.fork", "scheduler.kv.save"]
"""So does this, while a step is scheduled."""
REQUEST_POINTS = ["scheduler._append", "scheduler._continue_beams", "_views.observe", "_views.observe_prompt", "_views.output"]
"""What fails here ends the request that it fails for: a victim."""


ALL_POINTS = STEP_POINTS + KV_POINTS + REQUEST_POINTS
RARE_POINTS = ["scheduler.kv.fork", "scheduler.kv.save", "scheduler._continue_beams", *REQUEST_POINTS]
NUM_SCENARIOS = 40


class InjectedError(Exception):
    """The fault."""


@dataclass(frozen=True)
class Fault:
    """Where it comes, after how many calls, and whether after or before what is done there."""

    point: str
    calls: int
    after: bool
    by_ctrl_c: bool


class Faults:
    """Wraps the points of an engine; each armed fault fires once, before or after the real call."""

    def __init__(self, engine: LLMEngine, patch: pytest.MonkeyPatch) -> None:
        self.armed: list[Fault] = []
        self.fired: Counter[str] = Counter()
        self.hit: set[str] = set()
        """Ids of victims that one was fired for."""
        self._is_scheduling = False
        engine.on_step = lambda stats: None
        for point in ALL_POINTS:
            if point == "pack":
                self._wrap(runner_module, "pack", point, patch)
            else:
                owner, _, name = point.rpartition(".")
                self._wrap(attrgetter(owner)(engine) if owner else engine, name, point, patch)

    def _wrap(self, owner: Any, name: str, point: str, patch: pytest.MonkeyPatch) -> None:
        whole = getattr(owner, name)

        def method(*arguments: Any, **fields: Any) -> Any:
            fault = self._due(point, arguments)
            if fault and not fault.after:
                self._fire(fault)
            before, self._is_scheduling = self._is_scheduling, self._is_scheduling or point == "scheduler.schedule"
            try:
                made = whole(*arguments, **fields)
            finally:
                self._is_scheduling = before
            if fault and fault.after:
                self._fire(fault)
            return made

        patch.setattr(owner, name, method)

    def _due(self, point: str, arguments: tuple[Any, ...]) -> Fault | None:
        if point in KV_POINTS and not self._is_scheduling:
            return None
        victims = self._victims(arguments) if point in REQUEST_POINTS else set()
        for place, fault in enumerate(self.armed):
            # Ctrl-C waits until the step is committed, and so ends nobody.
            if fault.point != point or (point in REQUEST_POINTS and not victims and not fault.by_ctrl_c):
                continue
            if fault.calls:
                self.armed[place] = replace(fault, calls=fault.calls - 1)
                return None
            del self.armed[place]
            self.hit |= set() if fault.by_ctrl_c else victims
            return fault
        return None

    def _victims(self, arguments: tuple[Any, ...]) -> set[str]:
        named = [one for one in arguments if isinstance(one, Request | str)]
        named += [sequence for one in arguments if isinstance(one, list) for sequence in one if isinstance(sequence, Request)]
        ids = {one if isinstance(one, str) else one.request_id for one in named}
        return {name for name in ids if name.startswith("victim")}

    def _fire(self, fault: Fault) -> None:
        self.fired[f"{fault.point} {'after' if fault.after else 'before'}"] += 1
        self.fired["ctrl-c"] += fault.by_ctrl_c
        if fault.by_ctrl_c:
            signal.raise_signal(signal.SIGINT)
        else:
            raise InjectedError(fault.point)


def ranked(entries: list[dict[int, Logprob] | None] | None) -> Any:
    """Tokens, ranks and texts of log-probabilities, without the values."""
    if entries is None:
        return None
    return [None if one is None else [(token, entry.rank, entry.decoded_token) for token, entry in one.items()] for one in entries]


def values(entries: list[dict[int, Logprob] | None] | None) -> list[float]:
    return [entry.logprob for one in entries or () if one is not None for entry in one.values()]


def assert_same(output: RequestOutput, expected: RequestOutput) -> None:
    """Tokens, text, reasons, ranks and log-probabilities are those of an undisturbed run.

    Log-probabilities to 2e-5: what is computed again, in a step of another size, is summed up in another order.
    """
    assert output.prompt_token_ids == expected.prompt_token_ids and output.finished
    assert ranked(output.prompt_logprobs) == ranked(expected.prompt_logprobs)
    np.testing.assert_allclose(values(output.prompt_logprobs), values(expected.prompt_logprobs), atol=2e-5)
    assert len(output.outputs) == len(expected.outputs)
    for one, other in zip(output.outputs, expected.outputs, strict=True):
        assert (one.token_ids, one.text) == (other.token_ids, other.text)
        assert (one.finish_reason, one.stop_reason) == (other.finish_reason, other.stop_reason)
        assert ranked(one.logprobs) == ranked(other.logprobs)  # type: ignore[arg-type]
        np.testing.assert_allclose(values(one.logprobs), values(other.logprobs), atol=2e-5)  # type: ignore[arg-type]
        assert (one.cumulative_logprob is None) == (other.cumulative_logprob is None)
        assert one.cumulative_logprob is None or one.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-3)


class FaultMachine:
    """Random events from a seed, until all have ended. All scenarios share one engine, which each leaves as it was."""

    def __init__(self, engine: LLMEngine, faults: Faults, expected: dict[str, RequestOutput]) -> None:
        self.engine, self.faults, self.expected = engine, faults, expected
        self.seen: Counter[str] = Counter()
        self.deck: list[tuple[str, bool]] = []  # faults to come: each point before and after its call as often as any other
        self.left: dict[str, str] = {}  # ids of the unfinished requests, and their kinds
        self.rng = random.Random()

    def run(self, seed: int) -> None:
        """A scenario: the eight bystanders, and whatever comes."""
        self.rng.seed(seed)
        self.num_victims = 0
        for kind in self.rng.sample([*KINDS], len(KINDS)):
            self.add(kind, kind)
        events = (
            [self.step] * 12 + [self.arm] * 6 + [self.add_victim] * 2 + [self.abort] * 2 + [self.update_params, self.preempt, self.evict]
        )
        num_events = 0
        while any(kind in self.left for kind in KINDS):
            self.rng.choice(events)()
            self.engine.scheduler.check()
            num_events += 1
            assert num_events < 2000, f"seed {seed}: these hang: {self.left}"
        self.end(seed)

    def add(self, name: str, kind: str, **options: Any) -> None:
        self.engine.add_request(*KINDS[kind], name, **options)
        self.left[name] = kind

    @contextmanager
    def failing(self) -> Iterator[None]:
        """What is injected in here is expected."""
        try:
            yield
        except (InjectedError, KeyboardInterrupt):
            self.seen["failed"] += 1

    def step(self) -> None:
        with self.failing():
            for output in self.engine.step():
                self.take(output)

    def take(self, output: RequestOutput) -> None:
        """Every output on the way is a beginning of the last one."""
        name = output.request_id
        kind, is_hit = self.left[name], name in self.faults.hit
        expected = self.expected[kind]
        reasons = {one.finish_reason for one in output.outputs}
        if kind != "beams":
            for one, other in zip(output.outputs, expected.outputs, strict=True):
                assert one.token_ids == other.token_ids[: len(one.token_ids)], (name, kind)
                assert is_hit or other.text.startswith(one.text), (name, kind)
        if not output.finished:
            return
        del self.left[name]
        self.faults.hit.discard(name)
        is_late = name.endswith("late")
        assert reasons <= ({"timeout", "error"} if is_late else {"stop", "length", "error"} if is_hit else {"stop", "length"})
        if not is_hit and not is_late:
            assert_same(output, expected)
        self.seen["timeout" if is_late else "error" if "error" in reasons else "done"] += 1

    def arm(self) -> None:
        if len(self.faults.armed) >= 4:
            self.faults.armed.pop(0)  # nothing that it waits for may come
        if not self.deck:
            self.deck = [(point, after) for point in [*ALL_POINTS, *RARE_POINTS] for after in (False, True)]
            self.rng.shuffle(self.deck)
        point, after = self.deck.pop()
        calls = 0 if point in RARE_POINTS else self.rng.randrange(3)
        self.faults.armed.append(Fault(point, calls, after, by_ctrl_c=point != "on_step" and self.rng.random() < 0.25))

    def add_victim(self) -> None:
        if len(self.left) < 14:
            self.num_victims += 1
            expires = self.rng.random() < 0.2
            name = f"victim {self.num_victims}, late" if expires else f"victim {self.num_victims}"
            self.add(name, self.rng.choice(VICTIMS), timeout=1e-9 if expires else None)

    def abort(self) -> None:
        """While steps of it are under way; another request may have its id at once."""
        victims = [name for name in self.left if name.startswith("victim")]
        if not victims:
            return
        name = self.rng.choice(victims)
        with self.failing():
            output = self.engine.abort_request(name)
            assert output is not None and output.finished and output.request_id == name
        del self.left[name]
        self.faults.hit.discard(name)
        self.seen["abort"] += 1
        if self.rng.random() < 0.5:
            self.add(name, self.rng.choice(VICTIMS), timeout=1e-9 if name.endswith("late") else None)
            self.seen["used again"] += 1

    def update_params(self) -> None:
        with self.failing():
            self.engine.update_params(self.engine.params, restart=self.rng.random() < 0.3)
            self.seen["update"] += 1

    def preempt(self) -> None:
        if self.engine.scheduler.num_running:
            self.engine.scheduler.preempt(self.engine.scheduler.running.last)
            self.seen["preempt"] += 1

    def evict(self) -> None:
        """Pages that are kept for others to find are lost, and the same of host memory."""
        for pool in (self.engine.scheduler.pool, self.engine.scheduler.kv.swap.pool):
            if pool is not None:
                pool.free(pool.allocate(pool.num_free))

    def end(self, seed: int) -> None:
        """Without further faults all ends, and nothing is left of it."""
        self.faults.armed.clear()
        engine, scheduler = self.engine, self.engine.scheduler
        for _ in range(400):
            if engine.has_unfinished_requests:
                self.step()
        assert not self.left and not engine.has_unfinished_requests, f"seed {seed}: these hang: {self.left}"
        engine.step()  # what was under way for requests that were aborted
        scheduler.check()
        assert scheduler.pool.num_used == 0 and scheduler.table.num_free_rows == OPTIONS["max_num_seqs"]
        assert scheduler.kv.swap.pool is not None and scheduler.kv.swap.pool.num_used == 0
        assert not scheduler.steps and not engine._dispatched and not engine._views._groups
        assert not self.faults.hit


@pytest.fixture
def machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultMachine]:
    # A shell that starts the tests in the background has SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    engine = LLM(folder, **OPTIONS).engine
    for kind, (prompt, params) in KINDS.items():
        engine.add_request(prompt, params, kind)
    expected: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests:
        expected |= {output.request_id: output for output in engine.step() if output.finished}
    yield FaultMachine(engine, Faults(engine, monkeypatch), expected)
    signal.signal(signal.SIGINT, before)
    engine.close()


def test_no_bystander_notices_a_fault(machine: FaultMachine) -> None:
    (stopped,) = machine.expected["stops"].outputs
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", "=\x15")
    assert {one.finish_reason for kind in KINDS if kind != "stops" for one in machine.expected[kind].outputs} == {"length"}
    for seed in range(examples(NUM_SCENARIOS)):
        machine.run(seed)
    fired, seen = machine.faults.fired, machine.seen
    for point in ALL_POINTS:
        assert fired[f"{point} before"] + fired[f"{point} after"] > 3, f"{point}: {fired}"
    assert fired["ctrl-c"] > 50, fired
    for name in ("failed", "done", "error", "timeout", "abort", "used again", "update", "preempt"):
        assert seen[name] > 10, f"{name}: {seen}"
    assert machine.engine.scheduler.kv.swap.num_restored_pages > 20
