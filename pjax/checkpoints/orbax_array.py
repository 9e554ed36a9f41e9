"""One array of an orbax checkpoint, read by tensorstore: from the mapped file straight into the memory where it stays.

orbax's own reading makes three copies on the way: of the file's bytes, of the decoded chunks, and of what goes to the device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from pjax.checkpoints.arena import aligned_empty
from pjax.checkpoints.copying import count_not_finite, numpy_dtype
from pjax.errors import CheckpointError


def make_context() -> Any:
    """What the arrays of a folder share: files are mapped, the checkpoint's index is kept in memory."""
    import tensorstore

    return tensorstore.Context({"file_io_mode": {"mode": "memmap"}, "cache_pool": {"total_bytes_limit": 1 << 24}})


class StoredArray:
    """An array by its key (`blocks.0.norm.scale`) in a group, an orbax checkpoint of zarr arrays in an OCDBT store.

    Raises CheckpointError, in every method too, when it is missing, damaged or of another shape.
    """

    def __init__(self, group: Path, key: str, shape: tuple[int, ...], context: Any) -> None:
        self._group, self._key, self.shape = group, key, shape
        base = {"driver": "file", "path": f"{group.absolute()}/"}
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "ocdbt", "base": base, "path": f"{key}/"},
            "fill_missing_data_reads": False,  # a chunk that is not there is an error, not zeros
        }
        try:
            import tensorstore

            self._store = tensorstore.open(spec, open=True, context=context).result()
        except Exception as error:  # tensorstore raises anything for a damaged file
            raise self._damaged(error) from error
        found = tuple(self._store.shape)
        if found != shape:
            raise CheckpointError(f"{group}: {key} is {list(found)}, but pjax_parameters.json says {list(shape)}")

    def _damaged(self, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self._group} is damaged or truncated: {self._key} can't be read: {error!s:.500}")

    def read(self, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
        """A part of it, cast, in memory that a CPU device takes over without a copy."""
        import tensorstore

        try:
            part = tensorstore.cast(self._store[index][tensorstore.d[:].translate_to[0]], numpy_dtype(dtype))
            target = aligned_empty(part.shape, numpy_dtype(dtype))
            tensorstore.array(target).write(part).result()
        except Exception as error:
            raise self._damaged(error) from error
        return target

    def place(self, sharding: jax.sharding.Sharding, dtype: Any) -> tuple[jax.Array, int]:
        """It on this process's devices, and how many of its values there are NaN or infinite; a part that several hold is read once."""
        holders: dict[tuple[tuple[int, int, int], ...], list[Any]] = {}
        for device, index in sharding.addressable_devices_indices_map(self.shape).items():
            bounds = tuple(part.indices(size) for part, size in zip(index or (), self.shape, strict=True))
            holders.setdefault(bounds, []).append(device)
        pieces, num_bad = [], 0
        for bounds, devices in holders.items():
            piece = self.read(tuple(slice(*bound) for bound in bounds), dtype)
            num_bad += count_not_finite(piece)
            pieces += [jax.device_put(piece, device, may_alias=len(devices) == 1) for device in devices]
        return jax.make_array_from_single_device_arrays(self.shape, sharding, pieces), num_bad
