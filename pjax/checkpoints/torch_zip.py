"""Where the tensors of a torch file (pytorch_model.bin) lie: a zip whose stored entries are the tensors' storages."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import BinaryIO

from pjax.checkpoints.magic import refuse_lfs_pointer
from pjax.checkpoints.stored import StoredTensor
from pjax.checkpoints.torch_pickle import Storage, TensorView, read_pickle
from pjax.errors import CheckpointError, UnsupportedError

LOCAL_HEADER = struct.Struct("<4s22xHH")  # magic, lengths of the name and of the extra field; APPNOTE.TXT 4.3.7
ZIP_MAGIC = b"PK\x03\x04"
PICKLE_MAGIC = b"\x80"
ENCRYPTED = 0x1
MAX_PICKLE = 1 << 28
ITEM_SIZES = {"int8": 1, "uint8": 1, "bool": 1, "int16": 2, "float16": 2, "bfloat16": 2, "int32": 4, "float32": 4, "complex128": 16}


def read_torch_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor by its name; nothing that the file's pickle names is run.

    Raises CheckpointError when the file is damaged, truncated, or holds anything but tensors, UnsupportedError when it has
    torch's format of before 1.6 or is big-endian.
    """
    refuse_lfs_pointer(path)
    with path.open("rb") as file:
        magic = file.read(4)
        if magic[:1] == PICKLE_MAGIC:
            raise UnsupportedError(
                f"{path} has torch's format of before version 1.6; convert it where torch is: "
                "torch.save(torch.load(path, map_location='cpu', weights_only=True), path)"
            )
        if magic != ZIP_MAGIC:
            raise CheckpointError(f"{path} is no torch file: it begins with {magic!r}, but must begin with {ZIP_MAGIC!r}")
        try:
            return _Archive(path, file).tensors()
        except (CheckpointError, UnsupportedError):
            raise
        except (
            zipfile.BadZipFile,
            struct.error,
            ValueError,
            LookupError,
            RuntimeError,
            OverflowError,
            EOFError,
            OSError,
            MemoryError,
        ) as error:
            raise CheckpointError(f"{path} is damaged or truncated: {error}") from error


class _Archive:
    """The entries of a torch zip, `<folder>/data.pkl`, `<folder>/data/<key>` and so on, by their names without the folder."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._size = path.stat().st_size
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
        pickles = [entry.filename for entry in entries if entry.filename.endswith("/data.pkl") and entry.filename.count("/") == 1]
        if len(pickles) != 1:
            raise CheckpointError(f"{path} is no torch file: it has {len(pickles)} entries data.pkl, but must have one")
        folder = pickles[0].removesuffix("data.pkl")
        twice = [name for name, count in Counter(entry.filename for entry in entries).items() if count > 1]
        if twice:
            raise CheckpointError(f"{path} is damaged: its entry {twice[0]!r:.100} is there twice")
        self._entries = {entry.filename.removeprefix(folder): entry for entry in entries if entry.filename.startswith(folder)}

    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor."""
        order = self._bytes("byteorder", 16) if "byteorder" in self._entries else b"little"
        if order != b"little":
            raise UnsupportedError(f"{self._path} has byte order {order.decode('utf-8', 'replace')!r}; supported: little")
        views = read_pickle(self._bytes("data.pkl", MAX_PICKLE), f"{self._path}")
        places: dict[Storage, int] = {}
        return {name: self._stored(name, view, places) for name, view in views.items()}

    def _stored(self, name: str, view: TensorView, places: dict[Storage, int]) -> StoredTensor:
        storage = view.storage
        item_size = ITEM_SIZES.get(storage.dtype, 8)
        if storage not in places:
            where, size = self._place(f"data/{storage.key}", f"tensor {name}")
            if storage.num_elements * item_size != size:
                raise CheckpointError(
                    f"{self._path}: tensor {name} has a storage of {storage.num_elements} {storage.dtype}, but its entry has {size} bytes"
                )
            places[storage] = where
        last = view.offset + sum((length - 1) * step for length, step in zip(view.shape, view.strides))
        if 0 not in view.shape and last >= storage.num_elements:
            raise CheckpointError(
                f"{self._path}: tensor {name} of shape {list(view.shape)}, strides {list(view.strides)} and offset {view.offset} "
                f"ends at element {last}, but its storage has {storage.num_elements}"
            )
        return StoredTensor(self._path, storage.dtype, view.shape, view.strides, places[storage] + view.offset * item_size)

    def _place(self, name: str, whose: str) -> tuple[int, int]:
        """Where an entry's bytes begin in the file, and how many they are."""
        entry = self._entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self._path} has no entry {name!r:.100} ({whose})")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & ENCRYPTED:
            raise CheckpointError(f"{self._path}: entry {name!r:.100} is compressed or encrypted, but must be stored as it is ({whose})")
        self._file.seek(entry.header_offset)
        magic, name_length, extra_length = LOCAL_HEADER.unpack(self._file.read(LOCAL_HEADER.size))
        own_name, extra = self._file.read(name_length), self._file.read(extra_length)
        start = entry.header_offset + LOCAL_HEADER.size + name_length + extra_length
        # The directory at the end does not have these lengths: a wrong one would shift the data unseen.
        if magic != ZIP_MAGIC or own_name != entry.orig_filename.encode() or not _is_extra(extra):
            raise CheckpointError(f"{self._path} is damaged: the header of entry {name!r:.100} does not fit the directory ({whose})")
        if start + entry.file_size > self._size:
            raise CheckpointError(
                f"{self._path} is damaged or truncated: entry {name!r:.100} ends at byte {start + entry.file_size}, "
                f"but the file has {self._size} ({whose})"
            )
        return start, entry.file_size

    def _bytes(self, name: str, most: int) -> bytes:
        """A small entry's content."""
        start, size = self._place(name, "what the tensors are")
        if size > most:
            raise CheckpointError(f"{self._path}: entry {name} has {size} bytes, but must have at most {most}")
        self._file.seek(start)
        data = self._file.read(size)
        checksum = self._entries[name].CRC
        if checksum and zlib.crc32(data) != checksum:  # 0 is torch without checksums (torch.serialization.set_crc32_options)
            raise CheckpointError(f"{self._path} is damaged: the checksum of entry {name} does not hold")
        return data


def _is_extra(field: bytes) -> bool:
    """Whether records (id, size, content) fill an extra field exactly."""
    at = 0
    while at + 4 <= len(field):
        at += 4 + int.from_bytes(field[at + 2 : at + 4], "little")
    return at == len(field)
