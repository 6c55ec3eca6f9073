"""The command line from end to end: what is written, printed and returned."""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from unittest import mock

import pytest
import timm
import torch
import yaml
from PIL import Image
from training import record

from tlalign.cli import _draw_picture, _summarise, _train, main
from tlalign.config import CONFIG_FILE, UsageError, started_processes
from tlalign.engine import NonFiniteLossError, Trainer
from tlalign.processes import Processes
from tlalign.unreadable import UnreadableImagesError

MODEL = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
TINY = [
    "--model_kwargs",
    str(MODEL),
    "--img_size=16",
    "--batch_size=128",
    "--epochs=2",
    "--warmup_epochs=0",
    "--lr=0.01",
]


def percentages(text: str) -> list[str]:
    return re.findall(r"top-1.*?([0-9.]+) %", text)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: its folder and what it printed."""
    folder, printed = tmp_path_factory.mktemp("runs") / "demo", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["train", *TINY, "--output", str(folder)]) == 0
    return folder, printed.getvalue()


@pytest.fixture
def run(finished):
    """The folder of a finished run."""
    return finished[0]


def test_a_run_writes_its_files_and_prints_where(finished):
    folder, printed = finished
    for name in ("last.pth.tar", "log.csv", "token_labels.png"):
        assert (folder / name).stat().st_size > 0
        assert str(folder / name) in printed
    for name in ("model_best.pth.tar", "curves.png", "tensorboard"):
        assert (folder / name).exists()
    assert yaml.safe_load((folder / CONFIG_FILE).read_text())["model_kwargs"] == MODEL
    assert "mean |aligned - original| mixing ratio" in printed
    assert re.search(r"epoch 2/2 .* images/s  loss [0-9.]+ .* left", printed)
    with Image.open(folder / "token_labels.png") as picture:
        assert min(picture.size) > 500


@pytest.mark.parametrize("error", [OSError("No space left on device"), TypeError("text"), RuntimeError("expected {")])
def test_a_picture_that_cannot_be_drawn_does_not_fail_a_finished_run(monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("tlalign.pictures.draw_token_labels", fail)
    monkeypatch.setattr("tlalign.data.sample_images", lambda *arguments: (None, None))
    trainer = mock.MagicMock(**{"config.fsdp": False})
    assert _draw_picture(trainer, mock.MagicMock()) == f"none: {error}"


def test_the_picture_is_of_the_run_s_classes_and_alignment(monkeypatch):
    draw, config = mock.Mock(), {"config.fsdp": False, "config.layers": (1,), "config.residual": False}
    monkeypatch.setattr("tlalign.pictures.draw_token_labels", draw)
    monkeypatch.setattr("tlalign.data.sample_images", lambda *arguments: (None, None))
    _draw_picture(mock.MagicMock(class_names=["a", "b"], **config), mock.MagicMock())
    assert draw.call_args.args[-1] == ["a", "b"]
    assert draw.call_args.kwargs == {"alignment": {"layers": (1,), "residual": False}}


@pytest.mark.parametrize(("several", "ending"), [(False, "were left out\n"), (True, "were left out by this process, ")])
def test_the_last_lines_say_whose_images_were_left_out(monkeypatch, capsys, several, ending):
    monkeypatch.setattr("tlalign.cli._draw_picture", lambda *arguments: "none")
    trainer = mock.MagicMock(**{"processes.several": several, "train_loader.unreadable": range(3)})
    record = mock.MagicMock(top1=50.0, top1_ema=None, ratio_change=None, metric=50.0)
    _summarise(trainer, mock.MagicMock(), [record], steps=1, seconds=1.0)
    assert f"  3 training images that can't be read {ending}" in capsys.readouterr().out


def test_the_best_epoch_is_that_of_the_averaged_weights(monkeypatch, capsys):
    monkeypatch.setattr("tlalign.cli._draw_picture", lambda *arguments: "none")
    values = [(1, 50.0, 70.0), (2, 60.0, 65.0)]
    records = [record(epoch, top1=top1, top1_ema=top1_ema) for epoch, top1, top1_ema in values]
    _summarise(mock.MagicMock(**{"train_loader.unreadable": ()}), mock.MagicMock(), records, steps=1, seconds=1.0)
    assert "(the best, of epoch 1: " in capsys.readouterr().out


def test_eval_repeats_the_top1_that_training_printed(finished, capsys):
    folder, printed = finished
    assert main(["eval", "--checkpoint", str(folder / "last.pth.tar")]) == 0
    trained = percentages(printed.split("held-out images:")[-1])
    assert percentages(capsys.readouterr().out) == trained
    assert len(trained) == 2


def test_timm_loads_the_checkpoint_as_its_own(run):
    checkpoint = run / "last.pth.tar"
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, in_chans=1, num_classes=10, checkpoint_path=str(checkpoint), **MODEL
    ).eval()
    state = torch.load(checkpoint, weights_only=False)["state_dict_ema"]
    images = torch.randn(2, 1, 16, 16)
    logits = model(images)
    model.load_state_dict(state, strict=True)
    assert torch.equal(model(images), logits)


def test_eval_takes_a_plain_timm_checkpoint_and_flags(tmp_path, capsys):
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, in_chans=1, num_classes=10, **MODEL)
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    options = ["--data=digits", "--model=vit_tiny_patch16_224", "--model_kwargs", str(MODEL)]
    options += ["--img_size=16", "--in_chans=1", "--workers=0"]
    assert main(["eval", "--checkpoint", str(tmp_path / "plain.pth"), *options]) == 0
    assert len(percentages(capsys.readouterr().out)) == 1


@pytest.fixture
def on_images(tmp_path):
    """Options to train for an epoch on a small image folder of three classes."""
    for split in ("train", "val"):
        for number, colour in enumerate(("red", "green", "blue")):
            folder = tmp_path / "images" / split / colour
            folder.mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (20 + number, 24), colour).save(folder / f"{index}.png")
    return [
        *["--recipe=none", f"--data=folder:{tmp_path / 'images'}", "--img_size=16", "--batch_size=4", "--workers=0"],
        *["--epochs=1", "--warmup_epochs=0", "--output", str(tmp_path / "run")],
    ]


def test_image_folders_train_and_evaluate(on_images, tmp_path, capsys):
    options = [*on_images, "--model=vit_tiny_patch16_224", "--model_kwargs", str(MODEL)]
    assert main(["train", *options]) == 0
    assert (tmp_path / "run" / "token_labels.png").exists()
    command = ["eval", "--checkpoint", str(tmp_path / "run" / "last.pth.tar")]
    assert main(command) == 0
    assert "top-1" in capsys.readouterr().out
    (tmp_path / "images" / "val" / "red" / "3.png").write_bytes(b"no image")
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "data: " in error and "red/3.png" in error


def test_classes_of_a_folder_keep_the_ids_that_a_run_gave_them(on_images, tmp_path, capsys):
    images, run = tmp_path / "images", tmp_path / "run"
    assert main(["train", *on_images, "--model=vit_tiny_patch16_224", "--model_kwargs", str(MODEL)]) == 0
    shutil.rmtree(images / "val" / "blue")  # by their names the first of three
    outputs = []
    for rest in ("train", "moved"):
        capsys.readouterr()
        assert main(["eval", "--checkpoint", str(run / "last.pth.tar")]) == 0
        outputs.append(percentages(capsys.readouterr().out))
        if rest == "train":
            (images / "train").rename(images / "moved")
    assert outputs[0] == outputs[1]
    assert main(["analyze", "--checkpoint", str(run / "last.pth.tar"), "--images=4", "--batch_size=4"]) == 0
    bare = ["--data", f"folder:{images}", "--model=vit_tiny_patch16_224", "--model_kwargs", str(MODEL), "--img_size=20"]
    assert main(["export", str(run / "last.pth.tar"), "--output", str(tmp_path / "bare.pth")]) == 0
    assert main(["eval", "--checkpoint", str(tmp_path / "bare.pth"), *bare, "--num_classes=3"]) == 2
    assert f"folder:{images} has 2 of 3 classes, and nothing says which" in capsys.readouterr().err
    (images / "moved").rename(images / "train")
    shutil.move(images / "train" / "blue", tmp_path / "blue")
    assert main(["eval", "--checkpoint", str(tmp_path / "bare.pth"), *bare, "--num_classes=3"]) == 2
    assert f"folder:{images} has 2 of 3 classes, and nothing says which" in capsys.readouterr().err
    shutil.move(tmp_path / "blue", images / "train" / "blue")
    (images / "train").rename(images / "moved")
    (images / "val" / "green").rename(images / "val" / "pink")
    assert main(["eval", "--checkpoint", str(run / "last.pth.tar")]) == 2
    assert "has classes that the checkpoint lacks: pink" in capsys.readouterr().err
    (images / "moved").rename(images / "train")
    (images / "train" / "green").rename(images / "train" / "pink")
    assert main(["train", "--resume", str(run)]) == 2
    assert "resume: the run has class green where the images that are there now have pink" in capsys.readouterr().err


def test_a_run_knows_where_its_images_are_from_anywhere(on_images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [option.replace(f"folder:{tmp_path}/", "folder:") for option in on_images]
    assert main(["train", *options, "--model=vit_tiny_patch16_224", "--model_kwargs", str(MODEL)]) == 0
    monkeypatch.chdir("/")
    assert main(["eval", "--checkpoint", str(tmp_path / "run" / "last.pth.tar")]) == 0
    (tmp_path / "images").rename(tmp_path / "moved")
    assert main(["train", "--resume", str(tmp_path / "run"), f"--data=folder:{tmp_path / 'moved'}"]) == 0
    assert main(["eval", "--checkpoint", str(tmp_path / "run" / "last.pth.tar")]) == 0


def test_a_model_that_labels_cannot_be_followed_through_trains_without_alignment(on_images, capsys):
    assert main(["train", *on_images, "--model=resnet10t", "--target=ratio"]) == 0
    assert "picture     none: model: can't follow labels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "did you mean train?"),
        (["train", "--recipie=none"], "did you mean recipe?"),
        (["train", "--recipe.name=none"], '"recipe":'),
        (["train", "--device=meta"], "device: cannot use 'meta': "),
        (["eval", "--chekpoint=last.pth"], "did you mean checkpoint?"),
        (["eval", "--checkpoint", "x" * 300], "File name too long"),
        (["eval"], "the following arguments are required: checkpoint"),
        (["eval", "--data=digits", "--model=vit_tiny_patch16_224"], "arguments are required: checkpoint"),
        (["eval", "--checkpoint=no/last.pth"], "checkpoint: expected a file, got no/last.pth, which is none"),
        (["export", "no.pth", "--output=x.pth"], "checkpoint: expected a file, got no.pth, which is none"),
        (["analyze", "--checkpoint=no.pth"], "checkpoint: expected a file, got no.pth, which is none"),
        (["train", "--data", "folder:/nowhere", "--recipe=none", "--model=vit_tiny_patch16_224"], "PATH/train/CLASS"),
        (["train", "--model", "vit_tinny_patch16_224"], "did you mean vit_tiny_patch16_224?"),
        (["train", "--model", "deit_small"], "did you mean deit_small_patch16_224?"),
        (["train", "--model", "resnet18", "--model_kwargs", "{}"], "target: tl-align can't train resnet18"),
    ],
)
def test_what_cannot_be_done_ends_with_a_message_and_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err


def test_memory_that_does_not_suffice_is_an_error(run, monkeypatch, capsys):
    fails = mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory\nMore of it"))
    monkeypatch.setattr(Trainer, "dry_run", fails)
    monkeypatch.setattr("tlalign.evaluation.evaluate", fails)
    for command in (["train", "--dry_run"], ["eval", "--checkpoint", str(run / "last.pth.tar")]):
        assert main(command) == 1
        assert capsys.readouterr().err == "tlalign: error: CUDA out of memory; a smaller batch_size takes less\n"


def test_a_checkpoint_of_another_model_or_a_damaged_one_is_refused(run, tmp_path, capsys):
    checkpoint = run / "last.pth.tar"
    # Another model has its own arguments.
    assert main(["eval", "--checkpoint", str(checkpoint), "--model=resnet10t"]) == 2
    assert "is not of this resnet10t" in capsys.readouterr().err
    assert main(["eval", "--checkpoint", str(checkpoint), "--model_kwargs.embed_dim", "32"]) == 2
    assert "is not of this vit_tiny_patch16_224" in capsys.readouterr().err
    damaged = tmp_path / "damaged.pth.tar"
    damaged.write_bytes(checkpoint.read_bytes()[:1000])
    (tmp_path / CONFIG_FILE).write_bytes((run / CONFIG_FILE).read_bytes())
    assert main(["eval", "--checkpoint", str(damaged)]) == 2
    assert f"checkpoint: {damaged} is no checkpoint with weights, or damaged" in capsys.readouterr().err


def test_only_train_is_for_several_processes(run, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["eval", "--checkpoint", str(run / "last.pth.tar")]) == 2
    assert "for only train is for several, got eval with 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "3"}, 3),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, 1),  # of a job's script, which srun has not started
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, 2),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "1"}, 1),
    ],
)
def test_processes_are_those_that_were_started_for_the_command(monkeypatch, environment, count):
    for name in ("WORLD_SIZE", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert started_processes() == count
    if count == 1:
        assert Processes.start(torch.device("cpu")) == Processes(torch.device("cpu"))


def test_processes_that_do_not_know_one_another_are_an_error(tmp_path, monkeypatch, capsys):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", f"--output={tmp_path / 'run'}", "--device=cpu"]) == 2
    assert "expected to be started by torchrun, for there are several processes: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_reader_that_has_gone_away_stops_nothing():
    code = "from tlalign.cli import _say\nfor line in ('first', 'second'): _say(line)\n"
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as nowhere:
        done = subprocess.run([sys.executable, "-c", code], stdout=nowhere, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_asks_for_nothing_that_lies_beside_a_checkpoint(capsys):
    for command in ("export", "eval"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "By default what the config.yaml beside the checkpoint says." in text
        assert "(required, type: str)" not in text.partition("--model MODEL")[2].partition("--num_classes")[0]


def test_a_run_s_folder_in_the_place_of_its_checkpoint_is_pointed_out(run, capsys):
    assert main(["eval", "--checkpoint", str(run)]) == 2
    assert f"the newest checkpoint of this run is {run / 'last.pth.tar'}" in capsys.readouterr().err
    assert main(["train", "--dry_run", "--initial_checkpoint", str(run)]) == 2
    assert f"initial_checkpoint: expected a file, got the folder {run}; the newest" in capsys.readouterr().err


def test_weights_of_other_classes_are_told_from_those_of_the_images(run, tmp_path, capsys):
    checkpoint = str(run / "last.pth.tar")
    assert main(["eval", "--checkpoint", checkpoint, "--num_classes=12"]) == 2
    assert f"num_classes: expected 10, of which {checkpoint} is, got 12" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [UnreadableImagesError("data: 3.png"), UsageError("num_classes: 2"), NonFiniteLossError("the loss is nan")]
)
def test_what_one_process_of_several_meets_it_says_by_itself(error, capsys):
    trainer = mock.Mock(processes=Processes(torch.device("cpu"), rank=1, world_size=2), steps_per_epoch=1, step=0)
    trainer.config.epochs, trainer.fit.side_effect = 1, error
    assert _train(trainer, None, resume=False) == 1
    printed = capsys.readouterr().err
    # All have the same loss, and the first says so.
    assert printed == ("" if isinstance(error, NonFiniteLossError) else f"tlalign: error: process 1: {error}\n")


def test_a_run_that_has_no_checkpoint_yet_starts_from_its_weights_when_it_continues(run, tmp_path, monkeypatch):
    initialises = []

    def make(config, **options):
        initialises.append(options["initialises"])
        raise UsageError("enough")

    (tmp_path / "new").mkdir()
    shutil.copy(run / CONFIG_FILE, tmp_path / "new")
    monkeypatch.setattr("tlalign.engine.Trainer", make)
    for folder in (tmp_path / "new", run):
        assert main(["train", "--resume", str(folder)]) == 2
    assert initialises == [True, False]


def test_images_of_a_class_that_is_none_end_a_run_without_a_traceback(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Trainer, "fit", mock.Mock(side_effect=UsageError("num_classes: expected more, got 2")))
    folder = tmp_path / "run"
    assert main(["train", *TINY, "--output", str(folder)]) == 1
    again = f"no checkpoint yet, to start again: tlalign train --resume {folder}\n"
    assert capsys.readouterr().err == f"tlalign: error: num_classes: expected more, got 2; {again}"


@pytest.mark.parametrize("error", [UnreadableImagesError("data: 3.png"), NonFiniteLossError("the loss is nan")])
def test_a_dry_run_ends_as_the_run_would(monkeypatch, capsys, error):
    trainer = mock.Mock(**{"dry_run.side_effect": error})
    monkeypatch.setattr("tlalign.engine.Trainer", lambda config: trainer)
    assert main(["train", "--dry_run"]) == 1
    assert capsys.readouterr().err == f"tlalign: error: {error}\n"


def test_a_report_takes_the_data_of_a_run_but_neither_its_batches_nor_its_seed(run, monkeypatch):
    configs = []
    monkeypatch.setattr("tlalign.analysis.report.write_report", lambda config, checkpoint: configs.append(config))
    assert main(["analyze", "--checkpoint", str(run / "last.pth.tar")]) == 0
    (config,) = configs
    assert (config.data, config.img_size, config.batch_size, config.seed) == ("digits", 16, 16, 0)
    for model, arguments in (("vit_tiny_patch16_224.augreg_in21k", MODEL), ("vit_small_patch16_224", {})):
        assert main(["analyze", "--checkpoint", str(run / "last.pth.tar"), f"--model={model}"]) == 0
        assert configs[-1].model_kwargs == arguments


def test_an_existing_run_is_left_as_it_is(run, capsys):
    before = (run / "log.csv").read_bytes()
    assert main(["train", *TINY, "--output", str(run)]) == 2
    assert "expected a new or empty folder" in capsys.readouterr().err
    assert (run / "log.csv").read_bytes() == before


@pytest.mark.parametrize("package", ["rich", "sklearn", "tensorboard"])
def test_a_package_that_is_missing_is_named_with_what_installs_it(package, tmp_path):
    code = f"import sys; sys.modules['{package}'] = None\nfrom tlalign.cli import main\nsys.exit(main())"
    flags = ["train", "--output", str(tmp_path / "run")]
    failed = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True)
    message = f"tlalign: error: {package} is not installed; pip install 'tlalign-kernels[train]'"
    assert (failed.returncode, failed.stderr.splitlines()[-1]) == (2, message)
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "run").exists()


def test_help_needs_no_torch():
    code = "import sys, tlalign.cli; tlalign.cli.main(['--help']); assert 'torch' not in sys.modules"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "train" in printed and "eval" in printed
