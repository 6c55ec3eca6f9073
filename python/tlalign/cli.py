"""Command line: `tlalign train`, `tlalign eval` and `tlalign analyze`."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

try:
    import jsonargparse

    from tlalign.config import (
        CONFIG_FILE,
        AnalyzeConfig,
        EvalConfig,
        TrainConfig,
        UsageError,
        field_names,
        load_config_file,
        load_recipe,
        recipe_names,
        suggestion,
    )
except ModuleNotFoundError as missing:
    raise SystemExit(f"tlalign: {missing.name} is not installed; pip install 'tlalign-kernels[train]'") from missing

if TYPE_CHECKING:
    from tlalign.engine import Trainer
    from tlalign.runs import RunFolder

# Imports of torch wait in the functions: help and errors come at once, and this is read before they start threads.
# The threads of libgomp spin while they wait, by default so long that a step takes several times as long beside another
# busy process (loader workers, say); not to spin costs a third with small layers on an idle machine. Four epochs of the
# digits on two cores, idle and beside one busy process: 1000 rounds 10 and 15 s, none 13 and 12 s, 10000 10 and 22 s.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_DEFAULT_RECIPE = "digits"
_USAGE = """usage: tlalign COMMAND [options]

Trains vision transformers on mixed images with token-label alignment.

commands:
  train   train a model; without options a small one on handwritten digits, in a minute or two
  eval    evaluate a checkpoint
  analyze show what alignment does to the labels of a checkpoint's tokens

`tlalign COMMAND --help` lists the options.
"""

Config = TypeVar("Config", bound=EvalConfig)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Words after `tlalign`; by default those of this process.

    Returns:
        Exit code: 0; 1 if training failed; 2 if what was asked for can't be done; 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if arguments else 2
    commands = {"train": train, "eval": evaluate, "analyze": analyze}
    name, *options = arguments
    try:
        if name not in commands:
            raise UsageError(f"expected {', '.join(commands)}, got {name}{suggestion(name, list(commands))}")
        return commands[name](options)
    except UsageError as error:
        print(f"tlalign: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tlalign: interrupted", file=sys.stderr)
        return 130


def train(options: Sequence[str]) -> int:
    """`tlalign train`: trains a model and says where everything was written."""
    sources = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    sources.add_argument("--recipe")
    sources.add_argument("--config")
    given, flags = sources.parse_known_args(options)
    values = load_recipe(given.recipe or _DEFAULT_RECIPE)
    of_file = {} if given.config is None else load_config_file(given.config)
    model = _model_among(flags) or of_file.get("model")
    if model not in (None, values.get("model")):
        # They are made for the model of the recipe.
        values.pop("model_kwargs", None)
    values |= of_file
    parser = jsonargparse.ArgumentParser(
        prog="tlalign train",
        description="Trains a model. A recipe is the start; values of --config replace its, and flags replace both.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    recipes = f"{', '.join(recipe_names())}, or none for plain defaults."
    parser.add_argument("--recipe", default=_DEFAULT_RECIPE, help=f"Name of a recipe: {recipes}")
    parser.add_argument("--config", help="YAML file with values for any of the options below.")
    config = _parse(parser, TrainConfig, values, flags)
    if given.recipe is None and config.data != load_recipe(_DEFAULT_RECIPE)["data"]:
        raise UsageError(f"recipe: the default, {_DEFAULT_RECIPE}, is not made for {config.data}; give --recipe none")
    return _run(config)


def evaluate(options: Sequence[str]) -> int:
    """`tlalign eval`: prints the accuracy of a checkpoint's weights."""
    sources = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    sources.add_argument("--checkpoint")
    given, flags = sources.parse_known_args(options)
    parser = jsonargparse.ArgumentParser(
        prog="tlalign eval",
        description=f"Evaluates a checkpoint of timm or tlalign. Where a {CONFIG_FILE} lies beside it, that says what "
        "it is of; flags replace its values.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", help="Checkpoint to evaluate.")
    values = {}
    if given.checkpoint is not None:
        beside = Path(given.checkpoint).parent / CONFIG_FILE
        values = load_config_file(beside) if beside.is_file() else {}
    known = field_names(EvalConfig)
    config = _parse(parser, EvalConfig, {name: values[name] for name in values if name in known}, flags)
    if given.checkpoint is None:
        raise UsageError("checkpoint: expected a file, got nothing (--checkpoint PATH)")
    from tlalign.engine import evaluate_checkpoint

    for name, result in evaluate_checkpoint(Path(given.checkpoint), config).items():
        print(f"{name}: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, loss {result['loss']:.4f}")
    return 0


def analyze(options: Sequence[str]) -> int:
    """`tlalign analyze`: writes pictures, tables and a page about what alignment does in a model."""
    sources = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    sources.add_argument("--checkpoint")
    given, flags = sources.parse_known_args(options)
    parser = jsonargparse.ArgumentParser(
        prog="tlalign analyze",
        description="Shows what alignment does to the labels of a model's tokens: pictures, tables and a page of HTML. "
        f"Where a {CONFIG_FILE} lies beside the checkpoint, that says what it is of; flags replace its values.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", help="Checkpoint of timm or tlalign; without one, weights are random.")
    values = {}
    if given.checkpoint is not None:
        beside = Path(given.checkpoint).parent / CONFIG_FILE
        values = load_config_file(beside) if beside.is_file() else {}
    # Batches are not those of training: the tokens of all layers are kept for one.
    known = set(field_names(EvalConfig)) - {"batch_size"}
    config = _parse(parser, AnalyzeConfig, {name: values[name] for name in values if name in known}, flags)
    from tlalign.analysis.report import write_report

    page = write_report(config, None if given.checkpoint is None else Path(given.checkpoint))
    print(f"page      {page}\npictures and tables beside it")
    return 0


def _parse(
    parser: jsonargparse.ArgumentParser, config_class: type[Config], values: dict[str, Any], flags: Sequence[str]
) -> Config:
    """Reads flags over values; both are checked against the types of the configuration's fields."""
    parser.add_class_arguments(config_class, None)
    checker = jsonargparse.ArgumentParser(exit_on_error=False)
    checker.add_class_arguments(config_class, None)
    flags = [_underscored(flag) for flag in flags]
    try:
        parser.set_defaults(values)
        parsed = parser.parse_args(flags)
        # Defaults were taken as they are; read as an object, values of files are checked and converted as flags are.
        parsed = checker.parse_object({name: getattr(parsed, name) for name in field_names(config_class)})
    except argparse.ArgumentError as error:
        message = str(error).replace("Parser key ", "")
        for flag in flags:
            name = flag.removeprefix("--").split("=")[0].split(".")[0]
            if flag.startswith("--") and name not in field_names(config_class):
                message += suggestion(name, field_names(config_class))
        raise UsageError(message) from error
    return config_class(**{name: getattr(parsed, name) for name in field_names(config_class)})


def _model_among(flags: Sequence[str]) -> str | None:
    """The last model that flags name."""
    names = [following for flag, following in itertools.pairwise(flags) if flag == "--model"]
    names += [flag.removeprefix("--model=") for flag in flags if flag.startswith("--model=")]
    return names[-1] if names else None


def _underscored(flag: str) -> str:
    """--batch-size as --batch_size."""
    name, equals, value = flag.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else flag


def _run(config: TrainConfig) -> int:
    """Trains, and prints the results."""
    from tlalign.engine import NonFiniteLossError, Trainer
    from tlalign.progress import TrainingProgress
    from tlalign.runs import RunFolder

    trainer = Trainer(config)
    folder = RunFolder(config)
    parameters = sum(parameter.numel() for parameter in trainer.task.get_trainable_module().parameters())
    images = len(trainer.train_loader.dataset), len(trainer.eval_loader.dataset)
    print(
        f"{config.method} trains {config.model} ({parameters:,} parameters) on {config.data} "
        f"({images[0]} images, {images[1]} held out), device {trainer.device}; run folder {folder.path}",
        flush=True,
    )
    start = time.monotonic()
    try:
        with TrainingProgress(config.epochs, len(trainer.train_loader)) as progress:
            records = trainer.fit(folder, progress)
        seconds = time.monotonic() - start
        picture = _draw_picture(trainer, folder)
    except (NonFiniteLossError, KeyboardInterrupt) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        kept = f"last checkpoint {folder.last_checkpoint}" if folder.last_checkpoint.exists() else "no checkpoint yet"
        print(f"tlalign: {'interrupted' if interrupted else f'error: {error}'}; {kept}", file=sys.stderr)
        return 130 if interrupted else 1
    last, best = records[-1], max(records, key=lambda record: record.metric)
    print(f"{config.epochs} epochs in {timedelta(seconds=round(seconds))}, on {images[1]} held-out images:")
    print(f"  top-1 of the model         {last.top1:.2f} %")
    if last.top1_ema is not None:
        print(f"  top-1 of its average (EMA) {last.top1_ema:.2f} %")
    if last.ratio_change is not None:
        print(f"  mean |aligned - original| mixing ratio in the last epoch {last.ratio_change:.4f}")
    print(f"  checkpoint  {folder.last_checkpoint} (the best, of epoch {best.epoch}: {folder.best_checkpoint.name})")
    print(f"  log         {folder.log}")
    print(f"  picture     {picture}")
    return 0


def _draw_picture(trainer: Trainer, folder: RunFolder) -> Path | str:
    """Draws mixed held-out images and their token labels; returns where, or why not."""
    from tlalign.pictures import draw_token_labels

    model = trainer.task.get_trainable_module()
    images, classes = trainer.sample_held_out(20)
    mean, std = trainer.image_config["mean"], trainer.image_config["std"]
    try:
        draw_token_labels(model, images, classes, folder.picture, mean, std, trainer.class_names)
    except (NotImplementedError, ValueError) as error:
        return f"none: {error}"
    return folder.picture
