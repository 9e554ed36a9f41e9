"""Packs a plan into the padded arrays of a bucket, in numpy, without a loop over tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from pjax.pallas_kernels import RaggedBatch
from pjax.sampling.parameters import SamplingTable
from pjax.sampling.program import NO_ROW, SampleInput
from pjax.sampling.prompt_logprobs import ScoredTokens
from pjax.sampling.token_rules import RuleTables
from pjax.scheduler.plan import StepPlan

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, order=True)
class Bucket:
    """A shape that the forward program is compiled for."""

    decode_only: bool
    num_tokens: int  # T
    num_rows: int  # S

    @property
    def name(self) -> str:
        """The program's name in a profiler's trace: decode_64, mixed_512."""
        return f"decode_{self.num_rows}" if self.decode_only else f"mixed_{self.num_tokens}"


def make_buckets(max_num_seqs: int, max_num_batched_tokens: int) -> list[Bucket]:
    """The short list of shapes that serves every plan: powers of two of decode rows, and of packed tokens."""

    def powers(first: int, last: int) -> list[int]:
        sizes = []
        while first < last:
            sizes.append(first)
            first *= 2
        return [*sizes, last]

    decode = [Bucket(True, rows, rows) for rows in powers(1, max_num_seqs)]
    mixed = [Bucket(False, tokens, max_num_seqs) for tokens in powers(min(16, max_num_batched_tokens), max_num_batched_tokens)]
    return decode + mixed


def find_bucket(buckets: list[Bucket], num_tokens: int, num_rows: int, decode_only: bool) -> Bucket:
    """The smallest bucket that holds a plan."""
    fits = (b for b in buckets if b.decode_only == decode_only and b.num_tokens >= num_tokens and b.num_rows >= num_rows)
    return min(fits, key=lambda b: b.num_tokens)


@dataclass(frozen=True)
class SampleShape:
    """A number of rows that the sample program is compiled for."""

    num_rows: int  # S

    @property
    def name(self) -> str:
        """The program's name in a profiler's trace: sample_64."""
        return f"sample_{self.num_rows}"


@dataclass(frozen=True)
class ScoreShape:
    """A number of tokens that the program which scores prompts is compiled for."""

    num_tokens: int  # T

    @property
    def name(self) -> str:
        """The program's name in a profiler's trace: score_512."""
        return f"score_{self.num_tokens}"


@dataclass(frozen=True)
class WriteShape:
    """A program that writes a row of a table on the device: "write_rules" or "write_tokens"."""

    name: str


@dataclass(frozen=True)
class BlocksShape:
    """A number of cells of the block tables that a program writes."""

    num_cells: int

    @property
    def name(self) -> str:
        """The program's name in a profiler's trace: write_blocks_32."""
        return f"write_blocks_{self.num_cells}"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ForwardInput:
    """What the forward program takes beside parameters, pages, block tables and the token table."""

    token_ids: jax.Array  # int32 [T]; -1: the host does not know it yet, the token table does
    rows: jax.Array  # int32 [S]: row of the tables of each row of the batch
    row_starts: jax.Array  # int32 [S + 1], see RaggedBatch
    kv_lens: jax.Array  # int32 [S]
    num_decode: jax.Array  # int32 []
    sample_tokens: jax.Array  # int32 [S]: packed index of the token whose logits are sampled; two samples may share one
    num_samples: jax.Array  # int32 []
    copies: jax.Array  # int32 [S · groups, 2]: pages to copy before anything is written, from and to
    num_copies: jax.Array  # int32 []
    decode_only: bool = field(default=False, metadata={"static": True})

    def batch(self, block_tables: jax.Array) -> RaggedBatch:
        """Returns the ragged batch, for block tables int32 [S, W]."""
        return RaggedBatch(self.row_starts, self.kv_lens, block_tables, self.num_decode, decode_only=self.decode_only)


def forward_input_struct(bucket: Bucket, num_groups: int = 1) -> ForwardInput:
    """Shapes and types of a bucket's arrays."""
    rows = bucket.num_rows

    def ints(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    return ForwardInput(
        ints(bucket.num_tokens),
        ints(rows),
        ints(rows + 1),
        ints(rows),
        ints(),
        ints(rows),
        ints(),
        ints(rows * num_groups, 2),
        ints(),
        decode_only=bucket.decode_only,
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepInput:
    """What the programs of one step take: numpy arrays, but for the rules."""

    forward: ForwardInput
    sample: SampleInput  # in the order of `forward.sample_tokens`
    scored: ScoredTokens | None  # None where no prompt tokens are scored


def pack(
    plan: StepPlan, tokens: Ints, sampling: SamplingTable, bucket: Bucket, rules: RuleTables | None = None, num_groups: int = 1
) -> StepInput:
    """The plan as a bucket's arrays; samples and copies in the plan's order.

    Decode rows are sorted by length, longest first: rows that the CPU's attention serves together then end together.

    Args:
      tokens: int32 [rows, max_model_len], every row's tokens; -1 where a step in flight samples it.
      rules: as they are on the device; only a plan that is packed for no device does without.
      num_groups: groups of layers with block tables of their own.
    """
    order = np.arange(len(plan.rows))
    order[: plan.num_decode] = np.argsort(-plan.starts[: plan.num_decode], kind="stable")
    rows, starts, counts = plan.rows[order], plan.starts[order], plan.counts[order]
    num_rows, num_tokens = len(rows), int(counts.sum())

    row_starts = np.full(bucket.num_rows + 1, num_tokens, np.int32)
    row_starts[0] = 0
    np.cumsum(counts, out=row_starts[1 : num_rows + 1])
    kv_lens = np.zeros(bucket.num_rows, np.int32)
    kv_lens[:num_rows] = starts + counts
    table_rows = np.zeros(bucket.num_rows, np.int32)
    table_rows[:num_rows] = rows

    token_ids = np.zeros(bucket.num_tokens, np.int32)
    of_row = np.repeat(np.arange(num_rows), counts)
    positions = np.arange(num_tokens, dtype=np.int32) - row_starts[of_row] + starts[of_row]
    token_ids[:num_tokens] = tokens[rows[of_row], positions]

    num_samples = len(plan.sample_rows)
    place = np.empty(num_rows, np.int32)
    place[order] = np.arange(num_rows, dtype=np.int32)
    sources = place[plan.sample_sources]
    sample_tokens = np.zeros(bucket.num_rows, np.int32)
    sample_tokens[:num_samples] = row_starts[sources + 1] - 1
    sample_rows = np.full(bucket.num_rows, NO_ROW, np.int32)
    sample_rows[:num_samples] = plan.sample_rows
    sample_positions = np.zeros(bucket.num_rows, np.int32)
    sample_positions[:num_samples] = kv_lens[sources]
    copies = np.zeros((bucket.num_rows * num_groups, 2), np.int32)
    copies[: len(plan.copies)] = plan.copies
    forward = ForwardInput(
        token_ids,  # type: ignore[arg-type]  # numpy in, device arrays inside the programs
        table_rows,  # type: ignore[arg-type]
        row_starts,  # type: ignore[arg-type]
        kv_lens,  # type: ignore[arg-type]
        np.int32(plan.num_decode),  # type: ignore[arg-type]
        sample_tokens,  # type: ignore[arg-type]
        np.int32(num_samples),  # type: ignore[arg-type]
        copies,  # type: ignore[arg-type]
        np.int32(len(plan.copies)),  # type: ignore[arg-type]
        decode_only=bucket.decode_only,
    )
    sample = SampleInput(
        sample_rows,  # type: ignore[arg-type]
        sample_positions,  # type: ignore[arg-type]
        np.int32(num_samples),  # type: ignore[arg-type]
        sampling.gather(plan.sample_rows, bucket.num_rows),
        rules,  # type: ignore[arg-type]
    )
    return StepInput(forward, sample, pack_scored(plan, tokens, row_starts[place], bucket.num_tokens) if plan.scored else None)


def pack_scored(plan: StepPlan, tokens: Ints, first_packed: Ints, num_tokens: int) -> ScoredTokens:
    """The plan's tokens to be scored, in its order.

    Args:
      tokens: int32 [rows, max_model_len], the sequence table.
      first_packed: int32 [n], packed index of the first token of each row of the plan.
    """
    sources, targets = np.zeros(num_tokens, np.int32), np.zeros(num_tokens, np.int32)
    count = 0
    for index, start, end in plan.scored:
        size = end - start
        sources[count : count + size] = first_packed[index] + np.arange(start - plan.starts[index], end - plan.starts[index])
        targets[count : count + size] = tokens[plan.rows[index], start + 1 : end + 1]
        count += size
    return ScoredTokens(sources, targets, np.int32(count))  # type: ignore[arg-type]  # numpy in, device arrays inside the step
