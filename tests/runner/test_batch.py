"""Packing against a slow and obvious one; every plan that a scheduler can make finds one of few buckets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pjax.outputs import RequestMetrics
from pjax.params import SamplingParams
from pjax.runner.batch import Bucket, find_bucket, make_buckets, pack
from pjax.sampling.parameters import COLDEST, SamplingTable
from pjax.scheduler import Request, StepPlan
from tests.budget import examples

COLUMNS = ("temperature", "top_k", "top_p", "min_p", "seed", "num_logprobs", "logprob_temperature")
PADDING = (0.0, 0, 1.0, 0.0, (0, 0), -1, 1.0)


Copies = Sequence[tuple[int, int]]


@dataclass
class Row:
    """One row of a plan, and what its sampled token is asked for."""

    table_row: int
    start: int
    count: int
    num_samples: int  # more than one: several sequences continue one prompt; here they have the parameters of its row
    params: SamplingParams
    seed: int

    def sampling(self) -> tuple[Any, ...]:
        p = self.params
        top_p, temperature, min_p = (float(np.float32(value)) for value in (p.top_p, p.temperature, p.min_p))
        temperature = max(temperature, COLDEST) if temperature else 0.0
        seed = divmod(self.seed, 2**32)
        return temperature, max(p.top_k, 0), top_p, min_p, seed, -1 if p.logprobs is None else p.logprobs, 1.0


def make_plan(rows: list[Row], copies: Copies = ()) -> StepPlan:
    def ints(name: str) -> Any:
        return np.array([getattr(row, name) for row in rows], np.int32)

    requests = [
        Request(
            request_id=str(index),
            prompt_token_ids=[1],
            params=row.params,
            max_tokens=1,
            stop_token_ids=frozenset(),
            eos_token_ids=frozenset(),
            seed=row.seed,
            metrics=RequestMetrics(0.0),
        )
        for index, row in enumerate(rows)
    ]
    sources = np.array([index for index, row in enumerate(rows) for _ in range(row.num_samples)], np.int32)
    sampled = [requests[index] for index in sources]
    return StepPlan(
        requests,
        ints("table_row"),
        ints("start"),
        ints("count"),
        sum(row.count == 1 for row in rows),
        sampled,
        ints("table_row")[sources],
        sources,
        np.array(copies, np.int32).reshape(-1, 2),
        swap_outs=np.zeros((0, 2), np.int32),
        swap_ins=np.zeros((0, 2), np.int32),
    )


def pack_rows(rows: list[Row], tokens: Any, bucket: Bucket, copies: Copies = ()) -> dict[str, Any]:
    """`pack` as the runner calls it; the arrays by name, as lists."""
    plan = make_plan(rows, copies)
    table = SamplingTable(len(tokens))
    for row, request in zip(rows, plan.requests, strict=True):
        table.set(row.table_row, request, row.params, row.seed)
    packed = pack(plan, tokens, table, bucket)
    for array in jax.tree.leaves(packed):
        assert array.dtype in (np.int32, np.uint32, np.float32), "else the compiled step would not take it"
    forward, sample = packed.forward, packed.sample
    assert forward.decode_only == bucket.decode_only
    named = {
        "token_ids": forward.token_ids,
        "row_starts": forward.row_starts,
        "kv_lens": forward.kv_lens,
        "rows": forward.rows,
        "num_decode": forward.num_decode,
        "sample_tokens": forward.sample_tokens,
        "sample_positions": sample.positions,
        "num_samples": forward.num_samples,
        "copies": forward.copies,
        "num_copies": forward.num_copies,
    }
    out = {name: np.asarray(array).tolist() for name, array in named.items()}
    columns = [np.asarray(getattr(sample.params.unpack(), name)).tolist() for name in COLUMNS]
    out["sampling"] = [tuple(tuple(x) if isinstance(x, list) else x for x in values) for values in zip(*columns, strict=True)]
    return out


def pack_slowly(rows: list[Row], tokens: Any, bucket: Bucket, copies: Copies) -> dict[str, Any]:
    """One token after the other: rows of one token first, longest first, then the others as they come."""
    indexed = sorted(enumerate(rows), key=lambda item: (item[1].count > 1, -item[1].start if item[1].count == 1 else 0))
    out: dict[str, Any] = {name: [] for name in ("token_ids", "kv_lens", "rows", "sample_tokens", "sample_positions", "sampling")}
    out["row_starts"], last = [0], {}
    for index, row in indexed:
        for position in range(row.start, row.start + row.count):
            out["token_ids"].append(int(tokens[row.table_row, position]))
        out["row_starts"].append(len(out["token_ids"]))
        out["kv_lens"].append(row.start + row.count)
        out["rows"].append(row.table_row)
        last[index] = len(out["token_ids"]) - 1
    for index, row in enumerate(rows):  # samples are in the plan's order
        for _ in range(row.num_samples):
            out["sample_tokens"].append(last[index])
            out["sample_positions"].append(row.start + row.count)
            out["sampling"].append(row.sampling())
    out["num_decode"] = sum(row.count == 1 for row in rows)
    out["num_samples"] = len(out["sampling"])
    out["copies"], out["num_copies"] = [list(copy) for copy in copies] + [[0, 0]] * (bucket.num_rows - len(copies)), len(copies)
    used = len(out["token_ids"])
    fill = {"kv_lens": 0, "rows": 0, "sample_tokens": 0, "sample_positions": 0, "sampling": PADDING}
    for name, value in fill.items():
        out[name] += [value] * (bucket.num_rows - len(out[name]))
    out["token_ids"] += [0] * (bucket.num_tokens - used)
    out["row_starts"] += [used] * (bucket.num_rows + 1 - len(out["row_starts"]))
    return out


sampling_params = st.builds(
    SamplingParams,
    temperature=st.floats(0, 2, width=32),
    top_k=st.integers(-1, 50),
    top_p=st.floats(0.125, 1, width=32),
    min_p=st.floats(0, 1, width=32),
    logprobs=st.none() | st.integers(0, 20),
)


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[Row], Any, int, list[tuple[int, int]]]:
    """Rows as the scheduler orders them, the tokens of all rows, max_num_seqs, and copies."""
    max_num_seqs, length = draw(st.integers(1, 9)), 40
    tokens = np.arange(max_num_seqs * length, dtype=np.int32).reshape(max_num_seqs, length) + 1
    rows: list[Row] = []
    for table_row in draw(st.permutations(range(max_num_seqs)))[: draw(st.integers(1, max_num_seqs))]:
        count = draw(st.sampled_from([1, 1, 1, 2, 5, 16]))
        start = draw(st.integers(0, length - 1 - count))
        room = max_num_seqs - sum(row.num_samples for row in rows)
        samples = min(draw(st.sampled_from([0, 1, 1, 1, 3])), room)
        rows.append(Row(table_row, start, count, samples, draw(sampling_params), draw(st.integers(0, 2**63 - 1))))
    copies = draw(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=len(rows)))
    return sorted(rows, key=lambda row: row.count > 1), tokens, max_num_seqs, copies


@given(plan=plans(), spare=st.integers(0, 30))
@settings(max_examples=examples(100), deadline=None)
def test_pack(plan: tuple[list[Row], Any, int, Copies], spare: int) -> None:
    rows, tokens, max_num_seqs, copies = plan
    used, num_rows = sum(row.count for row in rows), max(len(rows), sum(row.num_samples for row in rows))
    bucket = find_bucket(make_buckets(max_num_seqs, max(used, max_num_seqs) + spare), used, num_rows, used == len(rows))
    expected = pack_slowly(rows, tokens, bucket, copies)
    packed = pack_rows(rows, tokens, bucket, copies)
    for name in expected:
        assert packed[name] == expected[name], name


def test_pack_of_a_small_plan() -> None:
    tokens = np.array([[10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24, 25], [30, 31, 32, 33, 34, 35]], np.int32)
    cold, hot = SamplingParams(temperature=0, top_k=-1), SamplingParams(temperature=0.5, top_k=3, top_p=0.25, min_p=0.125, logprobs=2)
    rows = [Row(1, 2, 1, 1, cold, 1), Row(0, 4, 1, 2, hot, (5 << 32) + 6), Row(2, 1, 3, 0, hot, 0)]
    packed = pack_rows(rows, tokens, Bucket(False, 8, 4), [(7, 9), (1, 2)])
    assert packed == {
        "token_ids": [14, 22, 31, 32, 33, 0, 0, 0],
        "row_starts": [0, 1, 2, 5, 5],
        "kv_lens": [5, 3, 4, 0],
        "rows": [0, 1, 2, 0],
        "num_decode": 2,
        "sample_tokens": [1, 0, 0, 0],
        "sample_positions": [3, 5, 5, 0],
        "num_samples": 3,
        "sampling": [(0.0, 0, 1.0, 0.0, (0, 1), -1, 1.0), *[(0.5, 3, 0.25, 0.125, (5, 6), 2, 1.0)] * 2, PADDING],
        "copies": [[7, 9], [1, 2], [0, 0], [0, 0]],
        "num_copies": 2,
    }


def test_decode_rows_of_one_length_stay_in_order() -> None:
    rows = [Row(i, start, 1, 1, SamplingParams(), i) for i, start in enumerate([3, 5, 3, 5, 4])]
    packed = pack_rows(rows, np.zeros((5, 8), np.int32), Bucket(True, 8, 8))
    assert packed["sample_tokens"][:5] == [3, 0, 4, 1, 2], "rows 1, 3, 4, 0, 2"


def test_a_row_of_the_sampling_table_has_its_last_owner() -> None:
    table, first, second = SamplingTable(3), object(), object()
    table.set(1, first, SamplingParams(temperature=0.5, top_k=2**40, logprobs=0), 2**63 - 1)
    (row,) = zip(*(getattr(table.gather(np.array([1]), 1).unpack(), name).tolist() for name in COLUMNS), strict=True)
    assert row == (0.5, 2**31 - 1, 1.0, 0.0, [2**31 - 1, 2**32 - 1], 0, 1.0)
    table.set(1, first, SamplingParams(temperature=0.25), 0)
    assert table.gather(np.arange(3), 3).unpack().temperature.tolist() == [0, 0.5, 0], "parameters of one request never change"
    table.set(1, second, SamplingParams(temperature=0.25, top_p=0.5), 3)
    table.set(0, first, SamplingParams(temperature=1.5, logprobs=4), 4)
    gathered = table.gather(np.array([1, 0, 1], np.int32), 4).unpack()
    assert gathered.temperature.tolist() == [0.25, 1.5, 0.25, 0] and gathered.top_p.tolist() == [0.5, 1, 0.5, 1]
    assert gathered.seed.tolist() == [[0, 3], [0, 4], [0, 3], [0, 0]] and gathered.num_logprobs.tolist() == [-1, 4, -1, -1]
    assert gathered.top_k.tolist() == [0, 0, 0, 0]


# ---- buckets


def possible_plans(max_num_seqs: int, budget: int) -> Iterator[tuple[int, int, bool]]:
    """(tokens, rows, whether every row has one token) of every plan that keeps to its limits."""
    for rows in range(1, max_num_seqs + 1):
        yield rows, rows, True
        yield from ((tokens, rows, False) for tokens in range(rows + 1, budget + 1))


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 5, 8, 15, 16, 17, 33])
@pytest.mark.parametrize("more", [0, 1, 2, 7, 13, 16, 100])
def test_every_plan_finds_a_bucket(max_num_seqs: int, more: int) -> None:
    budget = max_num_seqs + more
    buckets = make_buckets(max_num_seqs, budget)
    for num_tokens, num_rows, decode_only in possible_plans(max_num_seqs, budget):
        found = find_bucket(buckets, num_tokens, num_rows, decode_only)
        assert found.decode_only == decode_only and found.num_tokens >= num_tokens and found.num_rows >= num_rows
        assert found.num_tokens < 2 * max(num_tokens, 16), "less than half of it is padding"
        assert found.num_tokens <= budget and found.num_rows <= max_num_seqs
        smaller = [b for b in buckets if b.decode_only == decode_only and num_tokens <= b.num_tokens < found.num_tokens]
        assert all(b.num_rows < num_rows for b in smaller)
        if decode_only:
            assert found.num_rows == found.num_tokens < 2 * num_rows


@pytest.mark.parametrize(
    ("max_num_seqs", "budget", "count"), [(1, 1, 2), (1, 16, 2), (8, 64, 7), (64, 512, 13), (256, 2048, 17), (200, 3000, 18)]
)
def test_buckets_are_few(max_num_seqs: int, budget: int, count: int) -> None:
    buckets = make_buckets(max_num_seqs, budget)
    assert len(buckets) == len(set(buckets)) == count
    largest = [max(b for b in buckets if b.decode_only == decode_only) for decode_only in (True, False)]
    assert largest == [Bucket(True, max_num_seqs, max_num_seqs), Bucket(False, budget, max_num_seqs)]
