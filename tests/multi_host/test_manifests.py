"""deploy/multi-host*: flags that there are, as many devices as the model is divided over, and who is asked whether it is ready."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

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


def test_an_indexed_job_on_tpus() -> None:
    found = manifest("multi-host-tpu.yaml")
    job, service, clients = found["Job llm"], found["Service llm"], found["Service llm-http"]
    pod = job["template"]["spec"]
    config = check_pod(pod, "google.com/tpu", job["completions"])
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"]
    assert service["clusterIP"] == "None" and pod["subdomain"] == "llm" and service["selector"] == {"job-name": "llm"}
    place = find_place(config.engine, {"JOB_COMPLETION_INDEX": "3", "TPU_WORKER_ID": "3", "TPU_WORKER_HOSTNAMES": "a,b,c,d"})
    assert place is not None and (place.rank, place.address) == (3, "llm-0.llm")
    assert clients["selector"]["batch.kubernetes.io/job-completion-index"] == "0"
    code = pod["containers"][0]["readinessProbe"]["exec"]["command"][-1]
    compile(code, "probe", "exec")
    assert "/ready" in code and f":{config.port}/" in code


def test_a_leader_worker_set_on_gpus() -> None:
    found = manifest("multi-host-gpu.yaml")
    group = found["LeaderWorkerSet llm"]["leaderWorkerTemplate"]
    leader, worker = group["leaderTemplate"]["spec"], group["workerTemplate"]["spec"]
    config = check_pod(leader, "nvidia.com/gpu", group["size"])
    assert check_pod(worker, "nvidia.com/gpu", group["size"]) == config
    place = find_place(config.engine, {"LWS_WORKER_INDEX": "1", "LWS_GROUP_SIZE": "2", "LWS_LEADER_ADDRESS": "llm-0.llm.default"})
    assert place is not None and (place.rank, place.address) == (1, "llm-0.llm.default")
    assert leader["containers"][0]["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert "readinessProbe" not in worker["containers"][0]


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
