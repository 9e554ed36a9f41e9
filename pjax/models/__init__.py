"""Models by architecture. A family is a module with the names of `pjax.models.llama`; see `FAMILIES`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pjax.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from flax import nnx

FAMILIES: dict[str, str] = {"LlamaForCausalLM": "pjax.models.llama"}
"""Hugging Face architecture to the module that implements it."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model and its parameters, split so that a jitted step takes flat arrays."""

    config: Any
    graph: nnx.GraphDef[Any]
    params: nnx.State[Any, Any]
    eos_token_ids: tuple[int, ...]
    path: Path
    dtype: str


def find_family(hf_config: Mapping[str, Any]) -> Any:
    """The module that implements a config's architecture; UnsupportedError names those that pjax has."""
    names = hf_config.get("architectures") or []
    for name in names:
        if name in FAMILIES:
            return importlib.import_module(FAMILIES[name])
    shown = ", ".join(map(str, names)) or f"(none; model_type {hf_config.get('model_type')!r})"
    raise UnsupportedError(f"architecture {shown} is not supported; supported: {', '.join(sorted(FAMILIES))}")


def load_model(model: str | Path, *, dtype: str, layer_mode: str = "unroll", progress: bool = True) -> LoadedModel:
    """Reads a checkpoint (folder, .gguf file or hub id) into parameters of `dtype` ("auto": the checkpoint's) on the default device.

    Raises CheckpointError when the checkpoint is missing, damaged or does not fit its config, UnsupportedError when
    pjax has no such architecture or does not apply a field of its config.
    """
    from flax import nnx

    from pjax.models.checkpoints import open_checkpoint
    from pjax.models.weights import check_names, expand, load_into

    with open_checkpoint(model) as checkpoint:
        hf = checkpoint.hf_config()
        family = find_family(hf)
        config = family.Config.from_hf(hf)
        sources = expand(family.weight_table(config), config.num_layers)
        found = dict(checkpoint.names())
        is_gguf = checkpoint.format == "gguf"
        renamed: dict[str, str] = {}
        if is_gguf:
            wanted = {name for source in sources.values() for name, _ in source.parts}
            renamed = {family.gguf_name(name): name for name in wanted}
            found = {renamed.get(name, name): shape for name, shape in found.items()}
        check_names(sources, found, family.known_leftovers(config), str(checkpoint.path))

        def read(name: str) -> Any:
            if is_gguf:
                return family.from_gguf(name, checkpoint.read(family.gguf_name(name)), config)
            return checkpoint.read(name)

        dtype = _auto_dtype(hf) if dtype == "auto" else dtype
        abstract = nnx.eval_shape(lambda: family.Model(config, dtype=dtype, layer_mode=layer_mode))
        graph, state = nnx.split(abstract)
        params = load_into(state, sources, read, stacked_layers=config.num_layers if layer_mode == "scan" else 0, progress=progress)
        eos = checkpoint.generation_config().get("eos_token_id", hf.get("eos_token_id"))
    return LoadedModel(config=config, graph=graph, params=params, eos_token_ids=_token_ids(eos), path=checkpoint.path, dtype=dtype)


def _auto_dtype(hf: Mapping[str, Any]) -> str:
    """The checkpoint's own dtype, as its config says."""
    name = str(hf.get("dtype") or hf.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise UnsupportedError(f"config: dtype is {name!r}; supported: float32, bfloat16, float16")
    return name


def _token_ids(value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise CheckpointError(f"eos_token_id is {value!r}, but must be a token id or a list of them")
    return tuple(ids)
