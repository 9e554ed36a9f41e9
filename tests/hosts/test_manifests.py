"""deploy/multi-host*: flags that there are, as many devices as the model is divided over, and who is asked whether it is ready."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from pjax import cli
from pjax.cli.common import server_config
from pjax.hosts import find_place
from pjax.server import ServerConfig

ROOT = Path(__file__).resolve().parents[2]


def manifest(name: str) -> dict[str, Any]:
    """By kind and name."""
    found = yaml.safe_load_all((ROOT / "deploy" / name).read_text(encoding="utf-8"))
    return {f"{one['kind']} {one['metadata']['name']}": one["spec"] for one in found}


def parsed(words: list[str]) -> ServerConfig:
    args = cli.parser("serve").parse_args(["serve", *map(str, words)])
    args.model = args.model_argument
    return server_config(args)


def check_pod(pod: dict[str, Any], resource: str, num_hosts: int) -> ServerConfig:
    [container] = pod["containers"]
    config = parsed(container["args"])
    limits = container["resources"]["limits"]
    assert limits == container["resources"]["requests"]
    assert config.engine.nnodes == num_hosts and config.engine.tensor_parallel_size == num_hosts * int(limits[resource])
    assert pod["terminationGracePeriodSeconds"] > config.drain_seconds and pod["enableServiceLinks"] is False
    assert {"PJAX_API_KEY", "PJAX_MASTER_KEY"} <= {one["name"] for one in container["env"]}
    assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
    return config


@pytest.mark.parametrize(("name", "resource"), [("multi-host-gpu.yaml", "nvidia.com/gpu"), ("multi-host-tpu.yaml", "google.com/tpu")])
def test_leader_worker_sets(name: str, resource: str) -> None:
    """Pods that end, with status 0 too, are begun anew: a Job would count them as done."""
    found = manifest(name)
    group = found["LeaderWorkerSet llm"]["leaderWorkerTemplate"]
    leader, worker = group["leaderTemplate"]["spec"], group["workerTemplate"]["spec"]
    config = check_pod(leader, resource, group["size"])
    assert check_pod(worker, resource, group["size"]) == config
    assert group["restartPolicy"] == "RecreateGroupOnPodRestart" and {"restartPolicy"}.isdisjoint(leader | worker)
    tpu = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b,c,d"} if "tpu" in name else {}
    lws = {"LWS_WORKER_INDEX": "1", "LWS_GROUP_SIZE": str(group["size"]), "LWS_LEADER_ADDRESS": "llm-0.llm.default"}
    place = find_place(config.engine, lws | tpu)
    assert place is not None and (place.rank, place.address) == (1, "llm-0.llm.default")
    assert leader["containers"][0]["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert "readinessProbe" not in worker["containers"][0]
    assert found["Service llm-http"]["selector"]["leaderworkerset.sigs.k8s.io/worker-index"] == "0"


def test_a_slurm_job() -> None:
    text = (ROOT / "deploy" / "multi-host.sbatch").read_text(encoding="utf-8")
    [line] = [line for line in text.replace("\\\n", " ").splitlines() if line.startswith("srun")]
    words = shlex.split(line.partition("||")[0])
    config = parsed(words[words.index("serve") + 1 :])
    asked = dict(line.removeprefix("#SBATCH --").split("=") for line in text.splitlines() if line.startswith("#SBATCH") and "=" in line)
    assert config.engine.nnodes == int(asked["nodes"]) and asked["ntasks-per-node"] == "1"
    assert config.engine.tensor_parallel_size == int(asked["nodes"]) * int(asked["gpus-per-node"])
    place = find_place(config.engine, {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "gpu[3-4]"})
    assert place is not None and (place.rank, place.address) == (1, "gpu3")
