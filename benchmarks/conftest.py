"""Fixtures and options of all benchmarks, and what their JSON says of the machine."""

import functools
import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks import racing

GPU_FIELDS = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "memory.total")


def pytest_addoption(parser):
    parser.addoption("--race-seconds", type=float, default=1.5, help="time that the rounds of a row take")


def pytest_itemcollected(item):
    if "race" in item.fixturenames:
        item.add_marker(pytest.mark.benchmark(timer=racing.CLOCK.read))


@pytest.fixture(autouse=True)
def default_products():
    """PyTorch multiplies as it does by default, whatever `tlalign train` told it in a benchmark before."""
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"


@pytest.fixture
def race(benchmark, request):
    return functools.partial(racing.race, benchmark, request.config.getoption("race_seconds"))


def pytest_benchmark_update_machine_info(config, machine_info):
    for name in ("node", "release", "python_build"):  # no name of a machine goes into a report
        machine_info.pop(name, None)
    cpu = machine_info.get("cpu", {})
    machine_info["cpu"] = {key: cpu[key] for key in ("brand_raw", "arch", "count") if key in cpu}
    machine_info["threads"] = torch.get_num_threads()
    machine_info["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    machine_info["versions"] = versions()
    if racing.DEVICE == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine_info["gpu"] = {
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            **of_nvidia_smi(),
        }


def versions():
    found = {}
    for package in ("torch", "timm", "triton", "flash_attn", "tlalign-kernels"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def of_nvidia_smi():
    """Name, driver and clocks of the first GPU; nothing where the tool is missing."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", "-i", "0", "--format=csv,noheader", f"--query-gpu={','.join(GPU_FIELDS)}"]
    done = subprocess.run(command, capture_output=True, text=True)
    values = done.stdout.strip().split(", ")
    return dict(zip(GPU_FIELDS, values, strict=True)) if len(values) == len(GPU_FIELDS) else {}
