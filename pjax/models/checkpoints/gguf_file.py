"""GGUF files, read and dequantised by the `gguf` package, one tensor at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader
from gguf.quants import dequantize

from pjax.errors import CheckpointError, UnsupportedError
from pjax.models.checkpoints.base import Checkpoint
from pjax.models.checkpoints.gguf_config import llama_config

SUPPORTED = (
    *(Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1),
    *(Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K),
)
CHUNK_ELEMENTS = 1 << 20  # dequantised at once: bounds the temporaries, a few times this many float32


class _Reader(GGUFReader):
    """A reader that never reads past the end: the base class gives short arrays there, and can loop over absent elements."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > self.data.size:
            raise ValueError(f"content at byte {offset} ends at byte {end}, but the file has {self.data.size}")
        return super()._get(offset, dtype, count, override_order)


def open_gguf(path: Path) -> GGUFReader:
    """The reader. Raises CheckpointError when the file is damaged, UnsupportedError when it is big-endian or a part."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise CheckpointError(f"{path} is no GGUF file: it begins with {magic!r}, but must begin with b'GGUF'")
        reader = _Reader(path)
    except CheckpointError:
        raise
    except Exception as error:  # damaged metadata fails in many ways
        raise CheckpointError(f"{path} is damaged or truncated: {error}") from error
    if reader.byte_order != "I":
        raise UnsupportedError(f"{path} is big-endian; supported: little-endian GGUF files")
    parts = reader.get_field("split.count")
    if parts is not None and int(parts.contents()) > 1:
        raise UnsupportedError(f"{path} is one of {parts.contents()} parts; supported: a single GGUF file (llama-gguf-split --merge)")
    return reader


class GGUFFile(Checkpoint):
    """A .gguf file of architecture llama. Errors as in `open_gguf`."""

    format = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = open_gguf(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def hf_config(self) -> dict[str, Any]:
        """config.json as transformers would write it for the same model.

        Raises CheckpointError when a field is missing or wrong, UnsupportedError when one is not applied by pjax.
        """
        fields = {key: field for key, field in self._reader.fields.items() if key.startswith(("general.", "llama.")) or key.endswith("_id")}
        return llama_config({key: field.contents() for key, field in fields.items()}, self.names(), self.path)

    def generation_config(self) -> dict[str, Any]:
        """GGUF has none."""
        return {}

    def names(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor; GGUF's fastest axis comes last here."""
        return {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor: F32, F16 and BF16 are views of the mapped file, the rest is dequantised to float32.

        Query and key weights of llama keep GGUF's order of rotary pairs.
        """
        if name not in self._tensors:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        tensor = self._tensors[name]
        shape = tuple(int(n) for n in reversed(tensor.shape))
        kind, data = tensor.tensor_type, np.asarray(tensor.data)
        if kind not in SUPPORTED:
            raise UnsupportedError(f"{self.path}: tensor {name} is {kind.name}; supported: {', '.join(t.name for t in SUPPORTED)}")
        if kind is Type.BF16:
            return data.view(ml_dtypes.bfloat16).reshape(shape)
        if kind in (Type.F32, Type.F16):
            return data.reshape(shape)
        rows = data.reshape(-1, data.shape[-1])
        values = np.empty((len(rows), shape[-1]), np.float32)
        step = max(1, CHUNK_ELEMENTS // shape[-1])
        for start in range(0, len(rows), step):
            values[start : start + step] = dequantize(rows[start : start + step], kind)
        return values.reshape(shape)

    def close(self) -> None:
        """Forgets the tensors; the file is unmapped with the last array that views it."""
        self._tensors.clear()
