"""What a sequence goes through: it waits, runs, is preempted or forked, and ends. Which one and when is the scheduler's business."""

from __future__ import annotations

from pjax.kv_cache.kv_manager import CachedPrefix, KVManager
from pjax.scheduler.beam_search import BeamSearch, Candidates
from pjax.scheduler.plan import StepPlan
from pjax.scheduler.queues import RemovableHeap, RunningQueue, WaitingQueue
from pjax.scheduler.request import Request, RequestStatus
from pjax.scheduler.sequence_table import UNKNOWN, SequenceTable


class Lifecycle:
    """All unfinished sequences: their queue, their row, their pages."""

    def __init__(self, table: SequenceTable, kv: KVManager, seconds_per_priority: float, most_short: int) -> None:
        self.table = table
        self.kv = kv
        self._seconds_per_priority = seconds_per_priority
        self.waiting = WaitingQueue(most_short)
        self.running = RunningQueue()
        self.unfinished: dict[str, list[Request]] = {}  # sequences of one prompt share an id
        self.deadlines: RemovableHeap[str] = RemovableHeap()  # ids of those that have one
        self.num_preemptions = 0
        self._num_added = 0

    def add(self, sequences: list[Request]) -> None:
        """Queues the sequences of one prompt, under an id that no other unfinished one has.

        A level of priority counts as so many seconds of waiting. A request is so overtaken only by those of a better
        priority that come within a bounded time after it, and nobody starves; ranks need not be changed as time passes.
        """
        first = sequences[0]
        self.unfinished[first.request_id] = list(sequences)
        since = first.metrics.arrival_time + self._seconds_per_priority * first.priority
        for sequence in sequences:
            sequence.order = self._num_added
            sequence.rank = since, sequence.order
            self._num_added += 1
        if first.deadline is not None:
            self.deadlines.add(first.request_id, first.deadline)
        size = len(self.table.tokens)  # more than there are rows: the next ones are led by one of their own
        for place in range(0, len(sequences), size):
            leader = sequences[place]
            leader.followers = sequences[place + 1 : place + size]
            for follower in leader.followers:
                follower.status = RequestStatus.FOLLOWING
            self.waiting.enqueue(leader)

    def start(self, request: Request, cached: CachedPrefix, now: float) -> None:
        """Makes a waiting one run, on these cached pages."""
        self.waiting.remove(request)
        for sequence in (request, *request.followers):
            sequence.row = self.table.allocate_row()
        request.status = RequestStatus.RUNNING
        self.running.add(request)
        if request.metrics.first_scheduled_time is None:
            request.metrics.first_scheduled_time = now
        num_prompt = len(request.prompt_token_ids)
        self.table.tokens[request.row, :num_prompt] = request.prompt_token_ids
        self.table.tokens[request.row, num_prompt : request.num_tokens] = request.output_token_ids
        self.kv.start(request, cached)
        if request.num_cached_tokens is None:
            request.num_cached_tokens = request.num_computed

    def preempt(self, request: Request, *, save: bool = True) -> None:
        """Frees a running request's pages; they are saved in host memory or computed again (Kwon et al. 2023, section 4.5).

        A beam that has its candidates needs no pages until it is continued.
        """
        self.running.remove(request)
        if save:
            self.kv.save(request)
        self._release(request)
        request.status, request.num_computed = RequestStatus.FOLLOWING, 0
        request.metrics.num_preemptions += 1
        self.num_preemptions += 1
        if request.candidates is None:
            self._enqueue(request)

    def _enqueue(self, request: Request) -> None:
        request.status = RequestStatus.WAITING
        self.waiting.enqueue(request)

    def append(self, request: Request, token: int) -> None:
        """Gives a sequence its next token."""
        if request.row >= 0:
            place = request.num_tokens
            if place < self.table.max_model_len:
                self.table.tokens[request.row, place] = token
        request.output_token_ids.append(token)

    def expect(self, plan: StepPlan) -> None:
        """The tokens that a plan samples are under way; a beam's next one is not among them, but is written before it is read."""
        self.table.tokens[plan.sample_rows, (plan.starts + plan.counts)[plan.sample_sources]] = UNKNOWN
        for request in plan.sampled:
            request.num_in_flight += 1

    def take_candidates(self, request: Request, candidates: Candidates) -> None:
        """A beam has caught up. If it was preempted since it needs no pages until it is continued."""
        request.candidates = candidates
        if request.status is RequestStatus.WAITING:
            self.waiting.remove(request)
            request.status = RequestStatus.FOLLOWING

    def finish(self, request: Request, reason: str, stop_reason: int | str | None = None) -> None:
        """Ends an unfinished sequence and frees all it has."""
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
            self._release(request)
        elif request.status is RequestStatus.WAITING:
            self.waiting.remove(request)
        else:
            for leader in self.unfinished[request.request_id]:
                if request in leader.followers:
                    leader.followers.remove(request)
            self._free_row(request)
        self.kv.swap.drop(request)
        request.status, request.finish_reason, request.stop_reason = RequestStatus.FINISHED, reason, stop_reason
        unfinished = self.unfinished[request.request_id]
        unfinished.remove(request)
        if not unfinished:
            del self.unfinished[request.request_id]
            if request.request_id in self.deadlines:
                self.deadlines.remove(request.request_id)

    def fail(self, request: Request) -> None:
        """Ends a sequence, or the beam search that it is of, with reason "error": no token could be sampled.

        Its pages are not found again.
        """
        self.kv.distrust(request)
        if request.beam is None:
            self.finish(request, "error")
        else:
            self.finish_all(request.request_id, "error")

    def finish_all(self, request_id: str, reason: str) -> bool:
        """Ends all sequences of a request; False when there is none of that id."""
        sequences = list(self.unfinished.get(request_id, ()))
        for sequence in reversed(sequences):  # followers before those whom they follow
            self.finish(sequence, reason)
        return bool(sequences)

    def _release(self, request: Request) -> None:
        self.kv.remember(request, min(request.num_computed, request.num_tokens))
        self.kv.release(request)
        for sequence in (request, *request.followers):
            self._free_row(sequence)

    def _free_row(self, request: Request) -> None:
        if request.row >= 0:
            self.table.free_row(request.row)
            request.row = -1

    # ---- several sequences of one prompt

    def fork_followers(self, request: Request) -> None:
        """Lets those who follow a request go on from where it is: their prompt is computed."""
        for follower in request.followers:
            self._fork(request, follower)
        request.followers = []

    def _fork(self, request: Request, other: Request) -> None:
        """Makes another sequence of the same prompt go on from where this one is, on the same pages if both can run."""
        if other.status is RequestStatus.RUNNING:
            self.running.remove(other)
            self.kv.release(other)
            other.status = RequestStatus.FOLLOWING
        other.num_computed, other.num_cached_tokens = 0, request.num_cached_tokens
        other.output_token_ids, other.page_keys = list(request.output_token_ids), list(request.page_keys)
        other.epoch = request.epoch
        self.kv.swap.fork(request, other)
        if request.status is not RequestStatus.RUNNING:
            self._free_row(other)
            return
        if other.row < 0:
            if not self.table.num_free_rows:
                return
            other.row = self.table.allocate_row()
        self.kv.fork(request, other)
        self.table.tokens[other.row, : request.num_tokens] = self.table.tokens[request.row, : request.num_tokens]
        other.status = RequestStatus.RUNNING
        self.running.add(other)

    def advance(self, search: BeamSearch, sequences: list[Request]) -> None:
        """Continues the beams of a search if all have their candidates; each parent's first child takes its place."""
        parents = [sequences[index] for index in search.beams]
        candidates = [parent.candidates for parent in parents if parent.candidates is not None]
        if len(candidates) < len(parents):
            return
        chosen = search.choose([parent.output_token_ids for parent in parents], candidates)
        if search.done:
            for sequence in sequences[::-1]:
                self.finish(sequence, "stop" if search.finished[0].ended else "length")
            return
        for parent in parents:
            parent.candidates, parent.followers = None, []
        unused = {parents[beam] for beam, _ in chosen}
        spare = [sequence for sequence in sequences if sequence not in unused]
        children = []
        for beam, _ in chosen:
            child = parents[beam]
            if child in unused:
                unused.remove(child)
            else:
                child = spare.pop()
                self._fork(parents[beam], child)
            children.append(child)
        for child, (_, token) in zip(children, chosen, strict=True):
            self.append(child, token)
            if child.status is RequestStatus.FOLLOWING:
                self._enqueue(child)
        search.beams = [child.index for child in children]

    def check(self) -> None:
        """Proves the invariants; AssertionError with what breaks them."""
        waiting, running = self.waiting.ordered(), list(self.running)
        self.kv.check(running)
        self.kv.swap.check(one for sequences in self.unfinished.values() for one in sequences if one.status is not RequestStatus.RUNNING)
        rows = [sequence.row for request in running for sequence in (request, *request.followers)]
        assert len(set(rows)) == len(rows) and len(rows) + self.table.num_free_rows == len(self.table.tokens), f"rows {rows}"
        for queue, status in ((waiting, RequestStatus.WAITING), (running, RequestStatus.RUNNING)):
            ranks = [request.rank for request in queue]
            assert ranks == sorted(ranks), f"{status.value} requests are out of order: {ranks}"
            assert all(request.status is status for request in queue)
        assert not waiting or self.waiting.first is waiting[0]
        assert set(self.waiting.short) <= set(waiting) and (self.waiting.num_short_tokens > 0) == (len(self.waiting.short) > 0)
        for request in running:
            behind = request.num_computed < request.num_planned or request.num_in_flight > 0
            assert behind == (request.candidates is None), f"request {request.request_id!r} has nothing to compute"
        assert set(self.deadlines) == {name for name, (first, *_) in self.unfinished.items() if first.deadline is not None}
        followers = [follower for request in (*waiting, *running) for follower in request.followers]
        assert all(follower.status is RequestStatus.FOLLOWING for follower in followers)
        unfinished = [sequence for sequences in self.unfinished.values() for sequence in sequences]
        followers += [sequence for sequence in unfinished if sequence.status is RequestStatus.FOLLOWING and sequence.candidates]
        assert {*waiting, *running, *followers} == set(unfinished)
        assert len(waiting) + len(running) + len(followers) == len(unfinished)
