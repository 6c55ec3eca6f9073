"""Command line: `tlalign train` and what belongs to it, see `tlalign --help`."""

from __future__ import annotations

import argparse
import errno
import io
import os
import re
import shlex
import sys
import time
import traceback
import typing
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

try:
    import jsonargparse

    from tlalign.config import (
        ALIGNED_TARGETS,
        CONFIG_FILE,
        HUGGING_FACE,
        MAY_CHANGE,
        MAY_MOVE,
        OPTIONS_OF_MIXING,
        PATCH_MIXING,
        STREAMS,
        AnalyzeConfig,
        EvalConfig,
        ModelConfig,
        TrainConfig,
        UsageError,
        architecture,
        disk_errors_as,
        field_names,
        load_config_file,
        load_recipe,
        recipe_names,
        started_processes,
        suggestion,
        type_checker,
    )
    from tlalign.runs import EpochRecord, RunFolder, check_is_new, config_beside, newest_in
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"tlalign: error: {missing.name} is not installed; pip install 'tlalign-kernels[train]'"
    ) from missing

if TYPE_CHECKING:
    from tlalign.engine import Trainer

# Imports of torch wait in the functions: help and errors come at once, and this is read before they start threads.
# The threads of libgomp spin while they wait, by default so long that a step takes several times as long beside another
# busy process (loader workers, say); not to spin costs a third with small layers on an idle machine. Four epochs of the
# digits on two cores, idle and beside one busy process: 1000 rounds 10 and 15 s, none 13 and 12 s, 10000 10 and 22 s.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_DEFAULT_RECIPE = "digits"
# What else of the extra `train` is imported, where it is needed.
_PACKAGES = ("matplotlib", "rich", "safetensors", "scipy", "sklearn", "tensorboard")
# What a disk refuses wherever a path leads to it, even where a command only asks whether there is a file; other errors
# of the system are faults of the program, and end in a traceback.
_REFUSALS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_CONFIG_BESIDE = f"Where a {CONFIG_FILE} lies beside it, that says what it is of; flags replace its values."
_USAGE = """usage: tlalign COMMAND [options]

Trains vision transformers on mixed images with token-label alignment.

commands:
  train    train a model; without options a small one on handwritten digits, in one to three minutes
  compare  train several methods with several seeds, and set the results side by side
  eval     evaluate a checkpoint
  runs     list runs, and compare them
  export   write the weights of a run for timm
  analyze  show what alignment does to the labels of a checkpoint's tokens

`tlalign COMMAND --help` lists the options.
"""

Config = TypeVar("Config", bound=ModelConfig)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: Words after `tlalign`; by default those of this process.

    Returns:
        Exit code: 0; 1 if training failed or memory did not suffice; 2 if what was asked for can't be done; 130 after
        Ctrl-C, 143 after SIGTERM.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character that the terminal lacks, such as the ± of a table, is no reason to stop.
        sys.stdout.reconfigure(errors="replace")
    # Nor is one that the font of the pictures lacks.
    warnings.filterwarnings("ignore", "Glyph .* missing from font")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if arguments else 2
    commands = {
        "train": train,
        "compare": compare,
        "eval": evaluate,
        "runs": list_runs,
        "export": export,
        "analyze": analyze,
    }
    name, *options = arguments
    try:
        if name not in commands:
            raise UsageError(f"expected one of {', '.join(commands)}, got {name}{suggestion(name, commands)}")
        if name != "train" and started_processes() != 1:
            raise UsageError(
                f"expected one process, for only train is for several, got {name} with {started_processes()}"
            )
        return commands[name](_spelled_out(options))
    except (UsageError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _REFUSALS:
            raise
        print(f"tlalign: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in _PACKAGES:
            raise
        print(f"tlalign: error: {package} is not installed; pip install 'tlalign-kernels[train]'", file=sys.stderr)
        return 2
    except RuntimeError as error:
        import torch

        if not isinstance(error, torch.OutOfMemoryError):
            raise
        print(f"tlalign: error: {str(error).splitlines()[0]}; a smaller batch_size takes less", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tlalign: interrupted", file=sys.stderr)
        return 130


def train(options: Sequence[str]) -> int:
    """`tlalign train`: trains a model and says where everything was written."""
    given, flags = _parse_sources(options, "recipe", "config", "resume", "dry_run")
    continued = given.resume not in (None, "auto")
    if continued and given.recipe is not None:
        raise UsageError(f"resume: expected no recipe, for {given.resume} has its configuration, got {given.recipe}")
    values = _saved(Path(given.resume)) if continued else load_recipe(given.recipe or _DEFAULT_RECIPE)
    values = _with_config_file(values, given.config, flags)
    if continued:
        values["output"] = given.resume
    parser = _parser(
        "train", "Trains a model. A recipe is the start; values of --config replace its, and flags replace both."
    )
    _add_sources(parser)
    parser.add_argument(
        "--resume",
        type=str,
        help="Run folder to continue, with the configuration in it; or auto: the run in --output if there is one, else "
        "a new one, so that the same command starts and restarts.",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="Build everything, run two steps and say what the run would take; nothing is written.",
    )
    parser.add_class_arguments(TrainConfig, None)
    config = _parse_training(parser, values, flags)
    _check_used(flags, config, [config])
    if not continued:
        _check_recipe(given.recipe, config)
    elif config.output is None or Path(config.output).resolve() != Path(given.resume).resolve():
        raise UsageError(
            f"output: expected none, for the run continues in its folder {given.resume}, got {config.output}"
        )
    if given.dry_run:
        return _try(config)
    return _run(config, resume=given.resume is not None and _is_to_resume(config))


def compare(options: Sequence[str]) -> int:
    """`tlalign compare`: trains methods with several seeds, and prints and writes a table of what they gave."""
    from tlalign.compare import METHODS, plan_runs

    given, flags = _parse_sources(options, "recipe", "config")
    values = _with_config_file(load_recipe(given.recipe or _DEFAULT_RECIPE), given.config, flags)
    parser = _parser(
        "compare",
        "Trains each method with each seed, all else being the same, in folders of their own in --output, "
        "and writes a table and a plot of what they gave. The same command goes on after a stop, and trains nothing "
        "twice.",
    )
    _add_sources(parser)
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(METHODS),
        help="Methods, MIXING or MIXING+TARGET as train calls them, in place of those of a recipe or file; where one "
        "aligns otherwise, with that, as in cutmix+tl-align+layers=1,3 or cutmix+tl-align+residual=false.",
    )
    parser.add_argument("--seeds", type=int, default=5, help="Number of seeds, from --seed on.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at a time, which share the cores and the device.")
    parser.add_class_arguments(TrainConfig, None)
    decided = ("mixing", "target")
    for action in parser._actions:
        if action.dest in decided:
            action.help = argparse.SUPPRESS
        elif action.dest == "output":
            action.help = "Folder of the comparison, where runs that are there go on."
    config = _parse_training(parser, values, flags)
    _check_recipe(given.recipe, config)
    given = _parse_flags(parser, flags)
    for name in decided:
        if _is_among(name, flags):
            raise UsageError(f"{name}: expected none, for --methods says which, got --{name}")
    if config.output is None:
        raise UsageError("output: expected the folder of the comparison (--output runs/NAME), got null")
    if given.jobs < 1:
        raise UsageError(f"jobs: expected at least 1, got {given.jobs}")
    output = Path(config.output)
    configs = plan_runs(config, given.methods, given.seeds, output)
    _check_used(flags, config, configs)
    for each in configs:
        # Before anything is trained: whether a folder holds a run of another configuration.
        _is_to_resume(each)
    return _compare(configs, output, given.jobs)


def evaluate(options: Sequence[str]) -> int:
    """`tlalign eval`: prints the accuracy of a checkpoint's weights."""
    parser = _parser("eval", f"Evaluates a checkpoint of timm or tlalign. {_CONFIG_BESIDE}")
    parser.add_argument("--checkpoint", required=True, help="Checkpoint to evaluate.")
    given, config = _parse_over_checkpoint(parser, options, EvalConfig)
    from tlalign.evaluation import evaluate_checkpoint

    for name, result in evaluate_checkpoint(Path(given.checkpoint), config).items():
        _say(f"{name}: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, loss {result['loss']:.4f}")
    return 0


def list_runs(options: Sequence[str]) -> int:
    """`tlalign runs`: prints a table of runs, and draws their curves."""
    parser = _parser(
        "runs",
        "Lists runs: what they are, how far they are and how they went, and the values in which they "
        "differ. Top-1 is that of the averaged weights (EMA) where there are any.",
    )
    parser.add_argument("paths", nargs="*", default=["runs"], help="Folders of runs, or folders that hold such.")
    parser.add_argument("--sort", default="name", help="Column to sort by, as --csv calls it.")
    parser.add_argument("--plot", help="PNG file to draw top-1 and loss of the runs to, over each other.")
    parser.add_argument("--csv", help="CSV file to write the table to.")
    given = _parse_flags(parser, options)
    from tlalign.listing import RunTable, find_runs
    from tlalign.progress import OutputConsole

    runs = find_runs([Path(path) for path in given.paths])
    table = RunTable(runs, given.sort)
    if given.csv is not None:
        table.save(Path(given.csv))
    if given.plot is not None:
        table.plot(Path(given.plot))
    console = OutputConsole()
    if not runs:
        _say(f"no runs in {', '.join(given.paths)}")
    elif console.is_terminal:
        table.print(console)
    else:
        # A file or a pipe has no width to keep to.
        table.print(OutputConsole(width=1000))
    return 0


def export(options: Sequence[str]) -> int:
    """`tlalign export`: writes the weights of a checkpoint as timm and others load them."""
    parser = _parser(
        "export",
        "Writes the weights of a checkpoint as a plain checkpoint of timm, loads it again and compares "
        f"the logits. {_CONFIG_BESIDE}",
    )
    parser.add_argument("checkpoint", help="Checkpoint to export.")
    parser.add_argument("--output", help="File to write: NAME.safetensors, or NAME.pth for a bare state dict.")
    parser.add_argument(
        "--ema",
        type=bool | None,
        help="Export the averaged weights (true) or the model's (false); null: averaged ones if there are any.",
    )
    given, config = _parse_over_checkpoint(parser, options, ModelConfig)
    if given.output is None:
        raise UsageError("output: expected a file, got nothing (--output NAME.safetensors)")
    from tlalign.export import export_checkpoint

    output = Path(given.output)
    name, call = export_checkpoint(Path(given.checkpoint), output, config, given.ema)
    _say(f"wrote the weights of the {name} to {output}; the same logits come from")
    _say(f"  {call}")
    return 0


def analyze(options: Sequence[str]) -> int:
    """`tlalign analyze`: writes pictures, tables and a page about what alignment does in a model."""
    parser = _parser(
        "analyze",
        "Shows what alignment does to the labels of a model's tokens: pictures, tables and a page of HTML. "
        f"{_CONFIG_BESIDE}",
    )
    parser.add_argument("--checkpoint", help="Checkpoint of timm or tlalign; without one, weights are random.")
    given, config = _parse_over_checkpoint(parser, options, AnalyzeConfig)
    from tlalign.analysis.report import write_report
    from tlalign.unreadable import UnreadableImagesError

    try:
        page = write_report(config, None if given.checkpoint is None else Path(given.checkpoint))
    except UnreadableImagesError as error:
        raise UsageError(f"data: {error}") from error
    _say(f"page      {page}\npictures and tables beside it")
    return 0


def _parser(command: str, description: str) -> jsonargparse.ArgumentParser:
    return jsonargparse.ArgumentParser(
        prog=f"tlalign {command}", description=description, exit_on_error=False, allow_abbrev=False
    )


def _add_sources(parser: jsonargparse.ArgumentParser) -> None:
    """Adds the options that say where the values of a configuration come from."""
    recipes = f"{', '.join(recipe_names())}, or none for plain defaults."
    parser.add_argument("--recipe", type=str, default=_DEFAULT_RECIPE, help=f"Name of a recipe: {recipes}")
    parser.add_argument("--config", type=str, help="YAML file with values for any of the options below.")


def _parse_sources(options: Sequence[str], *names: str) -> tuple[argparse.Namespace, list[str]]:
    """Reads what decides where the values of a configuration come from; the other flags are left."""
    sources = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in names:
        sources.add_argument(f"--{name}", type=_truth if name == "dry_run" else str)
    try:
        return sources.parse_known_args(options)
    except argparse.ArgumentError as error:
        name = error.argument_name.removeprefix("--")
        raise UsageError(f"{name}: {error.message}") from error


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text}")
    return text == "true"


def _with_config_file(values: dict[str, Any], path: str | None, flags: Sequence[str]) -> dict[str, Any]:
    """Values of a file over those of a recipe, whose model_kwargs go with its model only."""
    of_file = {} if path is None else load_config_file(path)
    model = _text_of("model", flags) or of_file.get("model")
    if model is not None and architecture(str(model)) != architecture(values.get("model", "")):
        values = {name: value for name, value in values.items() if name != "model_kwargs"}
    return values | of_file


def _parse_training(parser: jsonargparse.ArgumentParser, values: dict[str, Any], flags: Sequence[str]) -> TrainConfig:
    """Reads flags over the values of a recipe, a file or a run."""
    if "data" not in values and not _is_among("data", flags):
        raise UsageError("data: expected a data set, which the recipe leaves to you: --data folder:PATH, or see --help")
    return _parse(parser, TrainConfig, values, flags)


def _check_recipe(recipe: str | None, config: TrainConfig) -> None:
    """Raises UsageError if no recipe was named, and the default is one for other images."""
    if recipe is None and config.data != load_recipe(_DEFAULT_RECIPE)["data"]:
        fitting = [name for name in recipe_names() if load_recipe(name).get("data") == config.data]
        raise UsageError(
            f"recipe: the default, {_DEFAULT_RECIPE}, is not made for {config.data}; give --recipe "
            f"{' or '.join([*fitting, 'none'])}"
        )


def _check_used(flags: Sequence[str], config: TrainConfig, runs: Sequence[TrainConfig]) -> None:
    """Raises UsageError if flags give what none of the runs makes use of, so that something else is trained than meant.

    `config` is what the flags say, of which a run may have less.
    """
    for name, by in _unused(runs[0]).items():
        given = getattr(config, name)
        is_unused = all(name in _unused(run) for run in runs[1:])
        if is_unused and _is_among(name, flags) and given != getattr(TrainConfig, name):
            by = by if len(runs) == 1 else "each of the methods"
            raise UsageError(f"{name}: expected none, for {by} makes no use of it, got {given}")


def _unused(config: TrainConfig) -> dict[str, str]:
    """Options that are of no account for a run, and what makes no use of them."""
    trained = f"mixing {config.mixing} and target {config.target}"
    mixing = f"mixing {config.mixing}"
    unused = {name: mixing for name, users in OPTIONS_OF_MIXING.items() if config.mixing not in users}
    if not config.labels_tokens and config.mixing not in PATCH_MIXING:
        unused["mix_patch_size"] = trained
    if not config.needs_teacher:
        unused |= dict.fromkeys(("teacher_checkpoint", "teacher_model"), trained)
    if config.mixing == "none" or config.target not in ALIGNED_TARGETS:
        unused |= dict.fromkeys(("layers", "residual", "stochastic_depth"), trained)
    if config.data in ("digits", "mnist-5k") or config.folder is not None:
        unused |= dict.fromkeys(("data_dir", "download", "train_split", "eval_split"), f"data {config.data}")
    if config.data.startswith("wds/"):
        unused["download"] = f"data {config.data}"
    if config.auto_augment is not None and "3a" not in config.auto_augment:
        unused["color_jitter"] = f"auto_augment {config.auto_augment}"
    if config.warmup_epochs == 0:
        unused["warmup_lr"] = "a run without warmup_epochs"
    return unused


def _parse_over_checkpoint(
    parser: jsonargparse.ArgumentParser, flags: Sequence[str], config_class: type[Config]
) -> tuple[jsonargparse.Namespace, Config]:
    """Reads flags over the configuration beside the `checkpoint` that they name."""
    parser.add_class_arguments(config_class, None)
    names = set(field_names(config_class))
    required = names & {"data", "model"}
    if "-h" in flags or "--help" in flags:
        for action in parser._actions:
            if action.dest in required:
                action.required = False
                action.help = f"{action.help} By default what the {CONFIG_FILE} beside the checkpoint says."
    else:
        # At first only to learn which checkpoint: what its configuration may give is not missing yet.
        parser.set_defaults(dict.fromkeys(required, ""))
    given = _parse_flags(parser, flags)
    parser.set_defaults(dict.fromkeys(required))
    of_run = {}
    if given.checkpoint is not None:
        if not Path(given.checkpoint).is_file():
            # Before what its configuration would have said is found missing.
            raise UsageError(
                f"checkpoint: expected a file, got {given.checkpoint}, which is none{newest_in(Path(given.checkpoint))}"
            )
        beside = config_beside(Path(given.checkpoint))
        of_run = load_config_file(beside) if beside.is_file() else {}
        model = _text_of("model", flags)
        if model and architecture(model) != architecture(str(of_run.get("model"))):
            of_run.pop("model_kwargs", None)
    if config_class is AnalyzeConfig:
        # The tokens of all layers are kept of a batch; and the seed is another's.
        names = {*field_names(EvalConfig), "layers", "residual"} - {"batch_size"}
    config = _parse(parser, config_class, {name: of_run[name] for name in of_run if name in names}, flags)
    return given, config


def _parse(
    parser: jsonargparse.ArgumentParser, config_class: type[Config], values: dict[str, Any], flags: Sequence[str]
) -> Config:
    """Reads flags over values; both are checked against the types of the configuration's fields."""
    names = field_names(config_class)
    try:
        parser.set_defaults(values)
        for action in parser._actions:  # else --help says that what a recipe gives is required
            action.required = action.required and action.dest not in values
        parsed = _parse_flags(parser, flags)
        # Defaults were taken as they are; read as an object, values of files are checked and converted as flags are.
        parsed = type_checker(config_class).parse_object({name: getattr(parsed, name) for name in names})
    except (argparse.ArgumentError, TypeError) as error:  # the latter where a mapping is a default
        raise UsageError(_in_words(error)) from error
    values = {name: getattr(parsed, name) for name in names}
    for name, of_type in typing.get_type_hints(config_class).items():
        # What a file leaves empty jsonargparse takes for any type.
        if values[name] is None and type(None) not in typing.get_args(of_type):
            raise UsageError(f"{name}: expected a value, got null")
        # YAML takes ~ for null, and #name for a comment; behind a flag they are text.
        if values[name] is None and str in typing.get_args(of_type) and _text_of(name, flags) not in ("", "null"):
            values[name] = _text_of(name, flags)
    return config_class(**values)


def _parse_flags(parser: jsonargparse.ArgumentParser, flags: Sequence[str]) -> jsonargparse.Namespace:
    """Reads flags; where one is unknown, the error says which of the parser's own is near."""
    known = list(parser.get_defaults().keys())
    try:
        return parser.parse_args(flags)
    except argparse.ArgumentError as error:
        message = _in_words(error)
        for flag in flags:
            name = flag.removeprefix("--").split("=")[0].split(".")[0]
            if flag.startswith("--") and name not in known:
                message += suggestion(name, known)
        raise UsageError(message) from error


def _in_words(error: Exception) -> str:
    """What a parser found wrong; a value of a wrong type without the parser's words for types."""
    message = str(error).replace("Parser key ", "")
    found = re.fullmatch(r'"(\w+)":\n.*(?:Got|Given) value: (.*)', message, re.DOTALL)
    types = _types_of_options()
    if found is None or found[1] not in types:
        return message
    name, value = found.groups()
    choices = [choice for choice in typing.get_args(types[name]) if isinstance(choice, str)]
    return f"{name}: expected {_type_in_words(types[name])}, got {value}{suggestion(value, choices)}"


def _type_in_words(of_type: Any) -> str:
    """A type of a configuration's field as it is written in YAML and behind flags."""
    arguments = typing.get_args(of_type)
    if typing.get_origin(of_type) is typing.Literal:
        return f"one of {', '.join(arguments)}"
    if typing.get_origin(of_type) is tuple:
        parts = ("..." if part is ... else _type_in_words(part) for part in arguments)
        return f"a list [{', '.join(parts)}]"
    if typing.get_origin(of_type) is dict:
        return "a mapping {name: value}"
    if arguments:
        return " or ".join(map(_type_in_words, arguments))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}[of_type]


def _is_among(name: str, flags: Sequence[str]) -> bool:
    """Whether flags give an option, or ask for help."""
    return any(flag in (f"--{name}", "-h", "--help") or flag.startswith(f"--{name}=") for flag in flags)


def _text_of(name: str, flags: Sequence[str]) -> str:
    """What flags give an option, the last time; nothing if they don't."""
    texts = [flag.removeprefix(f"--{name}=") for flag in flags if flag.startswith(f"--{name}=")]
    return texts[-1] if texts else ""


def _spelled_out(flags: Sequence[str]) -> list[str]:
    """Flags as parsers read them: --batch-size as --batch_size, --compile as --compile=true, --layers 1,3 as a list."""
    types = _types_of_options()
    words: list[str] = []
    flags = [_underscored(flag) for flag in flags]
    while flags:
        flag, equals, value = flags.pop(0).partition("=")
        of_type = types.get(flag.removeprefix("--")) if flag.startswith("--") else None
        if of_type is not None and not equals:
            if flags and (not flags[0].startswith("-") or re.match(r"-[\d.]", flags[0])):
                equals, value = "=", flags.pop(0)
            elif bool in (of_type, *typing.get_args(of_type)):
                equals, value = "=", "true"
        if value.startswith("~/"):  # as a shell does, but not after an equals sign
            value = str(Path(value).expanduser())
        is_list = any(typing.get_origin(each) is tuple for each in (of_type, *typing.get_args(of_type)))
        if is_list and re.fullmatch(r"[-+.,\de ]+", value):
            value = f"[{value}]"
        words.append(flag + equals + value)
    return words


def _underscored(flag: str) -> str:
    name, equals, value = flag.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else flag


def _types_of_options() -> dict[str, Any]:
    """Types of what configurations hold, and of what is no text beside them."""
    others = {"ema": bool | None, "seeds": int, "jobs": int, "dry_run": bool}
    return typing.get_type_hints(AnalyzeConfig) | typing.get_type_hints(TrainConfig) | others


def _saved(folder: Path) -> dict[str, Any]:
    """The configuration of a run."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise UsageError(f"resume: expected the folder of a run, but {folder} has no {CONFIG_FILE}")
    values = load_config_file(file)
    if not {"data", "model"} <= values.keys():
        raise UsageError(f"resume: expected data and model in {file}, got {', '.join(values) or 'none'}")
    return values


def _is_to_resume(config: TrainConfig) -> bool:
    """Whether the folder that a configuration names holds its run; one of another configuration is an error."""
    if config.output is None:
        raise UsageError("output: expected the folder of the run with --resume auto, got null")
    if not (Path(config.output) / CONFIG_FILE).is_file():
        return False
    from tlalign.checkpoints import Checkpoints

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig, None)
    saved = _parse(parser, TrainConfig, _saved(Path(config.output)), ())
    for name in field_names(TrainConfig):
        before, now = getattr(saved, name), getattr(config, name)
        if before != now and name not in MAY_CHANGE and not _has_moved(name, str(before), str(now)):
            advice = "with other options its weights can start another run (--initial_checkpoint)"
            if not Checkpoints(Path(config.output)).traces():
                advice = "it has no checkpoint: remove the folder, or give another one (--output)"
            raise UsageError(f"resume: {name} of the run in {config.output} is {before}, got {now}; {advice}")
    if saved.workers != config.workers and config.data.partition("/")[0] in STREAMS:
        raise UsageError(
            f"resume: expected the {saved.workers} workers of the run in {config.output}, for they decide the order of "
            f"the stream {config.data}, got {config.workers}"
        )
    return True


def _has_moved(name: str, before: str, now: str) -> bool:
    """Whether what an option names may be the same in another place: a folder of images, a set or a checkpoint."""
    if name == "data" and before.startswith("folder:"):
        return now.startswith("folder:")
    family = before.partition("/")[0]
    if name == "data" and (family not in HUGGING_FACE or now.partition("/")[0] != family):
        return False
    return name in MAY_MOVE and Path(before).name == Path(now).name


def _compare(configs: Sequence[TrainConfig], output: Path, jobs: int) -> int:
    """Trains the runs of a comparison, and prints and writes what they gave."""
    from tlalign.compare import PLOT_FILE, TABLE_FILE, Comparison
    from tlalign.progress import ComparisonProgress

    with disk_errors_as(f"output: cannot make the folder {output}"):
        output.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(configs, output)
    with ComparisonProgress() as progress:
        interrupted_by = comparison.train(jobs, progress)
    comparison.save_table()
    plot = f", plot {output / PLOT_FILE}" if comparison.save_plot() else ""
    _say(comparison.table())
    _say(f"table {output / TABLE_FILE}{plot}, runs: tlalign runs {shlex.quote(str(output))}")
    if interrupted_by is not None:
        print("tlalign: interrupted; the same command goes on", file=sys.stderr)
        return 128 + interrupted_by
    return 1 if comparison.errors else 0


def _try(config: TrainConfig) -> int:
    """Runs two steps, and prints what the run would take."""
    from tlalign.engine import NonFiniteLossError, Trainer
    from tlalign.unreadable import UnreadableImagesError

    trainer = Trainer(config)
    try:
        result = trainer.dry_run()
    except (NonFiniteLossError, UnreadableImagesError) as error:
        print(f"tlalign: error: {error}", file=sys.stderr)
        return 1
    if trainer.processes.first:
        _describe(trainer)
        parts = ", ".join(f"{part} {1000 * seconds:.1f} ms" for part, seconds in result.step_seconds.items())
        _say(f"  rate        {result.images_per_second:.1f} images/s ({parts} a step of {config.batch_size} images)")
        _say(f"  memory      {result.memory / 2**30:.2f} GiB at most, of this process")
        whole = timedelta(seconds=round(result.total_seconds))
        _say(f"  whole run   {whole} for {config.epochs} epochs, {result.steps} steps, at this rate")
    trainer.processes.leave()
    return 0


def _say(line: str) -> None:
    """Prints a line; that its reader has gone away (`| head`) is no reason to stop."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _describe(trainer: Trainer) -> None:
    config = trainer.config
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    images = trainer.images
    processes = f"{trainer.processes.world_size} processes, " if trainer.processes.several else ""
    _say(
        f"{config.method} trains {config.model} ({parameters:,} parameters) on {config.data} "
        f"({images[0]} images, {images[1]} held out, {trainer.num_classes} classes), {processes}device "
        f"{trainer.device}"
    )


def _run(config: TrainConfig, resume: bool) -> int:
    """Makes or opens the folder of a run, and trains."""
    from tlalign.checkpoints import Checkpoints
    from tlalign.engine import Trainer

    if not resume and config.output is not None:
        check_is_new(Path(config.output))  # before the data are read, which may take minutes
    # Weights to start from that a checkpoint replaces need not be there any more.
    has_trained = resume and bool(Checkpoints(Path(config.output)).traces())
    trainer = Trainer(config, initialises=not has_trained)
    if not trainer.processes.first:
        return _train(trainer, None, resume)
    folder = RunFolder(config, resume)
    with folder.locked():
        if resume:
            folder.update_places(config)
        return _train(trainer, folder, resume)


def _train(trainer: Trainer, folder: RunFolder | None, resume: bool) -> int:
    """Trains, and prints the results; in the first process, which has the folder."""
    from rich.console import Console

    from tlalign.checkpoints import CheckpointError
    from tlalign.engine import NonFiniteLossError, TrainingInterrupted
    from tlalign.progress import TrainingProgress
    from tlalign.unreadable import UnreadableImagesError

    config, first = trainer.config, trainer.processes.first
    if resume:
        _resume(trainer, Path(config.output))
    if first:
        _describe(trainer)
        _say(f"  run folder  {folder.path}" + (f", continued after step {trainer.step}" if resume else ""))
    start, first_step = time.monotonic(), trainer.step
    try:
        console = None if first else Console(quiet=True)
        with TrainingProgress(config.epochs, trainer.steps_per_epoch, console, trainer.step) as progress:
            records = trainer.fit(folder, progress)
    except TrainingInterrupted as error:
        if first:
            print(f"tlalign: {error}; {_kept(folder, trainer.processes.world_size)}", file=sys.stderr)
        return 128 + error.number
    except Exception as error:
        reason = str(error)
        foreseen = isinstance(error, NonFiniteLossError | CheckpointError | UnreadableImagesError | UsageError)
        if not foreseen and not (isinstance(error, OSError) and error.errno in _REFUSALS):
            # Full memory, a loader or another process that was killed, a fault of ours: no word of it is to be lost.
            traceback.print_exc()
            reason = f"{type(error).__name__}: {reason.partition(chr(10))[0]}"
        if first:
            print(f"tlalign: error: {reason}; {_kept(folder, trainer.processes.world_size)}", file=sys.stderr)
        elif not isinstance(error, NonFiniteLossError):  # which all processes see
            print(f"tlalign: error: process {trainer.processes.rank}: {reason}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - start
    if first:
        _summarise(trainer, folder, records, trainer.step - first_step, seconds)
    trainer.processes.leave()
    return 0


def _kept(folder: RunFolder, processes: int) -> str:
    """What is left of a run that ended early, and how it goes on."""
    command = shlex.join(["tlalign", "train", "--resume", str(folder.path)])
    # Each process draws its own mixing: another number of them would train another run.
    again, launcher = ("", "") if processes == 1 else (f" as {processes} processes again", "torchrun ... -m ")
    if not folder.last_checkpoint.exists():
        return f"no checkpoint yet, to start again: {launcher}{command}"
    return f"last checkpoint {folder.last_checkpoint}, to continue{again}: {launcher}{command}"


def _resume(trainer: Trainer, folder: Path) -> None:
    """Continues from the newest good checkpoint of a folder, if there is any."""
    from tlalign.checkpoints import CheckpointError, Checkpoints, load_checkpoint

    def report(message: str) -> None:
        print(f"tlalign: {message}", file=sys.stderr)

    checkpoints, first = Checkpoints(folder), trainer.processes.first
    # All processes take the checkpoint that the first found good.
    found = checkpoints.load_newest(report) if first else None
    # Without one, a run that was stopped before its first starts again; one that has more would be written over.
    if first and found is None and (traces := checkpoints.traces()):
        raise UsageError(
            f"resume: expected a whole checkpoint in {checkpoints.path}, got none, though {traces[0]} says that it "
            "has trained; nothing was changed. Weights that are left can start another run (--initial_checkpoint)"
        )
    path = trainer.processes.share(None if found is None else found[0])
    if path is None:
        return
    state = load_checkpoint(path) if found is None else found[1]
    trainer.resume(state)
    now = trainer.processes.world_size
    if first and trainer.step < trainer.total_steps and state.get("processes", now) != now:
        report(
            f"the run had {state['processes']} processes and has {now} now, of which each draws its own mixing: it "
            "does not become what it would have been"
        )
    if found is not None:
        try:
            checkpoints.give_names(found[0], trainer.is_best)
        except CheckpointError as error:
            raise UsageError(f"resume: {error}") from error


def _summarise(trainer: Trainer, folder: RunFolder, records: Sequence[EpochRecord], steps: int, seconds: float) -> None:
    from tlalign.readers import ImageStream

    config, data = trainer.config, trainer.eval_loader.dataset
    # Of a stream the number is what was claimed.
    held_out = "the" if isinstance(data, ImageStream) else len(data)
    last, best = records[-1], max(records, key=lambda record: record.metric)
    # Of a run that continued the time is that of its last steps.
    epochs = "epoch" if config.epochs == 1 else "epochs"
    part = "" if steps == trainer.total_steps else f", the last {steps} of {trainer.total_steps} steps"
    _say(f"{config.epochs} {epochs}{part} in {timedelta(seconds=round(seconds))}, on {held_out} held-out images:")
    _say(f"  top-1 of the model         {last.top1:.2f} %")
    if last.top1_ema is not None:
        _say(f"  top-1 of its average (EMA) {last.top1_ema:.2f} %")
    if last.ratio_change is not None:
        _say(f"  mean |aligned - original| mixing ratio in the last epoch {last.ratio_change:.4f}")
    if unreadable := len(trainer.train_loader.unreadable):
        whose = " by this process, of those that it was to read" if trainer.processes.several else ""
        _say(f"  {unreadable} training images that can't be read were left out{whose}")
    _say(f"  checkpoint  {folder.last_checkpoint} (the best, of epoch {best.epoch}: {folder.best_checkpoint.name})")
    _say(f"  log         {folder.log}, curves in {folder.curves.name}, more by tensorboard --logdir {folder.path}")
    _say(f"  picture     {_draw_picture(trainer, folder)}")


def _draw_picture(trainer: Trainer, folder: RunFolder) -> Path | str:
    """Draws mixed held-out images and their token labels; returns where, or why not."""
    from tlalign.data import sample_images
    from tlalign.pictures import draw_token_labels

    config, image_config = trainer.config, trainer.image_config
    if config.fsdp:
        return "none: with fsdp the weights are in parts"
    mean, std = image_config["mean"], image_config["std"]
    alignment = {"layers": config.layers, "residual": config.residual}
    try:
        images, classes = sample_images(trainer.eval_loader.dataset, 20, config, image_config, trainer.device)
        draw_token_labels(
            trainer.model, images, classes, folder.picture, mean, std, trainer.class_names, alignment=alignment
        )
    except Exception as error:  # whatever it is, the run is finished
        return f"none: {error}"
    return folder.picture
