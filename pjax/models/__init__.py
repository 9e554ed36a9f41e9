"""Models by architecture. A family is a module with the names of `pjax.models.llama`; see `FAMILIES`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pjax.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    import jax
    from flax import nnx
    from jax.sharding import Mesh

    from pjax.checkpoints.arena import Arena
    from pjax.checkpoints.gguf_header import GGUFHeader
    from pjax.models.sharding import Shares

FAMILIES: dict[str, str] = {
    "GPT2LMHeadModel": "pjax.models.gpt2",
    "GPTNeoXForCausalLM": "pjax.models.gpt_neox",
    "LlamaForCausalLM": "pjax.models.llama",
    "MistralForCausalLM": "pjax.models.llama",
    "OPTForCausalLM": "pjax.models.opt",
    "Qwen2ForCausalLM": "pjax.models.llama",
    "Qwen3ForCausalLM": "pjax.models.llama",
}
"""Hugging Face architecture to the module that implements it; `register_family` adds to it."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A checkpoint whose names, shapes and config fit a model; its weights are read by `load`.

    What a step's compilation needs is there before the weights are: graph and abstract parameters.
    """

    config: Any
    graph: nnx.GraphDef[Any]
    abstract: nnx.State[Any, Any]  # of jax.ShapeDtypeStruct
    eos_token_ids: tuple[int, ...]
    path: Path
    header: GGUFHeader | None = None  # of a GGUF file, which has the tokenizer too
    dtype: str
    read_weights: Callable[[bool, Any], nnx.State[Any, Any]]
    close: Callable[[], None] = lambda: None  # ends a `load` in another thread with an error, at its next tensor
    shares: Shares | None = None  # where it is divided over a mesh: `graph` is of one share, `abstract` of all in their places

    def load(self, *, progress: bool = True, shardings: Any = None) -> nnx.State[Any, Any]:
        """The parameters; reads the checkpoint one tensor at a time. To be called once.

        Args:
          shardings: a tree like `abstract` with a jax.sharding.Sharding at every leaf; the default device by default. A model
            that is divided over a mesh has its own.
        """
        return self.read_weights(progress, shardings)

    @property
    def own_config(self) -> Any:
        """The config of what one device runs."""
        return self.config if self.shares is None else self.shares.config

    @property
    def num_bytes(self) -> int:
        """Memory of the parameters on one device."""
        import math

        import jax

        def size(leaf: Any) -> int:
            return math.prod(leaf.shape if self.shares is None else leaf.sharding.shard_shape(leaf.shape)) * int(leaf.dtype.itemsize)

        return sum(map(size, jax.tree.leaves(self.abstract)))


FAMILY_NAMES = ("Config", "Model", "weight_table", "known_leftovers", "PREFIX", "OTHER_NAMES")


def register_family(architecture: str, module: str) -> None:
    """Adds a family from outside pjax: the architecture of its configs, and the module that has `FAMILY_NAMES` (docs/add_a_model.md).

    Raises ValueError when the architecture is taken or the module lacks a name, ImportError when it can't be imported.
    """
    if architecture in FAMILIES:
        raise ValueError(f"architecture is {architecture!r}, which {FAMILIES[architecture]} implements already")
    found = importlib.import_module(module)
    missing = [name for name in FAMILY_NAMES if not hasattr(found, name)]
    if missing:
        raise ValueError(f"module {module} lacks {', '.join(missing)}, which a family must have")
    if "num_rows" not in inspect.signature(found.Model.logits).parameters:
        raise ValueError(f"{module}.Model.logits takes no num_rows, which it must: logits(hidden, num_rows)")
    FAMILIES[architecture] = module


def find_family(hf_config: Mapping[str, Any]) -> Any:
    """The module that implements a config's architecture; UnsupportedError names those that pjax has."""
    names = hf_config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"config: architectures is {names!r}, but must be a list of names")
    for name in names:
        if name in FAMILIES:
            return importlib.import_module(FAMILIES[name])
    shown = ", ".join(map(str, names)) or f"(none; model_type {hf_config.get('model_type')!r})"
    raise UnsupportedError(f"architecture {shown} is not supported; supported: {', '.join(sorted(FAMILIES))}")


def open_model(
    model: str | Path, *, dtype: str, layer_mode: str = "unroll", mesh: Mesh | None = None, arena: Arena | None = None
) -> ModelSource:
    """Opens a checkpoint (folder, .gguf file or hub id) for parameters of `dtype` ("auto": the checkpoint's).

    Args:
      mesh: what the model is divided over (tensor parallelism): its axis "model"; by default it is on one device.
      arena: memory for the parameters that was got before; what they do not need of it is given back when they are loaded.

    Raises ConfigError when the mesh does not divide the model, CheckpointError when the checkpoint is missing, damaged or does not
    fit its config, UnsupportedError when pjax has no such architecture or does not apply a field of its config.
    """
    from flax import nnx

    from pjax.checkpoints.orbax_folder import OrbaxFolder
    from pjax.checkpoints.tensors import open_tensors
    from pjax.checkpoints.weights import load_into
    from pjax.models.sharding import divide

    tensors = open_tensors(model, find_family)
    checkpoint, config, hf = tensors.checkpoint, tensors.config, tensors.hf
    dtype = tensors.choose_dtype(dtype)

    def make(of: Any) -> Any:
        return tensors.family.Model(of, dtype=dtype, layer_mode=layer_mode)

    shares = None if mesh is None else divide(make, config, mesh)
    graph, abstract = nnx.split(nnx.eval_shape(lambda: make(config))) if shares is None else (shares.graph, shares.abstract)

    def read_weights(progress: bool, shardings: Any) -> nnx.State[Any, Any]:
        with checkpoint, nullcontext() if arena is None else arena:
            if shares is None and isinstance(checkpoint, OrbaxFolder) and layer_mode != "scan" and checkpoint.fits(tensors.sources):
                return checkpoint.load(abstract, shardings, progress=progress)
            options: dict[str, Any] = {"stacked_layers": config.num_layers if layer_mode == "scan" else 0, "progress": progress}
            if shares is not None:
                return shares.load(tensors.sources, tensors.read, **options)
            return load_into(abstract, tensors.sources, tensors.rows, shardings=shardings, arena=arena, **options)

    return ModelSource(
        config=config,
        graph=graph,
        abstract=abstract,
        eos_token_ids=_token_ids(_first_of("eos_token_id", checkpoint.generation_config(), hf)),
        path=checkpoint.path,
        header=checkpoint.header,
        dtype=dtype,
        read_weights=read_weights,
        close=checkpoint.close,
        shares=shares,
    )


def load(model: str | Path, *, dtype: str = "auto", layer_mode: str = "unroll", progress: bool = True) -> Any:
    """A model with its parameters, an NNX module: for `forward` (logits of whole sequences, differentiable) or your own code.

    Arguments and errors as for `open_model`.
    """
    from flax import nnx

    source = open_model(model, dtype=dtype, layer_mode=layer_mode)
    return nnx.merge(source.graph, source.load(progress=progress))


def forward(model: Any, token_ids: jax.Array) -> jax.Array:
    """Logits after every token of `token_ids` [B, S], float32 [B, S, V]; see `pjax.models.dense.forward`."""
    from pjax.models import dense

    return dense.forward(model, token_ids)


def to_hf_state(model: Any) -> dict[str, jax.Array]:
    """A model's parameters (or of a tree like them, gradients say, merged into a module) by their Hugging Face names and shapes.

    The inverse of loading: views and slices of the arrays where they are; a stacked model's layers come apart.
    """
    from flax import nnx

    from pjax.checkpoints.weights import expand, to_sources

    config = model.config
    family = importlib.import_module(type(model).__module__)
    state = nnx.state(model, nnx.Param)
    return to_sources(state, expand(family.weight_table(config), config.num_layers), config.num_layers)


def _first_of(key: str, *configs: Mapping[str, Any]) -> Any:
    """The value of the first config that has the key; null is no value."""
    return next((config[key] for config in configs if config.get(key) is not None), None)


def _token_ids(value: Any) -> tuple[int, ...]:
    """The ids of a config's eos_token_id. Those that no vocabulary has, -1 say, are left to `Intake`, which drops them with a warning."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise CheckpointError(f"eos_token_id is {value!r}, but must be a token id or a list of them")
    return tuple(ids)
