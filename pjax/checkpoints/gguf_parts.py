"""GGUF files in several parts, named as llama-gguf-split names them: model-00001-of-00003.gguf."""

from __future__ import annotations

import re
from pathlib import Path

from pjax.checkpoints.gguf_header import GGUFHeader, read_gguf_header
from pjax.errors import CheckpointError

PART = re.compile(r"(?P<start>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def parts_of(path: Path) -> list[Path]:
    """All parts of the model that a file is a part of, by its name, the first one first; the file alone where its name says nothing."""
    found = PART.fullmatch(path.name)
    if found is None:
        return [path]
    return [path.with_name(f"{found['start']}-{number:05}-of-{found['count']}.gguf") for number in range(1, int(found["count"]) + 1)]


def read_headers(path: Path) -> list[GGUFHeader]:
    """The headers of all parts, the first one first: it has the metadata.

    Raises CheckpointError when a part is missing, is not what its name says, or the parts do not have as many tensors as they should.
    """
    header = read_gguf_header(path)
    count = header.metadata.get("split.count", 0)
    if not isinstance(count, int) or count <= 1:
        return [header]
    paths = parts_of(path)
    if len(paths) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts, but its name does not end with -00001-of-{count:05}.gguf, as parts' names do"
        )
    if missing := [part.name for part in paths if not part.is_file()]:
        raise CheckpointError(f"{path} is one of {count} parts, of which these are missing: {', '.join(missing)}")
    headers = [header if part == path else read_gguf_header(part) for part in paths]
    for index, one in enumerate(headers):
        if (number := one.metadata.get("split.no")) != index:
            raise CheckpointError(f"{one.path} is named part {index + 1}, but its split.no is {number!r}, and must be {index}")
    names = [name for one in headers for name in one.tensors]
    if len(names) != len(set(names)):
        raise CheckpointError(f"{paths[0]} and the other parts have a tensor twice: {next(n for n in names if names.count(n) > 1)}")
    if (expected := headers[0].metadata.get("split.tensors.count", len(names))) != len(names):
        raise CheckpointError(f"{paths[0]} and the other parts have {len(names)} tensors, but must have {expected}")
    return headers
