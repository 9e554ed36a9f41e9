"""The running sequences as numpy arrays by row, so that a step is packed without a loop."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UNKNOWN = -1  # a token that a step under way samples


class SequenceTable:
    """`tokens` int32 [rows, max_model_len]. The scheduler writes them; the runner reads the rows and columns that a plan names."""

    def __init__(self, max_num_seqs: int, max_model_len: int) -> None:
        self.max_model_len = max_model_len
        self.tokens: npt.NDArray[np.int32] = np.zeros((max_num_seqs, max_model_len), np.int32)
        self._free = list(range(max_num_seqs - 1, -1, -1))
        self._is_free = bytearray(b"\1" * max_num_seqs)

    @property
    def num_free_rows(self) -> int:
        """Rows that no sequence has."""
        return len(self._free)

    def allocate_row(self) -> int:
        """The lowest row freed last; IndexError when there is none."""
        row = self._free.pop()
        self._is_free[row] = False
        return row

    def free_row(self, row: int) -> None:
        """Gives a row back."""
        if self._is_free[row]:
            raise ValueError(f"row {row} is free already")
        self._is_free[row] = True
        self._free.append(row)
