"""Export: the weights of a run as a plain timm checkpoint, proved to give the run's own logits."""

from __future__ import annotations

import importlib.metadata
import io
import json
from pathlib import Path

import safetensors
import safetensors.torch
import timm
import timm.models
import torch
from torch import Tensor, nn

from tlalign.config import ModelConfig, UsageError
from tlalign.data import resolve_image_config
from tlalign.networks import (
    check_image_size,
    count_classes,
    create_model,
    load_all_weights,
    model_arguments,
    set_weights,
)
from tlalign.runs import written_whole

_SUFFIXES = (".safetensors", ".pth")


def export_checkpoint(checkpoint: Path, output: Path, config: ModelConfig, ema: bool | None = None) -> tuple[str, str]:
    """Writes weights of a checkpoint to a file that timm.create_model loads, and checks that it does.

    Args:
        checkpoint: Checkpoint of timm or tlalign.
        output: File to write: `.safetensors`, or `.pth` for a bare state dict.
        config: What the model is; without num_classes, the weights of its classifier tell.
        ema: Export the averaged weights, or those of the model; None: averaged ones if there are any.

    Returns:
        The weights that were exported, `model` or `EMA`, and the line of Python that loads them.

    Raises:
        UsageError: If there are no such weights, they are not of this model, the file exists or can't be written, or
            the model that timm makes of it gives other logits.
    """
    if output.suffix not in _SUFFIXES:
        raise UsageError(f"output: expected a file that ends in {' or '.join(_SUFFIXES)}, got {output}")
    if output.exists():
        raise UsageError(f"output: expected a new file, but {output} exists")
    name, weights = _choose_weights(checkpoint, ema)
    num_classes = config.num_classes or count_classes(weights, config)
    if num_classes is None:
        raise UsageError(f"num_classes: expected a number, since the weights don't tell how many {config.model} has")
    model = create_model(config, num_classes)
    set_weights("checkpoint", checkpoint, weights, model, config.model)
    arguments = model_arguments(config, num_classes)
    del arguments["model_name"], arguments["pretrained_cfg"]
    image_config = resolve_image_config(config, model)
    check_image_size(model, image_config["input_size"])
    metadata = {
        "format": "pt",
        "architecture": config.model,
        "model_args": json.dumps(arguments),
        "pretrained_cfg": json.dumps(image_config),
        "weights": name,
        "timm": importlib.metadata.version("timm"),
    }
    try:
        with written_whole(output) as unfinished:
            _save(model, unfinished, metadata)
            loaded = timm.create_model(config.model, checkpoint_path=str(unfinished), **arguments)
            _compare_logits(model, loaded, image_config["input_size"], output)
    except OSError as error:
        raise UsageError(f"output: cannot write {output}: {error}") from error
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise UsageError(f"output: timm can't load {output}, which was removed: {error}") from error
    words = [repr(config.model), *(f"{key}={value!r}" for key, value in arguments.items())]
    imports = "import timm, tlalign.models" if type(model).__module__.startswith("tlalign.") else "import timm"
    return name, f"{imports}; timm.create_model({', '.join(words)}, checkpoint_path={str(output)!r})"


def _choose_weights(checkpoint: Path, ema: bool | None) -> tuple[str, dict[str, Tensor]]:
    weights = load_all_weights(checkpoint)
    if ema and "EMA" not in weights:
        raise UsageError(f"ema: expected averaged weights in {checkpoint}, but it holds only the model's")
    name = "EMA" if "EMA" in weights and ema is not False else "model"
    return name, weights[name]


def _save(model: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Writes the state dict of a bare model, whose keys are timm's own."""
    # Clones, since safetensors takes no tensors that share memory.
    state = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in model.state_dict().items()}
    if path.suffix == ".safetensors":
        content = safetensors.torch.save(state, metadata)
    else:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()
    # Not by the libraries' own functions: they hide what is wrong with the disk, and who may read the file.
    path.write_bytes(content)


@torch.inference_mode()
def _compare_logits(model: nn.Module, loaded: nn.Module, input_size: tuple[int, ...], output: Path) -> None:
    images = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
    expected, logits = (each.eval()(images) for each in (model, loaded))
    if not torch.equal(logits, expected):
        difference = (logits - expected).abs().max().item()
        raise UsageError(
            f"output: what timm loads from {output} gives other logits, by up to {difference:.3g}; the file was removed"
        )
