"""Which of how many hosts this process is, and where rank 0 listens: from the flags, or from what started the processes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from pjax.config import EngineConfig
from pjax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """The variables by which something that starts processes tells each of them its place."""

    name: str
    rank: str
    size: str | None = None
    address: str | None = None
    """Rank 0's, or a list of all hosts, the first of which is rank 0's."""


LAUNCHERS = (
    Launcher(name="LeaderWorkerSet", rank="LWS_WORKER_INDEX", size="LWS_GROUP_SIZE", address="LWS_LEADER_ADDRESS"),
    Launcher(name="GKE's TPU webhook", rank="TPU_WORKER_ID", size=None, address="TPU_WORKER_HOSTNAMES"),
    Launcher(name="an Indexed Job", rank="JOB_COMPLETION_INDEX"),
    Launcher(name="Open MPI", rank="OMPI_COMM_WORLD_RANK", size="OMPI_COMM_WORLD_SIZE"),
    Launcher(name="Slurm", rank="SLURM_PROCID", size="SLURM_NTASKS", address="SLURM_STEP_NODELIST"),
)
"""In the order in which they are looked for: a pod of a LeaderWorkerSet on TPUs has two of them, and so has mpirun under Slurm."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """This process among `size` hosts."""

    rank: int
    size: int
    address: str  # of rank 0
    port: int  # where rank 0 listens
    key: bytes = field(repr=False)
    timeout: float  # seconds for all hosts to come

    @property
    def leader(self) -> str:
        """Where rank 0 listens, for messages."""
        return join_port(self.address, self.port)


def find_place(config: EngineConfig, environment: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place; None for an engine on one host. ConfigError when nothing tells it, or what does disagrees."""
    if config.nnodes == 1:
        return None
    rank, address = config.node_rank, config.master_addr
    launcher = next((one for one in LAUNCHERS if environment.get(one.rank, "").isdigit()), None)
    if launcher is not None and rank is None:
        rank = int(environment[launcher.rank])
        told = environment.get(launcher.size or "", "")
        if told.isdigit() and int(told) != config.nnodes:
            raise ConfigError(f"nnodes is {config.nnodes}, but {launcher.name} started {told} processes ({launcher.size})")
    if launcher is not None and address is None and launcher.address is not None:
        address = first_host(environment.get(launcher.address, "")) or None
    if rank is None:
        names = ", ".join(one.rank for one in LAUNCHERS)
        raise ConfigError(f"nnodes is {config.nnodes}, but node_rank is not given, and none of {names} is set")
    if not 0 <= rank < config.nnodes:
        raise ConfigError(f"node_rank is {rank}, but must be in [0, nnodes), and nnodes is {config.nnodes}")
    if address is None:
        raise ConfigError(f"nnodes is {config.nnodes}, but master_addr, the name or address of rank 0, is not given")
    key = (config.master_key or "pjax").encode()
    return Place(rank=rank, size=config.nnodes, address=address, port=config.master_port, key=key, timeout=config.start_timeout)


def join_port(address: str, port: int) -> str:
    """As URLs and gRPC have it: an IPv6 address in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def first_host(hosts: str) -> str:
    """The first of a list such as a,b or, as Slurm writes it, node[007-009,12],other."""
    head, bracket, rest = hosts.partition("[")
    if "," in head or not bracket:
        return head.partition(",")[0].strip()
    inside, _, after = rest.partition("]")
    number = inside.replace("-", ",").partition(",")[0]
    return f"{head}{number}{after.partition(',')[0]}".strip()
