"""The engine's settings, checked once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

from pjax.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
LAYER_MODES = ("auto", "unroll", "scan", "loop")
ATTENTION_BACKENDS = ("native", "tpu", "triton", "mosaic_gpu", "xla", "reference")
PREEMPTION_MODES = ("auto", "recompute", "swap")
WARMUPS = ("background", "all", "none")
PAGE_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of one engine, named as in vLLM where vLLM has them. None means: chosen for the model and device."""

    dtype: str = "auto"
    """Type of parameters and activations. auto is the checkpoint's on accelerators and float32 on CPUs."""
    max_model_len: int | None = None
    """Maximum number of tokens of one sequence, prompt and output together; by default the model's own, or what the page pool holds."""
    max_num_seqs: int | None = None
    """Most sequences in one step; 64 on a CPU, 256 on accelerators."""
    max_num_batched_tokens: int | None = None
    """Most tokens in one step, longer prompts are computed in chunks; 512 on a CPU, 2,048 on accelerators, no less than max_num_seqs."""
    page_size: int = 16
    """Tokens of one page."""
    kv_cache_memory: int | None = None
    """Bytes of the page pool; by default `memory_share` of what the device has left once the weights are on it."""
    memory_share: float = 0.9
    """On a CPU, whose memory others use too, a fifth of this."""
    num_pages: int | None = None
    """Pages of the pool, instead of its bytes."""
    enable_prefix_caching: bool = True
    """Full pages are kept when their request ends, until the pool needs them, and found again by prompts that begin alike."""
    async_scheduling: bool = True
    """Start a step before the tokens of the one before it are on the host, so that the device never waits for Python."""
    preemption_mode: str = "auto"
    """What becomes of a preempted request's pages: copied to host memory and back ("swap"), computed again ("recompute"), or what is
    thought to be quicker: by the measured times of steps, and of copies with `warmup` "all" (else 5 GB/s are assumed)."""
    swap_space: int | None = None
    """Bytes of host memory for such pages; by default what the page pool takes, at most 4 GiB and a tenth of what is free."""
    seconds_per_priority: float = 60.0
    """A request of one level of priority less is served as if it had come so much earlier: those of a poor priority don't starve."""
    seed: int | None = None
    """Requests without a seed of their own take one from this and their number. By default 0 for engines of a program, which so repeat
    their samples, and a random one for servers, which the log names: replicas must not all give the same samples."""
    layer_mode: str = "auto"
    """How the layers run: "unroll", "scan" (compiles fastest, runs slower) or "loop"; auto is loop on a CPU, else unroll."""
    warmup: str = "background"
    """When the programs of steps are compiled: "background", all of them while requests run, what these need first; "all", before the
    first request; "none", each when it is first needed. With "all" a CPU's pool takes its memory at once, else as it fills."""
    lazy: bool = False
    """The same as `warmup` "none"."""
    compilation_cache_dir: str | None = "auto"
    """Where compiled programs are kept between processes; auto is JAX's own setting or else ~/.cache/pjax, None is none."""
    tensor_parallel_size: int = 1
    """How many devices the model and its pages are divided over."""
    data_parallel_size: int = 1
    """How many copies of the model, each on as many devices, share the requests of `LLM.generate`; 1 for an engine by itself."""
    mesh: Any = None
    """A jax.sharding.Mesh to use instead; the model is divided over its axis "model", and the same over any other."""
    nnodes: int = 1
    """Hosts that serve one model together, a process each with the same flags; `tensor_parallel_size` spans the devices of all."""
    node_rank: int | None = None
    """Which of the hosts this is, from 0, which plans and serves; by default what Slurm, Kubernetes or Open MPI say."""
    master_addr: str | None = None
    """Name or address of rank 0, for the others; by default what Slurm or Kubernetes say."""
    master_port: int = 29500
    """Where rank 0 listens to the other hosts."""
    master_key: str | None = field(default=None, repr=False)
    """A secret that the hosts prove to each other; without one, whoever reaches the port may pose as a host. Better in the environment."""
    start_timeout: float = 300.0
    """Seconds for all hosts to come."""
    attention_backend: str | None = None
    """"native", "tpu", "triton", "mosaic_gpu", "xla" or "reference"; by default the fastest for the platform."""
    logits_processors: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """JAX functions (logits float32 [S, V], token ids int32 [S, L], lengths int32 [S]) -> logits, by the names that requests give."""

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "data_parallel_size"):
            if getattr(self, name) is None:
                raise ConfigError(f"{name} is None, but must be an integer >= 1")
        sizes = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_memory", "num_pages", "swap_space")
        for name in (*sizes, "tensor_parallel_size", "data_parallel_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{name} is {value!r}, but must be an integer >= 1")
        for name, kinds in (
            ("lazy", bool),
            ("enable_prefix_caching", bool),
            ("async_scheduling", bool),
            ("page_size", int),
            ("memory_share", int | float),
            ("compilation_cache_dir", str | None),
        ):
            value = getattr(self, name)
            if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
                raise ConfigError(f"{name} is {value!r}, but must be {getattr(kinds, '__name__', kinds)}")
        if not is_number(self.seconds_per_priority) or not 0 < self.seconds_per_priority < float("inf"):
            raise ConfigError(f"seconds_per_priority is {self.seconds_per_priority!r}, but must be a number > 0")
        if not isinstance(self.logits_processors, Mapping):
            raise ConfigError(f"logits_processors is {self.logits_processors!r}, but must be functions by their names")
        for name, process in self.logits_processors.items():
            if not isinstance(name, str) or not name or not callable(process):
                raise ConfigError(f"logits_processors has {name!r}: {process!r}, but must have functions by their names")
        if self.attention_backend not in (None, *ATTENTION_BACKENDS):
            raise ConfigError(f"attention_backend is {self.attention_backend!r}, but must be one of {', '.join(ATTENTION_BACKENDS)}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}, but must be one of {', '.join(DTYPES)}")
        if self.layer_mode not in LAYER_MODES:
            raise ConfigError(f"layer_mode is {self.layer_mode!r}, but must be one of {', '.join(LAYER_MODES)}")
        if self.preemption_mode not in PREEMPTION_MODES:
            raise ConfigError(f"preemption_mode is {self.preemption_mode!r}, but must be one of {', '.join(PREEMPTION_MODES)}")
        if self.warmup not in WARMUPS:
            raise ConfigError(f"warmup is {self.warmup!r}, but must be one of {', '.join(WARMUPS)}")
        if self.page_size not in PAGE_SIZES:
            raise ConfigError(f"page_size is {self.page_size!r}, but must be one of {', '.join(map(str, PAGE_SIZES))}")
        if not 0 < self.memory_share <= 1:
            raise ConfigError(f"memory_share is {self.memory_share!r}, but must be in (0, 1]")
        if self.seed is not None and (not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**63):
            raise ConfigError(f"seed is {self.seed!r}, but must be an integer in [0, 2**63)")
        if self.max_num_seqs and self.max_num_batched_tokens and self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(f"max_num_batched_tokens is {self.max_num_batched_tokens}, but must be >= max_num_seqs {self.max_num_seqs}")
        if self.num_pages is not None and self.kv_cache_memory is not None:
            raise ConfigError(f"num_pages ({self.num_pages}) and kv_cache_memory ({self.kv_cache_memory}) can't both be given")

        self._check_hosts()

    def _check_hosts(self) -> None:
        for name, low, high in (("nnodes", 1, 4096), ("node_rank", 0, 4095), ("master_port", 1, 65535)):
            value = getattr(self, name)
            if name == "node_rank" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ConfigError(f"{name} is {value!r}, but must be an integer in [{low}, {high}]")
        for name in ("master_addr", "master_key"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ConfigError(f"{name} is {'not text' if name == 'master_key' else repr(value)}, but must be non-empty text")
        if not is_number(self.start_timeout) or not 0 < self.start_timeout <= 1e6:
            raise ConfigError(f"start_timeout is {self.start_timeout!r}, but must be seconds in (0, 1e6]")
        if self.nnodes == 1:
            if self.node_rank:
                raise ConfigError(f"node_rank is {self.node_rank}, but nnodes is 1")
            return
        if self.data_parallel_size != 1:
            raise ConfigError(
                f"data_parallel_size is {self.data_parallel_size} and nnodes is {self.nnodes}, but several hosts run one engine"
            )

    def for_platform(self, platform: str) -> EngineConfig:
        """With the sizes of a step that suit "cpu", "gpu" or "tpu", where they are not given."""
        num_seqs, num_tokens = (64, 512) if platform == "cpu" else (256, 2048)
        tokens = self.max_num_batched_tokens or max(num_tokens, self.max_num_seqs or 0)
        return replace(self, max_num_seqs=self.max_num_seqs or min(num_seqs, tokens), max_num_batched_tokens=tokens)

    @property
    def warmup_mode(self) -> str:
        """`warmup`, or what it comes to: "none" where `lazy` is set, and "all" instead of the background where several hosts run."""
        if self.lazy:
            return "none"
        return "all" if self.warmup == "background" and self.nnodes > 1 else self.warmup

    @property
    def step_sizes(self) -> tuple[int, int]:
        """(max_num_seqs, max_num_batched_tokens), once `for_platform` has chosen them."""
        assert self.max_num_seqs is not None and self.max_num_batched_tokens is not None, "for_platform was not asked"
        return self.max_num_seqs, self.max_num_batched_tokens


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is an int or a float; a bool is neither."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_step_timeout(seconds: object) -> None:
    """ConfigError when it is neither None nor seconds in [0, 1e9]."""
    if seconds is not None and not (is_number(seconds) and 0 <= seconds <= 1e9):
        raise ConfigError(f"step_timeout is {seconds!r}, but must be seconds in [0, 1e9], or None")
