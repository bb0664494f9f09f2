"""What is installed here, and what it cannot do."""

import importlib
import importlib.util
import os
import platform
from typing import Any

import torch
import torch.distributed as dist

from . import __version__, backends

HOW_TO_BUILD = "in a checkout, with g++ at hand, run `pip install .`"
HOW_TO_CUDA = "put nvcc of a CUDA toolkit on PATH (or set CUDACXX), then in a checkout run `COMMOPT_CUDA=1 pip install .`"


def info() -> dict[str, Any]:
    """What is built here, what runs what, and what is wrong with it."""
    native = importlib.import_module("commopt._C") if backends.built("cpu") else None
    found: dict[str, Any] = {
        "commopt": __version__, "python": platform.python_version(), "torch": torch.__version__, "triton": _version("triton"),
        "cpu": None, "cuda": None,
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
        "gloo": dist.is_available() and dist.is_gloo_available(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if dist.is_available() and dist.is_nccl_available() else None,
        "overrides": {name: os.environ[name] for name in ("COMMOPT_BACKEND", "COMMOPT_ISA") if name in os.environ},
        "ops": {}, "errors": [],
    }
    for device in ("cpu", "cuda"):
        try:
            found["ops"][device] = backends.owners(device)
        except (ImportError, ValueError) as error:
            found["errors"].append(f"the ops for {device} cannot be served: {error}")
    if native:
        found["cpu"] = {"isas": native.cpu.isas(), "isa": native.cpu.isa(), "threads": torch.get_num_threads()}
    if native and hasattr(native, "cuda"):
        runtime = native.cuda.runtime
        found["cuda"] = {"archs": native.cuda.archs.split(";"), "runtime": f"{runtime // 1000}.{runtime % 1000 // 10}"}
    return found | {"warnings": _warnings(found)}


def _version(package: str) -> str | None:
    import importlib.metadata

    return importlib.metadata.version(package) if importlib.util.find_spec(package) else None


def _gpu(index: int) -> dict[str, str]:
    major, minor = torch.cuda.get_device_capability(index)
    return {"name": torch.cuda.get_device_name(index), "arch": f"{major}{minor}"}


def _warnings(found: dict[str, Any]) -> list[str]:
    said = [f"{name}={value} is set in the environment" for name, value in found["overrides"].items()]
    if not found["cpu"]:
        said.append(f"commopt._C is not built, so the CPU is served by torch code, ten and more times slower: {HOW_TO_BUILD}")
    elif found["gpus"] and not found["cuda"] and torch.version.hip is None:
        said.append(f"there is a GPU, but this build has no CUDA kernels: {HOW_TO_CUDA}")
    for device, owners in found["ops"].items():
        slow = [op for op, owner in owners.items() if owner == "reference"]
        if slow and found["cpu"] and (device == "cpu" or found["gpus"]):
            said.append(f"on {device} the reference, which is slow, serves {', '.join(slow)}")
    if found["cuda"]:
        lowest = min(map(int, found["cuda"]["archs"]))
        said += [f"{gpu['name']} is sm_{gpu['arch']}, older than sm_{lowest}, the oldest in this build: rebuild with COMMOPT_CUDA_ARCHS={gpu['arch']}"
                 for gpu in found["gpus"] if int(gpu["arch"]) < lowest]
    if not found["gloo"]:
        said.append("torch.distributed has no gloo here: commopt needs it, also beside NCCL, to compare what the ranks are about to do")
    if found["gpus"] and not found["nccl"]:
        said.append("there is a GPU, but torch.distributed has no NCCL: messages are copied through host memory")
    return said
