"""Evaluation: accuracy of a model on held-out images, each counted once."""

from __future__ import annotations

import ctypes
import dataclasses
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from torch import nn

from tlalign.checkpoints import folder_classes_of
from tlalign.config import EvalConfig, UsageError, started_processes
from tlalign.data import create_eval_loader, load_data_sets, resolve_image_config
from tlalign.networks import check_image_size, count_classes, create_model, load_all_weights, set_weights
from tlalign.unreadable import UnreadableImagesError

# Of malloc.h: how many blocks may be maps of their own, and how much may be free at the heap's end (-1: all of it).
_M_MMAP_MAX, _M_TRIM_THRESHOLD = -4, -1


@torch.no_grad()  # inference mode is not for sharded models
def evaluate(
    model: nn.Module,
    loader: Any,
    device: torch.device,
    precision: str = "float32",
    several: bool = False,
    after_batch: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Evaluates a model on all images of a loader.

    Args:
        model: Model that returns logits (B, C).
        loader: Gives images (B, channels, Hi, Wi) and class ids (B,).
        device: Device of the model.
        precision: What the model computes in; but for float32 by autocast.
        several: Add up what all processes of the run counted.
        after_batch: Is called after each batch, and may end the evaluation by an exception. All processes have as many.

    Returns:
        `loss` (cross entropy), `top1` and `top5` (per cent).
    """
    model.eval()
    evaluator = ClassificationEvaluator(device=device, max_samples=evaluation_sample_limit(loader))
    for images, classes in loader:
        with autocast(device, precision):
            output = model(images)
        evaluator.update(output, classes)
        if after_batch is not None:
            after_batch()
    return evaluator.compute(distributed=several)


def evaluate_checkpoint(path: Path, config: EvalConfig) -> dict[str, dict[str, float]]:
    """Evaluates the weights of a checkpoint on held-out images, in a model as timm makes it.

    Args:
        path: Checkpoint of timm or tlalign.
        config: What the model is and which images it is evaluated on.

    Returns:
        As `evaluate`, for `model` and, if the checkpoint holds other, averaged weights, for `EMA`.

    Raises:
        UsageError: If the checkpoint can't be read or is not of this model, the configuration can't be run, or an
            image can't be read.
    """
    device = prepare_device(config)
    weights = load_all_weights(path)
    classes = folder_classes_of(path)
    data = load_data_sets(config, trains=False, folder_classes=classes)
    # A folder of some of the classes numbers them as if there were no others.
    if classes is None and config.folder is not None and len(data.class_names) < data.num_classes:
        raise UsageError(
            f"data: {config.data} has {len(data.class_names)} of {data.num_classes} classes, and nothing says which; "
            "expected a folder with all of them"
        )
    of_weights = count_classes(weights["model"], config)
    if of_weights not in (None, data.num_classes):
        raise UsageError(f"num_classes: expected {of_weights}, of which {path} is, got {data.num_classes}")
    model = create_model(config, data.num_classes)
    image_config = resolve_image_config(config, model)
    check_image_size(model, image_config["input_size"])
    known = dataclasses.replace(config, num_classes=data.num_classes)  # images of others are refused
    loader = create_eval_loader(data.held_out, known, image_config, device)
    results = {}
    for name, state in weights.items():
        set_weights("checkpoint", path, state, model, config.model)
        try:
            results[name] = evaluate(model.to(device), loader, device, config.precision)
        except UnreadableImagesError as error:
            raise UsageError(f"data: {error}") from error
    return results


def prepare_device(config: EvalConfig) -> torch.device:
    """The device of a configuration, by default the accelerator if there is one; of several it becomes the current one.

    On the CPU `take_fast_products` and `keep_freed_memory` come with it.

    Raises:
        UsageError: If there is no such device.
    """
    if config.device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    else:
        try:
            device = torch.device(config.device)
            if started_processes() > 1:
                # Each takes one of its own later, and nothing of another's now.
                device = torch.device(device.type)
                if not torch.get_device_module(device).is_available():
                    raise RuntimeError("there is none")
            else:
                number = torch.zeros((), device=device)
                number.item()  # of the device meta there is none
                device = number.device
        except (RuntimeError, AssertionError) as error:
            raise UsageError(f"device: cannot use {config.device!r}: {str(error).splitlines()[0]}") from error
    if device.type == "cpu":
        take_fast_products()
        keep_freed_memory()
    elif device.index is not None:
        # Random numbers are seeded, and times taken, on the current one.
        torch.accelerator.set_device_index(device.index)
    return device


def take_fast_products() -> bool:
    """Has PyTorch multiply float32 on the CPU by oneDNN instead of MKL, where that is faster and float32 still.

    So it is taken to be on processors of AMD with AVX-512: measured were a Zen 5, where oneDNN is twice as fast, and a
    Zen 4, where it is a tenth faster, and PyTorch's fused attention slower for it. PyTorch takes it where it may round
    to bfloat16, which it does only on processors with AMX.

    Returns:
        Whether PyTorch does so now, for the rest of the process.
    """
    processor = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.9 can't tell
    is_faster = "AMD" in processor.get("cpu_name", "") and processor.get("avx512_f", False)
    if not is_faster or processor.get("amx_bf16", False):
        return False
    # Not torch.set_float32_matmul_precision, which is for GPUs, too.
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    return True


def keep_freed_memory() -> None:
    """Has glibc keep what tensors on the CPU free, for the rest of the process.

    By default it gives large blocks back to the system, which clears their pages for the next step again: measured were
    2 to 230 thousand pages a step in models on images of 224 pixels.
    """
    if platform.libc_ver()[0] == "glibc":
        process = ctypes.CDLL(None)
        process.mallopt(_M_MMAP_MAX, 0)
        process.mallopt(_M_TRIM_THRESHOLD, -1)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast to a precision; none to float32."""
    dtype = getattr(torch, precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
