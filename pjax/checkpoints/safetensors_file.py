"""Where the tensors of a safetensors file lie. The `safetensors` package checks the file; its own reading copies twice."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from pjax.checkpoints.base import unique
from pjax.checkpoints.magic import refuse_lfs_pointer
from pjax.checkpoints.stored import StoredTensor, row_major
from pjax.errors import CheckpointError

# The format's names of types; one that is not here keeps its name, and is refused by it when it is read.
NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"}
NAMES |= {f"{short}{bits}": f"{long}{bits}" for short, long in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)}


def read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor by its name. CheckpointError when the file is damaged, truncated or something else."""
    refuse_lfs_pointer(path)
    try:
        with safe_open(str(path), framework="np"):
            pass  # opening checks sizes, offsets and shapes against each other and the file
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=unique)
        return {
            name: StoredTensor(
                path, NAMES.get(info["dtype"], info["dtype"]), tuple(info["shape"]), row_major(tuple(info["shape"])),
                8 + length + info["data_offsets"][0],
            )
            for name, info in header.items()
            if name != "__metadata__"
        }  # fmt: skip
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged, truncated or no safetensors file: {error}") from error
