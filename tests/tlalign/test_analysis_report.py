"""`tlalign analyze` from end to end: what is written, what the page is made of, and what is refused."""

import base64
import csv
import errno
import itertools
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import timm
import torch
from PIL import Image

from tlalign.analysis import attention_rollout, report
from tlalign.analysis.figures import draw_rmse_by_model
from tlalign.analysis.page import Picture, Section, Table, write_page
from tlalign.analysis.presence import PresenceOfLayer, token_presence
from tlalign.analysis.ratios import RatioFollower, collect_ratios, token_paths
from tlalign.analysis.report import _epoch_of, _map_layers
from tlalign.analysis.rollout import Rollout
from tlalign.analysis.subject import RANDOM, create_subject, create_subject_of_table_1
from tlalign.cli import main
from tlalign.config import AnalyzeConfig, EvalConfig, UsageError
from tlalign.data import load_data_sets, load_images
from tlalign.pictures import draw_token_labels

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
IMAGES = ["--data=digits", "--img_size=16", "--in_chans=1", "--workers=0", "--device=cpu"]
TRAINING = ["--epochs=2", "--warmup_epochs=0", "--batch_size=256", "--lr=0.01"]
VIT = ["--model=vit_tiny_patch16_224", "--model_kwargs", str(MODEL)]
SWIN = [
    "--model=swin_tiny_patch4_window7_224",
    "--model_kwargs={patch_size: 2, embed_dim: 16, depths: [2, 2], num_heads: [2, 2], window_size: 3}",
]
FLEXIBLE = {"embed_dim": 48, "depth": 1, "num_heads": 3}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Elements(HTMLParser):
    """All elements of a page, with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def assert_is_complete_in_itself(page):
    """No element and no style of the page names another file or host."""
    text = page.read_text()
    elements = Elements(text).found
    for tag, attributes in elements:
        assert tag != "script"
        for name in ("src", "href", "srcset", "action", "data"):
            if name in attributes:
                assert attributes[name].startswith(("data:", "#")), (tag, attributes)
    assert "@import" not in text and "url(" not in text
    return elements


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two epochs and its analysis."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    assert main(["train", *VIT, *IMAGES, *TRAINING, "--output", str(folder)]) == 0
    assert main(["analyze", "--checkpoint", str(folder / "last.pth.tar"), "--images=22", "--batch_size=8"]) == 0
    return folder


def test_all_analyses_of_a_run_are_written_beside_its_checkpoint(run):
    folder = run / "analysis"
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert pictures == [
        "label_maps.png", "presence.png", "ratio_by_layer.png", "ratio_error.png", "ratio_error_patches.png",
        "ratio_tokens.png", "rmse_by_model.png", "rmse_training.png", "rollout.png",
    ]  # fmt: skip
    for name in pictures:
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 200
    ratios = rows(folder / "mixing_ratio.csv")
    assert [row["block"] for row in ratios] == ["1", "2"]
    assert len({row["cutmix"] for row in ratios}) == len({row["transmix"] for row in ratios}) == 1
    assert all(float(value) >= 0 for row in ratios for value in row.values())
    assert len(rows(folder / "token_ratios.csv")) == 3 * 2
    assert [row["block"] for row in rows(folder / "presence.csv")] == ["1", "2", "3 x 3 convolution"]
    shares = [(row["block"], float(row["share"])) for row in rows(folder / "label_maps.csv")]
    assert [block for block, _ in shares] == [block for block in "012" for _ in range(4 * 16)]
    assert {share for block, share in shares if block == "0"} != {share for block, share in shares if block == "2"}
    assert all(0 <= share <= 1 for _, share in shares)
    seen = rows(folder / "rollout.csv")
    assert len(seen) == 4 * 16
    # A residual connection leaves the class token a quarter of itself, the patches get no more than the rest.
    assert 0 < sum(float(row["weight"]) for row in seen) / 4 <= 0.75


def test_rmse_is_told_of_the_weights_it_is_of_and_over_training(run):
    by_model = {row["weights"]: float(row["rmse"]) for row in rows(run / "analysis" / "rmse.csv")}
    assert set(by_model) == {"last.pth.tar", RANDOM}
    training = rows(run / "analysis" / "training.csv")
    logged = [row["value"] for row in training if row["what"].startswith("log")]
    assert logged == [row["ratio_rmse"] for row in rows(run / "log.csv")]
    checkpoints = {float(row["epoch"]): float(row["value"]) for row in training if row["what"].endswith("rmse")}
    assert checkpoints[0.0] == by_model[RANDOM]
    assert checkpoints[2.0] == by_model["last.pth.tar"]


def test_a_run_is_analysed_as_it_aligned(tmp_path):
    folder = tmp_path / "run"
    assert main(["train", *VIT, *IMAGES, *TRAINING, "--epochs=1", "--layers=[]", "--output", str(folder)]) == 0
    checkpoint, *_ = (folder / "checkpoints").glob("epoch-*")
    for options, moves in ((["--residual=false"], False), (["--layers=[0]"], True), (["--layers=null"], True)):
        assert main(["analyze", "--checkpoint", str(checkpoint), "--images=8", "--batch_size=8", *options]) == 0
        training = rows(folder / "analysis" / "training.csv")
        assert [float(row["value"]) for row in training if row["what"].startswith("log")] == [0.0]
        assert all((float(row["value"]) > 0) == moves for row in training if row["what"].endswith("rmse"))
        text = (folder / "analysis" / "index.html").read_text()
        assert ("these align labels" in text) == (options != ["--layers=null"])
        assert ("not averaged over residual connections" in text) == (options == ["--residual=false"])


def test_an_image_that_cannot_be_read_is_named(tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("L", (16, 16)).save(tmp_path / "val" / name / "whole.png")
    cut = tmp_path / "val" / "cat" / "cut.png"
    cut.write_bytes((tmp_path / "val" / "cat" / "whole.png").read_bytes()[:40])
    images = [f"--data=folder:{tmp_path}", *IMAGES[1:], f"--output={tmp_path / 'analysis'}"]
    assert main(["analyze", *VIT, *images]) == 2
    assert f"data: a held-out image can't be read; repair or remove it: {cut}" in capsys.readouterr().err


def test_blocks_that_are_not_there_are_refused(capsys):
    assert main(["analyze", *VIT, *IMAGES, "--layers=[7]"]) == 2
    assert "layers: expected" in capsys.readouterr().err


def test_a_checkpoint_of_the_first_epoch_is_of_a_part_of_it(tmp_path):
    for content, epoch in (({"epoch": 0, "step": 2, "steps_per_epoch": 5}, 0.4), ({"epoch": 7}, 8.0), ({}, None)):
        torch.save(content, tmp_path / "checkpoint.pth")
        assert _epoch_of(tmp_path / "checkpoint.pth") == epoch


def test_page_holds_all_pictures_and_asks_for_nothing(run):
    folder = run / "analysis"
    elements = assert_is_complete_in_itself(folder / "index.html")
    images = [attributes for tag, attributes in elements if tag == "img"]
    embedded = {base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in images}
    assert embedded == {path.read_bytes() for path in folder.glob("*.png")}
    assert all(len(image["alt"]) > 20 for image in images)
    ids = {attributes["id"] for _, attributes in elements if "id" in attributes}
    assert {attributes["href"][1:] for tag, attributes in elements if tag == "a"} <= ids
    assert {tag for tag, _ in elements} >= {"main", "nav", "h1", "h2", "table", "figcaption"}


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_page_opens_in_chromium_without_errors(run, tmp_path):
    """The console is on standard error; the document is what the browser made of the page."""
    result = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=390,844",
         f"--user-data-dir={tmp_path}", "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=2000",
         "--dump-dom", (run / "analysis" / "index.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "CONSOLE" not in result.stderr
    assert result.stdout.count("<figure") == 9


def test_swin_is_drawn_stage_by_stage_and_without_transmix(tmp_path):
    folder = tmp_path / "swin"
    assert main(["analyze", *SWIN, *IMAGES, "--images=20", "--output", str(folder)]) == 0
    ratios = rows(folder / "mixing_ratio.csv")
    assert len(ratios) == 4
    assert "transmix" not in ratios[0]
    assert not (folder / "rmse_training.png").exists()  # there is no training to show
    assert "random weights: nothing here was trained" in (folder / "index.html").read_text()


PLAIN = "patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2"
MERGING = "patch_size: 2, embed_dim: 16, depths: [1, 1], num_heads: [2, 2], window_size: 4"


@pytest.mark.parametrize(
    ("model", "options", "whole_image"),
    [
        ("swinv2_cr_tiny_ns_224", MERGING, "mean of the tokens"),
        ("pvt_v2_b0", "depths: [1, 1, 1, 1]", "mean of the tokens"),
        ("twins_svt_small", "depths: [1, 1, 1, 1]", "mean of the tokens"),
        ("davit_tiny", "depths: [1, 1, 1, 1], embed_dims: [24, 48, 96, 192]", "mean of the tokens"),
        ("maxvit_tiny_tf_224", "depths: [1, 1, 1, 1]", "mean of the tokens"),
        ("coatnet_0_rw_224", "depths: [1, 1, 1, 1]", "mean of the tokens"),
        ("xcit_tiny_12_p8_224", "embed_dim: 16, depth: 1, num_heads: 2", "class token"),
        ("pit_ti_224", "patch_size: 8, stride: 4, depth: [1, 1, 1]", "class token"),
        ("pit_ti_distilled_224", "patch_size: 8, stride: 4, depth: [1, 1, 1]", "mean of class and distillation token"),
        ("vit_base_patch16_siglip_224", PLAIN, "mean of the tokens, which the head weights by attention"),
        ("eva02_tiny_patch14_224", PLAIN, "mean of the tokens"),
        ("deit_tiny_distilled_patch16_224", PLAIN, "mean of class and distillation token"),
    ],
)
def test_models_are_analysed_however_they_pool(model, options, whole_image, tmp_path):
    images = ["--img_size=32", *[option for option in IMAGES if "img_size" not in option], "--images=2"]
    flags = [f"--model={model}", f"--model_kwargs={{{options}}}", *images, "--batch_size=2"]
    assert main(["analyze", *flags, "--output", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert f"that of the {whole_image}. " in page
    head = "attention pool" if "attention" in whole_image else whole_image
    assert f"maps of what the {head} sees of each of" in page


def test_labels_are_drawn_after_the_blocks_asked_for_and_the_last(tmp_path):
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=16, patch_size=2, embed_dim=16,
                              depths=(2, 2), num_heads=(2, 2), window_size=4)  # fmt: skip
    heights = {}
    for layers in (None, (0, 1, 2), (-1,)):
        path = tmp_path / "maps.png"
        draw_token_labels(
            model, torch.randn(4, 3, 16, 16), torch.arange(4), path, (0.5,), (0.5,), columns=1, layers=layers
        )
        with Image.open(path) as picture:
            heights[layers] = picture.height
    # None: a row for each of the two stages.
    row = heights[None] - heights[-1,]
    assert row > 100
    assert heights[0, 1, 2] == heights[None] + 2 * row


def test_loose_images_may_be_more_than_the_classes_of_the_model(tmp_path):
    (tmp_path / "photos").mkdir()
    for index in range(5):
        Image.new("RGB", (24, 20), (40 * index, 40, 99)).save(tmp_path / "photos" / f"{index}.png")
    options = [*VIT, f"--data=folder:{tmp_path / 'photos'}", "--num_classes=2", "--img_size=16", "--workers=0"]
    assert main(["analyze", *options, f"--output={tmp_path / 'analysis'}", "--device=cpu"]) == 0


def test_a_reader_that_has_gone_away_loses_no_report(tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as nowhere:
        monkeypatch.setattr("sys.stdout", nowhere)
        assert main(["analyze", *VIT, *IMAGES, "--images=2", f"--output={tmp_path}"]) == 0
    assert (tmp_path / "index.html").is_file()


@pytest.mark.parametrize("name", ["$x_{$", "\\$", os.fsdecode(b"\xfc")])
def test_any_name_of_a_class_is_drawn(tmp_path, name):
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, **MODEL)
    draw_token_labels(
        model, torch.randn(2, 3, 16, 16), torch.arange(2), tmp_path / "maps.png", (0.5,), (0.5,), [name, "b"]
    )
    assert (tmp_path / "maps.png").exists()


def test_long_names_of_classes_have_a_line_each(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda axis, title, **options: titles.append(title))
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, **MODEL)
    for names in (["cat", "dog"], ["n01440764", "n02102040"]):
        draw_token_labels(
            model, torch.randn(2, 3, 16, 16), torch.arange(2), tmp_path / "maps.png", (0.5,), (0.5,), names
        )
    assert titles == ["cat + dog", "n01440764\n+ n02102040"]


def test_a_path_that_is_no_text_is_written_to_the_page(tmp_path):
    write_page(tmp_path / "page.html", "title", [os.fsdecode(b"of x\xfc.pth")], [])
    assert "of x?.pth" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_dollars_in_the_name_of_a_checkpoint_are_no_formula(tmp_path):
    draw_rmse_by_model([("model", "$x_{$.pth", 0.1)], tmp_path / "rmse.png")
    assert (tmp_path / "rmse.png").exists()


def test_checkpoint_of_timm_on_an_image_folder(tmp_path):
    for part in ("train", "val"):
        for number, name in enumerate(("cat", "dog")):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for index in range(3):
                Image.new("RGB", (24, 20), (80 * number, 40 * index, 99)).save(
                    tmp_path / f"data/{part}/{name}/{index}.png"
                )
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=2, **MODEL)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    options = [*VIT, f"--data=folder:{tmp_path / 'data'}", "--img_size=16", "--workers=0", "--device=cpu"]
    assert main(["analyze", *options, "--checkpoint", str(tmp_path / "weights.pth"), "--images=100"]) == 0
    assert_is_complete_in_itself(tmp_path / "analysis" / "index.html")
    assert {row["weights"] for row in rows(tmp_path / "analysis" / "rmse.csv")} == {"weights.pth", RANDOM}


def test_any_folder_of_images_will_do(tmp_path, capsys):
    photos = tmp_path / "photos"
    for index, name in enumerate(("cat.jpg", "a/dog.png", "a/b/cow.webp", ".hidden/x.png")):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 20), (80 * index, 40, 99)).save(photos / name)
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=7, **MODEL)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    (tmp_path / "analysis").mkdir()
    for name in ("training.csv", "rmse_training.png"):
        (tmp_path / "analysis" / name).write_text("of another checkpoint")
    options = [*VIT, f"--data=folder:{photos}", "--img_size=16", "--workers=0", "--device=cpu"]
    options += ["--checkpoint", str(tmp_path / "weights.pth")]
    assert main(["analyze", *options]) == 2
    assert "num_classes: expected that of the model, since folder:" in capsys.readouterr().err
    assert main(["analyze", *options, "--num_classes=7"]) == 0
    assert_is_complete_in_itself(tmp_path / "analysis" / "index.html")
    # Weights alone don't say how long they were trained.
    assert not any((tmp_path / "analysis" / name).exists() for name in ("training.csv", "rmse_training.png"))
    images = load_images(EvalConfig(data=f"folder:{photos}", model="vit_tiny_patch16_224", num_classes=7))
    assert (images.train, images.num_classes, sorted(images.class_names)) == (None, 7, ["cat", "cow", "dog"])
    of_names = {images.class_names[number]: image.getpixel((0, 0))[0] for image, number in images.held_out}
    assert all(abs(of_names[name] - value) < 9 for name, value in (("cat", 0), ("dog", 80), ("cow", 160)))
    (photos / "train").mkdir()
    with pytest.raises(UsageError, match=r"data: no folder .*photos/val; expected PATH/train/CLASS/IMAGE"):
        load_images(EvalConfig(data=f"folder:{photos}", model="vit_tiny_patch16_224", num_classes=7))
    for place, message in ((tmp_path / "weights.pth", "data: no folder"), (photos / ".hidden" / "none", "data: no f")):
        with pytest.raises(UsageError, match=message):
            load_images(EvalConfig(data=f"folder:{place}", model="vit_tiny_patch16_224", num_classes=7))
    (tmp_path / "empty" / ".hidden").mkdir(parents=True)
    for moved, message in ((False, "data: Found 0 images in"), (True, "data: no images in .* but hidden ones")):
        if moved:
            (photos / ".hidden" / "x.png").rename(tmp_path / "empty" / ".hidden" / "x.png")
        with pytest.raises(UsageError, match=message):
            load_images(EvalConfig(data=f"folder:{tmp_path / 'empty'}", model="vit_tiny_patch16_224", num_classes=7))


def test_images_and_random_weights_are_always_the_same():
    config = AnalyzeConfig(
        data="digits", model="vit_tiny_patch16_224", model_kwargs=MODEL, img_size=16, in_chans=1, workers=0,
        images=10, batch_size=4, device="cpu",
    )  # fmt: skip
    subjects = [create_subject(config, load_data_sets(config), None) for _ in range(2)]
    assert torch.equal(*(subject.model.blocks[0].attn.qkv.weight for subject in subjects))
    aligned = {"layers": (1,), "residual": False}
    assert create_subject(AnalyzeConfig(**vars(config) | aligned), subjects[0].data, None).alignment == aligned
    batches = [list(subject.mixed()) for subject in subjects]
    assert [len(batch.images) for batch in batches[0]] == [4, 4, 2]
    for first, second in zip(*batches, strict=True):
        assert torch.equal(first.mixed, second.mixed)
        assert torch.equal(first.target.boxes, second.target.boxes)
    # Not the first ones, which may all be of one class.
    assert len(set(torch.cat([classes for _, classes in subjects[0].batches()]).tolist())) > 3


def test_models_of_table_1_have_the_weights_given_or_say_that_they_are_random(tmp_path):
    name = "deit_tiny_patch16_224"
    published = timm.create_model(name)
    torch.save({"model": published.state_dict()}, tmp_path / f"{name}.pth")
    # What is of the model that is analysed is not for them.
    other = {"model": "x", "model_kwargs": {"depth": 2}, "img_size": 32, "map_layers": (20,)}
    config = AnalyzeConfig(data="digits", in_chans=1, table1_weights=str(tmp_path), device="cpu", **other)
    data = load_data_sets(config)
    subject = create_subject_of_table_1(name, config, data)
    assert (subject.weights, subject.image_config["input_size"]) == (f"{name}.pth", (1, 224, 224))
    # timm sums the weights of the colours for grey images.
    projection = published.patch_embed.proj.weight.sum(dim=1, keepdim=True)
    torch.testing.assert_close(subject.model.patch_embed.proj.weight, projection)
    assert torch.equal(subject.model.blocks[3].attn.qkv.weight, published.blocks[3].attn.qkv.weight)
    (tmp_path / f"{name}.pth").unlink()
    assert create_subject_of_table_1(name, config, data).weights == RANDOM
    torch.save({"model": {"no": torch.zeros(1)}}, tmp_path / f"{name}.pth")
    with pytest.raises(UsageError, match=name):
        create_subject_of_table_1(name, config, data)
    (tmp_path / f"{name}.pth").write_text("no weights")
    with pytest.raises(UsageError, match=rf"table1_weights: .*{name}\.pth is no checkpoint"):
        create_subject_of_table_1(name, config, data)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*VIT, "--images=1"], "images: expected at least 2"),
        ([*VIT, "--batch_size=5"], "batch_size: expected an even number, to mix images in pairs, got 5"),
        ([*VIT, "--seed=4294967296"], "seed: expected 0 to 4294967295, got 4294967296"),
        ([*VIT, "--map_layers=[2]"], "map_layers: expected blocks from -2 to 1"),
        (["--model=resnet18"], "can't follow labels through"),
        (
            ["--model=naflexvit_base_patch16_gap", f"--model_kwargs={FLEXIBLE}", "--img_size=33"],
            "img_size: the model can't take images of 33 x 33 pixels: ",
        ),
        ([*VIT, "--checkpoint=nowhere.pth"], "checkpoint: expected a file, got nowhere.pth"),
        ([*VIT, "--table1_weights=nowhere", "--table1=true"], "table1_weights: expected a folder, got nowhere"),
        ([*VIT, "--output=/dev/null/x"], "output: cannot write to the folder /dev/null/x: "),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["analyze", *IMAGES, "--images=4", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("broken", ["tempfile.TemporaryFile", "tlalign.analysis.report.write_page"])
def test_a_full_disk_ends_it_before_the_work_or_where_it_fills(broken, capsys, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(broken, full)
    assert main(["analyze", *IMAGES, *VIT, "--images=4", "--output", str(tmp_path)]) == 2
    error = f"tlalign: error: output: cannot write to the folder {tmp_path}: [Errno 28] No space left on device\n"
    assert capsys.readouterr().err == error
    assert any(tmp_path.iterdir()) == ("write_page" in broken)


def test_one_image_is_too_few_to_mix(tmp_path, capsys):
    Image.new("RGB", (16, 16)).save(tmp_path / "one.png")
    options = ["--num_classes=2", "--img_size=16", "--workers=0", "--device=cpu", "--output", str(tmp_path / "out")]
    assert main(["analyze", *VIT, f"--data=folder:{tmp_path}", *options]) == 2
    assert "data: expected at least two held-out images to mix, got fewer" in capsys.readouterr().err


def test_text_of_a_page_is_never_markup(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    nasty = '<script>alert(1)</script> & "quoted" \''
    picture = Picture(tmp_path / "a.png", nasty, nasty)
    table = Table(nasty, (nasty,), [(nasty,), (0.123456,), (float("nan"),), (None,)])
    write_page(tmp_path / "index.html", nasty, [nasty], [Section(nasty, [nasty], [picture], [table])])
    elements = assert_is_complete_in_itself(tmp_path / "index.html")
    assert [attributes["alt"] for tag, attributes in elements if tag == "img"] == [nasty]
    cells = re.findall("<td>(.*?)</td>", (tmp_path / "index.html").read_text())
    assert cells[1:] == ["0.1235", "-", "-"]


def digits(**values):
    return AnalyzeConfig(
        data="digits", model="vit_tiny_patch16_224", model_kwargs=MODEL, img_size=16, in_chans=1, workers=0, images=22,
        batch_size=8, device="cpu", **values,
    )  # fmt: skip


def test_tables_hold_what_the_analyses_find(run):
    config = digits(mean=(0.5,), std=(0.5,), crop_pct=1.0)
    subject = create_subject(config, load_data_sets(config), run / "last.pth.tar")
    follower = RatioFollower(subject.model)
    batches = [(batch, follower(batch)) for batch in subject.mixed()]
    ratios = collect_ratios(subject.model, batches)
    expected = {
        "transmix": ratios.transmix.mean().expand(2),
        "tl_align": ratios.aligned.mean(dim=0),
        "by_similarity": ratios.reference.nanmean(dim=0),
        "error_cutmix": (ratios.cutmix[:, None] - ratios.reference).abs().nanmean(dim=0),
        "error_transmix": (ratios.transmix[:, None] - ratios.reference).abs().nanmean(dim=0),
        "error_tl_align": (ratios.aligned - ratios.reference).abs().nanmean(dim=0),
        "patch_error_kept": ratios.kept_error.nanmean(dim=0),
        "patch_error_tl_align": ratios.aligned_error.nanmean(dim=0),
    }
    _, paths = token_paths(subject.model, *batches[0])
    tables = {
        "mixing_ratio": expected,
        "token_ratios": {"before": paths.kept, "tl_align": paths.aligned, "by_similarity": paths.reference},
        "rollout": {"weight": attention_rollout(subject.model, batches[0][0].images[:4]).head[:, 1:]},
    }
    for name, columns in tables.items():
        table = rows(run / "analysis" / f"{name}.csv")
        for column, values in columns.items():
            found = [float(row[column]) for row in table]
            assert found == pytest.approx(values.flatten().tolist(), rel=1e-5, nan_ok=True), (name, column)
    layers = [PresenceOfLayer() for _ in range(2)]
    for batch, _ in batches:
        for layer, values in zip(layers, token_presence(subject.model, batch.images), strict=True):
            layer.add(values, has_class_token=True)
    for row, layer in zip(rows(run / "analysis" / "presence.csv"), layers, strict=False):
        found = [float(row[name]) for name in ("least", "5%", "50%", "greatest", "class token", "rms of p - 1")]
        assert found == pytest.approx(
            [layer.least, layer.quantile(0.05), layer.quantile(0.5), layer.greatest, layer.class_token, layer.distance]
        )
    *_, convolution = rows(run / "analysis" / "presence.csv")
    assert [float(convolution[name]) for name in ("least", "50%", "greatest")] == pytest.approx([4 / 9, 6 / 9, 1])
    worst = max((0, 1), key=lambda index: layers[index].distance)
    text = (run / "analysis" / "index.html").read_text()
    assert f"by {(ratios.target - ratios.cutmix).abs().mean():.4f} on average" in text
    assert f"in block {worst + 1} (root mean square of p - 1: {layers[worst].distance:.2f})" in text


def test_all_analyses_compute_in_the_precision_asked_for(run, tmp_path):
    flags = ["--images=22", "--batch_size=8", "--precision=bfloat16", f"--output={tmp_path}"]
    assert main(["analyze", "--checkpoint", str(run / "last.pth.tar"), *flags]) == 0
    for table, column in (("mixing_ratio", "tl_align"), ("rmse", "rmse"), ("rollout", "weight")):
        float32, bfloat16 = (
            [float(row[column]) for row in rows(folder / f"{table}.csv")] for folder in (run / "analysis", tmp_path)
        )
        assert bfloat16 == pytest.approx(float32, rel=0.2)
        assert all(one != other for one, other in zip(float32, bfloat16, strict=True)), table


def test_tables_of_a_map_that_is_not_square_keep_its_rows_and_columns(tmp_path, monkeypatch):
    def rollout(model, images):
        assert attention_rollout(model, images).grid == (4, 2)
        return Rollout(None, torch.arange(9.0).expand(len(images), 9), (4, 2))

    monkeypatch.setattr(report, "attention_rollout", rollout)
    options = [VIT[0], f"--model_kwargs={MODEL | {'patch_size': [4, 8]}}", *IMAGES, "--images=2"]
    assert main(["analyze", *options, f"--output={tmp_path}"]) == 0
    places = list(itertools.product(range(4), range(2)))
    for name in ("rollout", "label_maps"):
        assert [(int(row["row"]), int(row["column"])) for row in rows(tmp_path / f"{name}.csv")][:8] == places
    weights = [float(row["weight"]) for row in rows(tmp_path / "rollout.csv")]
    assert weights == [1 + 2 * row + column for row, column in places] * 2


def test_labels_are_drawn_after_each_quarter_of_the_blocks():
    for blocks, expected in ((12, [2, 5, 8]), (2, [0, 0, 1]), (24, [5, 11, 17])):
        assert _map_layers(digits(), [torch.zeros(1, 5, 1)] * blocks) == expected
    assert _map_layers(digits(), [torch.zeros(1, side, side, 1) for side in (4, 4, 2, 2)]) is None  # those of stages


def test_pixels_are_those_before_normalisation_and_the_seed_mixes():
    config = digits(mean=(0.1,), std=(0.4,))
    data = load_data_sets(config)
    subject, other = (create_subject(c, data, None) for c in (config, digits(mean=(0.1,), std=(0.4,), seed=1)))
    shades = torch.linspace(0, 1, 256).view(1, 1, 16, 16)
    assert subject.pixels((shades - 0.1) / 0.4) == pytest.approx(shades.permute(0, 2, 3, 1).numpy(), abs=1e-6)
    first, second = next(subject.mixed()), next(other.mixed())
    assert torch.equal(first.images, second.images) and not torch.equal(first.target.boxes, second.target.boxes)
    assert not torch.equal(subject.model.patch_embed.proj.weight, other.model.patch_embed.proj.weight)


def test_maps_are_drawn_with_the_run_s_options_and_a_log_of_another_target_is_left_out(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("target: tl-align", "target: transmix"))
    asked = []
    monkeypatch.setattr(report, "draw_token_labels", lambda *arguments: asked.append(arguments) or {})
    monkeypatch.setattr(report, "write_page", lambda *arguments: None)
    flags = ["--images=4", "--mean=[0.1]", "--std=[0.2]", "--layers=[-1]", "--residual=false", "--map_layers=[0]"]
    assert main(["analyze", "--checkpoint", str(tmp_path / "run" / "last.pth.tar"), *flags]) == 0
    ((_, images, classes, _, mean, std, names, _, layers, alignment),) = asked
    assert (len(images), len(classes), mean, std, layers) == (4, 4, (0.1,), (0.2,), (0,))
    assert list(names) == list("0123456789")
    assert alignment == {"layers": (-1,), "residual": False}
    assert not [row for row in rows(tmp_path / "run" / "analysis" / "training.csv") if row["what"].startswith("log")]
    assert [row for row in rows(run / "analysis" / "training.csv") if row["what"].startswith("log")]


def test_the_averaged_weights_of_a_run_are_analysed(run):
    weights = torch.load(run / "last.pth.tar", weights_only=False)
    model = create_subject(digits(), load_data_sets(digits()), run / "last.pth.tar").model
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(model.get_parameter(name), weights["state_dict_ema"][name])
    assert not torch.equal(model.get_parameter(name), weights["state_dict"][name])


def test_checkpoints_of_a_run_are_measured_over_training(run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    shutil.copy(folder / "last.pth.tar", folder / "model_best.pth.tar")
    earlier = torch.load(folder / "last.pth.tar", weights_only=False)
    earlier["step"] = earlier["steps_per_epoch"]
    torch.save(earlier, folder / "earlier.pth.tar")
    torch.save({"state_dict": {"weight": torch.zeros(1)}, "epoch": 0}, folder / "another.pth.tar")
    assert main(["analyze", "--checkpoint", str(folder / "last.pth.tar"), "--images=22", "--batch_size=8"]) == 0
    trained, untrained = (float(row["rmse"]) for row in rows(folder / "analysis" / "rmse.csv"))
    measured = [(row["epoch"], row["what"], float(row["value"])) for row in rows(folder / "analysis" / "training.csv")]
    assert [row for row in measured if "log" not in row[1]] == [
        ("0.0", f"{RANDOM}: rmse", untrained),
        ("1.0", "earlier.pth.tar: rmse", pytest.approx(trained)),
        ("2.0", "last.pth.tar: rmse", trained),
    ]
    assert trained != pytest.approx(untrained, rel=0.01)
    assert "left out: checkpoint: " in capsys.readouterr().out  # another.pth.tar
    (folder / "log.csv").write_text("no log\n")
    assert main(["analyze", "--checkpoint", str(folder / "last.pth.tar"), "--images=4"]) == 2
    assert "checkpoint: cannot read the log beside it: expected the columns" in capsys.readouterr().err
