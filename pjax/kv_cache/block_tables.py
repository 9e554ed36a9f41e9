"""Block tables on the host, and what of them has changed since the last step: the device keeps a copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]


class BlockTables:
    """Page ids int32 [groups, rows, W]: position `i` of the sequence in a row is in page `ids[group, row, i // G]` of each group.

    Cells beyond a sequence's last page hold anything. `ids` is to be changed by `write` alone.
    """

    def __init__(self, num_groups: int, num_rows: int, width: int) -> None:
        self.ids: Ints = np.zeros((num_groups, num_rows, width), np.int32)
        self._spans: list[tuple[int, int]] = []  # first cell of the flat tables and number of cells that were written

    def write(self, group: int, row: int, first: int, page_ids: Sequence[int]) -> None:
        """Writes page ids from column `first` of a row on."""
        count = len(page_ids)
        if count:
            self.ids[group, row, first : first + count] = page_ids
            self._spans.append(((group * self.ids.shape[1] + row) * self.ids.shape[2] + first, count))

    def take_changes(self) -> Ints:
        """Returns cells that were written since the last call and what they hold now: int32 [n, 2], flat index and page id."""
        if not self._spans:
            return np.zeros((0, 2), np.int32)
        starts, counts = np.array(self._spans, np.int64).T
        self._spans = []
        ends = np.cumsum(counts)
        cells = np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1])
        return np.stack([cells, self.ids.reshape(-1)[cells]], axis=1).astype(np.int32)
