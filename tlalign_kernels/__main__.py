"""`python -m tlalign_kernels`: what is installed and usable here; `selftest` and `models` as further commands."""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import platform
import signal
import sys

import timm
import torch

from tlalign_kernels import extension
from tlalign_kernels.backends import BACKENDS, Problem
from tlalign_kernels.backends.cpu import instruction_set
from tlalign_kernels.patch import unfollowable_reason
from tlalign_kernels.selftest import selftest


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, 1 if a selftest failed, 2 if there is no such model."""
    parser = argparse.ArgumentParser(prog="python -m tlalign_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="{report,selftest,models}")
    commands.add_parser("report", help="versions, device and backends (the default)")
    test = commands.add_parser("selftest", help="check every usable backend against the float64 reference")
    test.add_argument("--device", default=None, help="device to test; default: the GPU if there is one, else the CPU")
    models = commands.add_parser("models", help="list timm's models with 'supported' or the reason why not")
    models.add_argument("pattern", nargs="?", default="*", help="names to list, such as 'vit_*'; default: all")
    options = parser.parse_args(arguments)
    if options.command == "selftest":
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(1, device=device).item()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            parser.error(f"--device: expected one that computes, got {device!r}: {str(error).splitlines()[0]}")
        return _selftest(device)
    if options.command == "models":
        return _models(options.pattern)
    return _report()


def _report() -> int:
    print("versions")
    print(f"  {'torch':<16} {torch.__version__}")
    for name in ("tlalign-kernels", "timm", "triton", "numpy"):
        try:
            print(f"  {name:<16} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"  {name:<16} not installed")
    print(f"  {'python':<16} {platform.python_version()} on {platform.platform()}")
    print("devices")
    print(f"  cpu              {torch.get_num_threads()} threads, {platform.machine()}")
    if extension.compiled is not None:
        features = [name for name, present in extension.compiled.cpu_features().items() if present]
        print(f"  cpu features     {' '.join(features) or 'none of those that kernels use'}")
        print(f"  cpu kernels      {_instruction_set()}")
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        print(f"  cuda:{index}           {torch.cuda.get_device_name(index)}, sm_{major}{minor}")
    print("extension")
    if extension.compiled is None:
        print(f"  not usable: {extension.missing_reason}")
    else:
        for name, value in extension.compiled.build_info().items():
            shown = ", ".join(value) or "none" if isinstance(value, list) else value
            print(f"  {name:<16} {shown}")
    print("backends (for a ViT in training: N = 197, D = 64, float32, one label per token)")
    for device in map(torch.device, ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]):
        problem = Problem(
            device.type, torch.float32, 8, 6, 197, 197, 64, 1, torch.float32, False, False, 0.0, True,
            device_index=device.index,
        )  # fmt: skip
        for name, module in BACKENDS.items():
            try:
                reasons = module.unsupported_reasons(problem)
            except ValueError as error:  # of an environment variable
                reasons = [str(error)]
            print(f"  {name:<16} on {device}: {'usable' if not reasons else '; '.join(reasons)}")
    return 0


def _instruction_set() -> str:
    try:
        return instruction_set() or "none"
    except ValueError as error:  # of an environment variable
        return str(error)


def _selftest(device: str) -> int:
    print(f"device {device}; errors as a part of what is allowed (2x plain PyTorch's own error plus one rounding)")
    failures = 0
    for backend, case, dtype, results in selftest(device):
        line = f"{backend:<10} {case.name:<30} {str(dtype).removeprefix('torch.'):<9}"
        if isinstance(results, Exception):
            failures += 1
            print(f"{line} FAILED: {type(results).__name__}: {next(iter(str(results).splitlines()), '')}")
            continue
        if isinstance(results[0], str):
            print(f"{line} not supported: {'; '.join(results)}")
            continue
        worst = max(results, key=lambda check: check.part)
        failed = [check.tensor for check in results if not check.passed]
        failures += bool(failed)
        print(f"{line} {f'FAILED: {failed}' if failed else 'ok'}, worst {worst.part:.2f} ({worst.tensor})")
    print("all checks passed" if not failures else f"{failures} cases failed")
    return 1 if failures else 0


def _models(pattern: str) -> int:
    names = fnmatch.filter(timm.list_models(), pattern)
    if not names:
        print(f"pattern: expected one of timm's names, such as 'vit_*', got {pattern}", file=sys.stderr)
        return 2
    supported = 0
    for name in names:
        with torch.device("meta"):
            reason = unfollowable_reason(timm.create_model(name))
        supported += reason is None
        print(f"{name:<50} {reason or 'supported'}", flush=True)
    print(f"{supported} of {len(names)} models are supported")
    return 0


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `models | head` ends without a traceback
    sys.exit(main())
