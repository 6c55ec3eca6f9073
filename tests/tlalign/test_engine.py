"""Training: repeatable, stops on a broken loss, and learns."""

import dataclasses
import io
import itertools
import math
import platform
import resource
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import timm
import torch
from rich.console import Console
from training import TINY, FewDigits, fit, quiet, record, resume, tiny

from tlalign.checkpoints import load_checkpoint
from tlalign.config import TrainConfig, UsageError, load_recipe, save_config
from tlalign.engine import NonFiniteLossError, Trainer, _Stopwatch
from tlalign.evaluation import evaluate_checkpoint, prepare_device
from tlalign.networks import create_model
from tlalign.processes import Processes
from tlalign.progress import ComparisonProgress, TrainingProgress
from tlalign.runs import RunFolder
from tlalign_kernels import LabelFollower, mixed_binary_cross_entropy, mixed_cross_entropy


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    state = trainer.task.get_checkpoint_state()["state_dict"]
    return state | {
        f"ema.{key}": value for key, value in trainer.task.get_checkpoint_state(True)["state_dict_ema"].items()
    }


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path):
    runs = [fit(tiny(tmp_path / str(index), seed=seed))[0] for index, seed in enumerate((0, 0, 1))]
    first, second, other = (weights(trainer) for trainer in runs)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_what_a_step_draws_depends_on_seed_step_part_and_process(tmp_path):
    dropout = {**TINY["model_kwargs"], "proj_drop_rate": 0.5}
    # So small a rate that no weight changes.
    still = {"lr": 1e-30, "sched": "none", "ema_decay": None}
    trainer = Trainer(tiny(tmp_path, model_kwargs=dropout, mixing="none", accumulate=2, **still))
    batch, found = next(trainer.train_loader.epoch(1)), []
    trainer.task.train().register_forward_hook(lambda module, inputs, result: found.append(result["loss"].item()))

    def losses(seed=0, step=0, rank=0):
        trainer.config = dataclasses.replace(trainer.config, seed=seed)
        trainer.processes, trainer.step = dataclasses.replace(trainer.processes, rank=rank), step
        trainer._train_step(itertools.repeat(batch), _Stopwatch(trainer.device))
        return found[-2:]

    mixed = []
    trainer.task.start_step = mixed.append
    assert losses() == losses()
    drawn = [*losses(), *losses(seed=1), *losses(step=1), *losses(rank=1)]
    assert len(set(drawn)) == 8
    assert mixed == [0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 0, 1]


AMD = dict(cpu_name="AMD EPYC", avx512_f=True, amx_bf16=False)


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        (AMD, "bf16"),
        ({**AMD, "cpu_name": "Intel(R) Xeon(R)"}, "ieee"),
        ({**AMD, "avx512_f": False}, "ieee"),
        ({**AMD, "amx_bf16": True}, "ieee"),
        ({"cpu_name": "Neoverse V2", "architecture": "aarch64"}, "ieee"),
    ],
)
def test_products_are_onednns_where_these_are_faster_and_float32_still(tmp_path, monkeypatch, cpu, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn.matmul, "fp32_precision", "ieee")
    of_gpus = torch.backends.cuda.matmul.fp32_precision
    assert prepare_device(tiny(tmp_path, device="cpu")).type == "cpu"
    assert torch.backends.mkldnn.matmul.fp32_precision == expected
    assert torch.backends.cuda.matmul.fp32_precision == of_gpus


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_memory_that_tensors_on_the_cpu_free_is_kept(tmp_path):
    prepare_device(tiny(tmp_path, device="cpu"))
    faults = []
    for _ in range(4):
        torch.ones(2**24)  # 64 MiB, which glibc would give back
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    taken = (after - before for before, after in itertools.pairwise(faults))
    assert min(taken) < 2**26 / resource.getpagesize() / 10


def test_a_gpu_that_is_chosen_is_the_current_one(tmp_path, monkeypatch):
    current = []
    monkeypatch.setattr(torch, "zeros", lambda *_, device: SimpleNamespace(item=float, device=torch.device(device)))
    monkeypatch.setattr(torch.accelerator, "set_device_index", current.append)
    for name in ("cuda:1", "cpu"):
        assert str(prepare_device(tiny(tmp_path, device=name))) == name
    assert current == [1]


def test_of_several_processes_none_touches_the_gpu_of_another(tmp_path, monkeypatch):
    monkeypatch.setattr("tlalign.evaluation.started_processes", lambda: 2)
    monkeypatch.setattr(torch, "zeros", None)
    config = tiny(tmp_path, device="cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert prepare_device(config) == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="device: cannot use 'cuda:1': there is none"):
        prepare_device(config)


def test_processes_wait_for_one_another_on_their_own_gpus(monkeypatch):
    waited = mock.Mock()
    monkeypatch.setattr("torch.distributed.barrier", waited)
    for device in ("cpu", "cuda:1"):
        with Processes(torch.device(device), rank=1, world_size=2).first_before_others():
            pass
    assert [call.kwargs["device_ids"] for call in waited.call_args_list] == [None, [1]]


def test_products_of_float32_are_not_rounded(tmp_path):
    prepare_device(tiny(tmp_path, device="cpu"))
    factor = torch.full((256, 256), 1 + 2**-12)  # bfloat16 and TF32 know no number between 1 and this
    assert factor.matmul(factor)[0, 0].item() == pytest.approx(256 * (1 + 2**-12) ** 2, abs=2**-10)


@pytest.mark.parametrize(
    ("mixing", "target", "method"),
    [
        ("none", "tl-align", "none"),
        ("cutmix", "ratio", "cutmix"),
        ("cutmix", "tl-align", "cutmix+tl-align"),
        ("cutmix", "transmix", "cutmix+transmix"),
        ("mixup", "ratio", "mixup"),
        ("mixup-cutmix", "tl-align", "mixup-cutmix+tl-align"),
        ("block", "tl-align", "block+tl-align"),
    ],
)
def test_every_mixing_and_target_trains_and_logs(tmp_path, mixing, target, method):
    config = tiny(tmp_path / "run", mixing=mixing, target=target)
    assert config.method == method
    trainer, folder, (record,) = fit(config)
    aligned = "+" in method
    for value in (record.ratio_change, record.ratio_rmse, record.ratio_shift):
        assert (value is not None) == aligned
    assert 2**20 < record.peak_memory < 2**40
    header, row = folder.log.read_text().splitlines()
    assert header.split(",") == [field.name for field in dataclasses.fields(record)]
    assert row.split(",")[2] == str(record.loss)
    assert trainer.step == trainer.steps_per_epoch
    patched = type(trainer.model).__name__
    assert patched == ("AlignedVisionTransformer" if aligned else "VisionTransformer")


def test_a_row_of_the_log_has_the_means_of_its_steps(tmp_path, monkeypatch):
    steps, train_step = [], Trainer._train_step

    def watched(*arguments):
        steps.append(train_step(*arguments))
        return steps[-1]

    monkeypatch.setattr(Trainer, "_train_step", watched)
    _, _, (record,) = fit(tiny(tmp_path / "run"))
    losses, changes = zip(*steps, strict=True)
    assert len(losses) > 1
    assert record.loss == pytest.approx(torch.stack(losses).mean().item())
    assert record.ratio_change == pytest.approx(torch.cat(changes).abs().mean().item())
    assert record.ratio_change > 0
    assert record.ratio_rmse == pytest.approx(torch.cat(changes).square().mean().sqrt().item())
    assert record.ratio_shift == pytest.approx(torch.cat(changes).mean().item(), abs=1e-7)


def test_to_write_checkpoints_is_not_to_wait_for_images(tmp_path, monkeypatch):
    clock, save = itertools.count(), Trainer._save

    def slow(*arguments, **options):
        for _ in range(1000):
            next(clock)
        save(*arguments, **options)

    monkeypatch.setattr(Trainer, "_save", slow)
    monkeypatch.setattr(_Stopwatch, "_now", lambda self: float(next(clock)))
    _, _, (record,) = fit(tiny(tmp_path / "run", checkpoint_steps=1))
    # A tick each; the update after the backward is one more of it.
    assert (record.data_seconds, record.forward_seconds, record.backward_seconds) == (1.0, 1.0, 2.0)
    assert record.images_per_second == 128 / 4


@pytest.mark.parametrize("part", [True, False], ids=["train", "held-out"])
def test_images_of_no_class_are_refused_though_the_data_set_says_how_many_it_has(tmp_path, monkeypatch, part):
    class Unlabelled(FewDigits):
        def __init__(self, train: bool) -> None:
            super().__init__(train)
            if train == part:
                self.targets = self.targets.copy()
                self.targets[3] = -1

    monkeypatch.setattr("tlalign.readers.Digits", Unlabelled)
    with pytest.raises(UsageError, match=r"data: expected classes from 0 to 9 .*, got an image of class -1"):
        fit(tiny(tmp_path / "run", batch_size=20))


def test_a_checkpoint_is_not_evaluated_on_images_of_no_class(tmp_path, monkeypatch):
    class Unlabelled(FewDigits):
        def __init__(self, train: bool) -> None:
            super().__init__(train)
            self.targets = [-1, *self.targets[1:]]

    config = tiny(tmp_path)
    torch.save(create_model(config, 10).state_dict(), tmp_path / "weights.pth")
    monkeypatch.setattr("tlalign.readers.Digits", Unlabelled)
    with pytest.raises(UsageError, match=r"data: expected classes from 0 to 9 .*, got an image of class -1"):
        evaluate_checkpoint(tmp_path / "weights.pth", config)


def test_what_takes_long_once_is_not_multiplied_in_the_estimate_of_a_dry_run(tmp_path):
    trainer = Trainer(tiny(tmp_path / "run", epochs=100))
    slow_once = iter((2.0,))

    def evaluate(module, inputs):
        if not module.training:
            time.sleep(next(slow_once, 0.0))

    trainer.model.register_forward_pre_hook(evaluate)
    result = trainer.dry_run()
    assert next(slow_once, None) is None and len(trainer.eval_loader) > 1
    assert result.total_seconds - result.steps * sum(result.step_seconds.values()) < 2 * 100


@pytest.mark.parametrize(("ema_decay", "evaluations"), [(None, 1), (0.5, 2)])
def test_the_estimate_of_a_dry_run_has_the_evaluation_of_the_average(tmp_path, monkeypatch, ema_decay, evaluations):
    trainer = Trainer(tiny(tmp_path / "run", epochs=3, ema_decay=ema_decay, accumulate=2))
    clock = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    result = trainer.dry_run()
    step = sum(result.step_seconds.values())
    assert result.images_per_second == pytest.approx(128 / step)
    assert result.total_seconds - result.steps * step == pytest.approx(3 * len(trainer.eval_loader) * evaluations)


def test_options_of_the_alignment_are_those_of_the_model(tmp_path):
    model = {**TINY["model_kwargs"], "depth": 3}
    trainer = Trainer(tiny(tmp_path, model_kwargs=model, layers=(0, -1), residual=False, stochastic_depth=True))
    blocks = trainer.model.blocks
    assert [isinstance(block, LabelFollower) for block in blocks] == [True, False, True]
    assert (blocks[0].label_residual, blocks[0].label_stochastic_depth) == (False, True)


@pytest.mark.parametrize(
    ("mixing", "target"), [("tokenmix", "teacher"), ("attentive-cutmix", "tl-align"), ("cutmix", "token-labels")]
)
def test_a_run_s_checkpoint_teaches_another(tmp_path, mixing, target):
    (tmp_path / "teacher").mkdir()
    # What a run leaves: its configuration, and weights of the model and of its average.
    model = {**TINY["model_kwargs"], "patch_size": 4}
    save_config(tiny(tmp_path, model_kwargs=model), tmp_path / "teacher" / "config.yaml")
    checkpoint = tmp_path / "teacher" / "last.pth.tar"
    weights, averaged = (
        Trainer(tiny(tmp_path, model_kwargs=model, seed=seed)).task.get_trainable_module().state_dict()
        for seed in (1, 2)
    )
    torch.save({"state_dict": weights, "state_dict_ema": averaged}, checkpoint)

    config = tiny(tmp_path / "run", mixing=mixing, target=target, teacher_checkpoint=str(checkpoint))
    trainer = Trainer(config)
    trainer.task.start_step(0)
    loss = trainer.task(*next(trainer.train_loader.epoch(1)))["loss"]
    assert torch.isfinite(loss)
    teacher = trainer.task.mixing.activation.__self__ if target == "tl-align" else trainer.task.teacher
    assert all(torch.equal(value, averaged[key]) for key, value in teacher.model.state_dict().items())
    # Its model can be given by name instead, but this name has other weights.
    with pytest.raises(UsageError, match=r"teacher_checkpoint: .* is not of this resnet10t"):
        Trainer(dataclasses.replace(config, teacher_model="resnet10t"))


@pytest.mark.parametrize(
    ("teacher", "mixing", "target", "message"),
    [
        (
            "resnet10t",
            "attentive-cutmix",
            "ratio",
            "img_size: expected images in which the teacher has more than",
        ),
        ("mixer_s32_224", "cutmix", "teacher", "teacher_checkpoint: the features of MlpMixer form no map of cells"),
    ],
)
def test_a_teacher_that_has_no_map_of_enough_cells_is_refused(tmp_path, teacher, mixing, target, message):
    checkpoint = tmp_path / "teacher.pth"
    options = {"img_size": 32} if teacher.startswith("mixer") else {}
    torch.save(timm.create_model(teacher, num_classes=10, in_chans=1, **options).state_dict(), checkpoint)
    of_teacher = {"teacher_checkpoint": str(checkpoint), "teacher_model": teacher}
    with pytest.raises(UsageError, match=message):
        Trainer(tiny(tmp_path, img_size=32, mixing=mixing, target=target, **of_teacher))


def test_without_an_average_none_is_kept(tmp_path):
    _, folder, (record,) = fit(tiny(tmp_path / "run", ema_decay=None))
    assert record.top1_ema is None
    assert "state_dict_ema" not in torch.load(folder.last_checkpoint, weights_only=False)


@pytest.mark.parametrize(("averaged", "metric"), [(20.0, 20.0), (None, 10.0)])
def test_checkpoints_are_ranked_by_the_average_where_there_is_one(tmp_path, averaged, metric):
    trainer = Trainer(tiny(tmp_path))
    trainer.records = [record(1, top1=10.0, top1_ema=averaged)]
    assert trainer.state()["metric"] == metric


def test_the_best_epoch_is_the_first_of_equal_ones_and_ends_with_its_last_step(tmp_path):
    trainer = Trainer(tiny(tmp_path))
    for count, more, best in ((1, 0, True), (2, 0, False), (1, 1, False), (0, 1, False)):
        trainer.records = [record(epoch, top1=10.0, top1_ema=None) for epoch in range(count)]
        trainer.step = count * trainer.steps_per_epoch + more
        assert trainer.is_best == best


def step_of(trainer: Trainer) -> float:
    """Trains a step, and returns its loss."""
    trainer.task.train()
    loss, _ = trainer._train_step(iter(trainer.train_loader.epoch(1)), _Stopwatch(trainer.device))
    return loss.item()


def test_options_of_the_optimizer_and_its_schedule_reach_them(tmp_path):
    rates = {"lr": 0.25, "warmup_lr": 0.0625, "min_lr": 0.03125, "epochs": 10, "warmup_epochs": 2}
    given = {"opt": "adamw", "weight_decay": 0.125, "opt_betas": [0.5, 0.75], "opt_eps": 1e-3}
    trainer = Trainer(tiny(tmp_path, **rates, **given))
    groups = trainer.optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 0.125}
    assert all((tuple(group["betas"]), group["eps"]) == ((0.5, 0.75), 1e-3) for group in groups)
    by_step = []
    for step in range(trainer.total_steps + 1):
        trainer.scheduler.step_update(step)
        by_step.append(groups[0]["lr"])
    warm = 2 * trainer.steps_per_epoch
    assert by_step[0] == 0.0625 and by_step[-1] == 0.03125
    # Half-way up; then a cosine over all ten epochs.
    assert by_step[warm // 2] == pytest.approx((0.0625 + 0.25) / 2)
    assert by_step[warm] == pytest.approx(0.03125 + (0.25 - 0.03125) * (1 + math.cos(math.pi / 5)) / 2)
    trainer = Trainer(tiny(tmp_path, opt="SGD", momentum=0.375))
    assert {group["momentum"] for group in trainer.optimizer.param_groups} == {0.375}
    for opt, unused in (
        ("sgd", {"opt_betas": [0.5, 0.75]}),
        ("lookahead_lion", {"opt_eps": 1e-3}),
        ("adamw", {"momentum": 0.5}),
    ):
        with pytest.raises(UsageError, match=rf"{next(iter(unused))}: expected (null|none), for {opt} has none, got"):
            Trainer(tiny(tmp_path, opt=opt, **unused))
    with pytest.raises(UsageError, match=r"^opt: timm has no adamww; did you mean adamw\?$"):
        Trainer(tiny(tmp_path, opt="adamww"))
    with pytest.raises(UsageError, match=r"opt, sched: .*nope"):
        Trainer(tiny(tmp_path, sched="nope"))
    with pytest.raises(UsageError, match=r"opt_betas: expected 3 numbers for adan, got \[0.9, 0.99\]"):
        Trainer(tiny(tmp_path, opt="adan", opt_betas=[0.9, 0.99]))
    trainer = Trainer(tiny(tmp_path, opt="adan", opt_betas=[0.5, 0.75, 0.875]))
    assert all(group["betas"] == [0.5, 0.75, 0.875] for group in trainer.optimizer.param_groups)


def test_the_learning_rate_that_is_logged_is_that_of_the_step(tmp_path, monkeypatch):
    trainer = Trainer(tiny(tmp_path / "run", epochs=2, warmup_epochs=1, warmup_lr=0.001, lr=0.01))
    used, logged, step = [], [], trainer.optimizer.step

    def recorded(*arguments, **options):
        used.append(trainer.optimizer.param_groups[0]["lr"])
        return step(*arguments, **options)

    trainer.optimizer.step = recorded
    monkeypatch.setattr("tlalign.log.RunLog.step", lambda self, number, values: logged.append(values["lr"]))
    folder = RunFolder(trainer.config)
    records = trainer.fit(folder, quiet(trainer))
    assert logged == used and used[0] == 0.001
    assert [record.lr for record in records] == [used[trainer.steps_per_epoch - 1], used[-1]]


@pytest.mark.filterwarnings("error:In CPU autocast")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_the_precision_is_that_of_logits_in_training_and_evaluation(tmp_path, precision):
    trainer, dtypes = Trainer(tiny(tmp_path, precision=precision)), []
    trainer.model.head.register_forward_hook(lambda module, inputs, logits: dtypes.append(logits.dtype))
    assert math.isfinite(step_of(trainer))
    trainer.evaluate()
    assert len(dtypes) > 1 and set(dtypes) == {getattr(torch, precision)}
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


def test_nothing_is_dropped_in_evaluation(tmp_path):
    trainer = Trainer(tiny(tmp_path, model_kwargs={**TINY["model_kwargs"], "drop_rate": 0.5}))
    results = []
    for _ in range(2):
        trainer.task.train()
        results.append(trainer.evaluate())
    assert results[0] == results[1]


def test_gradients_are_clipped_to_the_norm_that_is_given(tmp_path):
    def norm(**values):
        trainer = Trainer(tiny(tmp_path, **values))
        step_of(trainer)
        return torch.stack([each.grad.norm() for each in trainer.model.parameters()]).norm().item()

    free = norm(clip_grad=None)
    assert norm(clip_grad=free / 8) == pytest.approx(free / 8, rel=1e-4)
    assert norm(clip_grad=free / 8, precision="float16") == pytest.approx(free / 8, rel=1e-4)


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_the_loss_is_the_one_that_is_asked_for_with_its_smoothing(tmp_path, loss):
    trainer, batches = Trainer(tiny(tmp_path, mixing="none", loss=loss, smoothing=0.25)), []
    trainer.model.register_forward_hook(lambda module, inputs, logits: batches.append(logits))
    (_, classes), *_ = trainer.train_loader.epoch(1)
    found = step_of(trainer)
    target = torch.nn.functional.one_hot(classes, 10) * 0.75 + 0.25 / 10
    criterion = {"ce": torch.nn.CrossEntropyLoss(), "bce": torch.nn.BCEWithLogitsLoss()}[loss]
    assert found == pytest.approx(criterion(batches[0], target).item(), rel=1e-5)
    mixed = Trainer(tiny(tmp_path, loss=loss, smoothing=0.25)).task
    assert mixed.smoothing == 0.25
    assert mixed.loss is {"ce": mixed_cross_entropy, "bce": mixed_binary_cross_entropy}[loss]


def test_the_average_warms_up_as_the_configuration_says(tmp_path):
    trainer = Trainer(tiny(tmp_path, ema_decay=0.5, lr=0.1, epochs=2))
    average = expected = None
    for step in range(1, 5):
        step_of(trainer)
        weight = trainer.model.head.weight.detach().clone()
        decay = min(0.5, 1 - step ** (-2 / 3))
        expected = weight if step == 1 else decay * expected + (1 - decay) * weight
        average = trainer.task.get_eval_model(ema=True).module.head.weight
        torch.testing.assert_close(average, expected)
    assert not torch.allclose(average, weight, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("asked", [False, True])
def test_activations_are_checkpointed_and_channels_last_where_that_is_asked_for(tmp_path, asked):
    trainer = Trainer(tiny(tmp_path, grad_checkpointing=asked, channels_last=asked, in_chans=3))
    tensors = [trainer.model.patch_embed.proj.weight]
    trainer.model.patch_embed.register_forward_pre_hook(lambda module, inputs: tensors.append(inputs[0]))
    step_of(trainer)
    assert trainer.model.grad_checkpointing == asked
    assert [tensor.stride(1) == 1 for tensor in tensors] == [asked, asked]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_gpu_learns_what_the_cpu_does(tmp_path, precision):
    (on_cpu, _, (expected,)), (on_gpu, _, (record,)) = (
        fit(tiny(tmp_path / device, device=device, precision=precision if device == "cuda" else "float32"))
        for device in ("cpu", "cuda")
    )
    assert record.loss == pytest.approx(expected.loss, rel=0.01)
    assert record.ratio_change == pytest.approx(expected.ratio_change, rel=0.2)
    assert next(on_gpu.model.parameters()).is_cuda
    assert on_gpu.step == on_cpu.step


@pytest.mark.parametrize("values", [{"channels_last": True}, {"grad_checkpointing": True}, {"accumulate": 4}])
def test_what_saves_time_or_memory_changes_nothing_else(tmp_path, monkeypatch, values):
    monkeypatch.setattr("tlalign.readers.Digits", FewDigits)
    dropout = {**TINY["model_kwargs"], "proj_drop_rate": 0.0 if "accumulate" in values else 0.2}
    # Parts of a batch are mixed each by itself.
    options = {"model_kwargs": dropout, "mixing": "none" if "accumulate" in values else "cutmix", "batch_size": 20}
    (plain, _, (expected,)), (other, _, (record,)) = (
        fit(tiny(tmp_path / name, **options, **more)) for name, more in (("plain", {}), ("other", values))
    )
    assert record.loss == pytest.approx(expected.loss, rel=1e-5)
    for name, value in plain.model.state_dict().items():
        # Adam makes much of the gradient of a key's bias, which is nothing but rounding.
        torch.testing.assert_close(other.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    config = tiny(tmp_path / "run", epochs=3)
    trainer, folder = Trainer(config), RunFolder(config)
    steps = trainer.steps_per_epoch
    forward = trainer.task.forward

    def break_in_the_second_epoch(images, classes):
        result = forward(images, classes)
        return result | {"loss": result["loss"] * (float("nan") if trainer.step == steps + 2 else 1)}

    monkeypatch.setattr(trainer.task, "forward", break_in_the_second_epoch)
    with pytest.raises(NonFiniteLossError, match=rf"in epoch 2, at or before its step 3 of {steps} is nan"):
        trainer.fit(folder, quiet(trainer))
    checkpoint = torch.load(folder.last_checkpoint, weights_only=False)
    assert checkpoint["epoch"] == 1
    assert all(torch.isfinite(value).all() for value in checkpoint["state_dict"].values())


def test_an_average_that_is_not_finite_stops_too(tmp_path):
    trainer, results = Trainer(tiny(tmp_path)), {"loss": 1.0, "top1": 10.0, "top5": 50.0}
    trainer.evaluate = lambda ema=False, **_: results | ({"loss": math.nan} if ema else {})
    with pytest.raises(NonFiniteLossError, match="the loss of the evaluation of the average after epoch 1 is nan"):
        trainer.fit(None, quiet(trainer))


@pytest.mark.parametrize(
    ("value", "message"),
    [(math.inf, r"weights after step \d+ are not finite"), (3e38, "the loss of the evaluation after epoch 2 is")],
)
def test_weights_broken_by_the_last_step_are_not_kept(tmp_path, monkeypatch, value, message):
    config = tiny(tmp_path / "run", epochs=2)
    trainer, folder = Trainer(config), RunFolder(config)
    update = trainer.optimizer.step

    def break_the_last_step():
        update()
        if trainer.step == trainer.total_steps - 1:
            trainer.optimizer.param_groups[0]["params"][0].data.fill_(value)

    monkeypatch.setattr(trainer.optimizer, "step", break_the_last_step)
    with pytest.raises(NonFiniteLossError, match=message):
        trainer.fit(folder, quiet(trainer))
    assert resume(config)[0].step == trainer.steps_per_epoch
    assert load_checkpoint(folder.last_checkpoint)["step"] == trainer.steps_per_epoch


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "vit_tinny_patch16_224"}, "did you mean vit_tiny_patch16_224"),
        ({"model_kwargs": {"nonsense": 1}}, "unexpected keyword argument 'nonsense'"),
        *(
            ({"model_kwargs": {name: 32}}, f"expected {name} as an option of its own")
            for name in ("img_size", "in_chans", "num_classes")
        ),
        ({"model": "resnet18", "model_kwargs": {}}, "target: tl-align can't train resnet18"),
        (
            {"target": "transmix", "model_kwargs": {**TINY["model_kwargs"], "global_pool": "avg"}},
            "target: transmix can't train vit_tiny_patch16_224: .*class token",
        ),
        ({"layers": (1,)}, "layers: expected block indices from -1 to 0, got"),
        ({"mixing": "random", "mix_patch_size": 5}, "mix_patch_size: expected a divisor of the 16 pixels"),
        ({"mixing": "block", "mix_patch_size": 16}, "mix_patch_size: expected a divisor of the 16 pixels"),
        (
            {"target": "token-labels", "teacher_checkpoint": "nowhere.pth", "mix_patch_size": 6},
            "mix_patch_size: expected a divisor of the 16 pixels",
        ),
        (
            {
                "target": "token-labels",
                "teacher_checkpoint": "nowhere.pth",
                "model_kwargs": {**TINY["model_kwargs"], "patch_size": 4},
                "mix_patch_size": 8,
            },
            "mix_patch_size: expected for token-labels the side of vit_tiny.*'s tokens .* got 8: token_labels",
        ),
        ({"target": "teacher", "teacher_checkpoint": "nowhere.pth"}, "teacher_model: expected the timm model of nowhe"),
        (
            {"target": "teacher", "teacher_checkpoint": "nowhere.pth", "teacher_model": "resnet10t"},
            "teacher_checkpoint: cannot read nowhere.pth",
        ),
        (
            {"mixing": "puzzlemix", "img_size": 25, "model_kwargs": {**TINY["model_kwargs"], "patch_size": 5}},
            "img_size: expected a multiple of 2 for puzzlemix, got 25",
        ),
        (
            {
                "model": "pit_ti_224",
                "model_kwargs": {"base_dims": (8, 8, 8), "depth": (1, 1, 1), "heads": (2, 4, 8)},
                "img_size": 32,
                "grad_checkpointing": True,
            },
            "grad_checkpointing: pit_ti_224 has none",
        ),
        ({"opt": "adamm"}, "adamm"),
        ({"opt": "adahessian"}, "opt: expected one that needs no second derivatives, got adahessian"),
        ({"opt": "lookahead_adahessian"}, "opt: expected one that needs no second derivatives, got lookahead_adahess"),
        ({"sched": "cosinus"}, "cosinus"),
        (
            {"sched": "none", "epochs": 2, "warmup_epochs": 1},
            "warmup_epochs: expected 0 with sched none, which has no warm-up",
        ),
        ({"box_grid": 5}, "box_grid: expected a divisor of the 16 pixels"),
        ({"box_grid": 8}, "box_grid: expected at most a third of the 16 pixels of an image, got 8"),
        ({"device": "cuda:99"}, "device: cannot use 'cuda:99'"),
        ({"device": "abacus"}, "device: cannot use 'abacus'"),
    ],
)
def test_what_cannot_be_run_is_a_usage_error(tmp_path, values, message):
    with pytest.raises(UsageError, match=message):
        Trainer(tiny(tmp_path, **values))


@pytest.mark.parametrize("sched", ["step", "multistep"])
def test_schedules_by_steps_are_of_the_length_of_the_run(tmp_path, sched):
    config = tiny(tmp_path / "run", sched=sched, lr=1.0, epochs=10, warmup_epochs=0)
    trainer, rates = Trainer(config), []
    for step in range(trainer.total_steps):
        trainer.scheduler.step_update(step)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    of_epochs = rates[:: trainer.steps_per_epoch]
    assert of_epochs == pytest.approx([1.0] * 3 + [0.1] * 3 + [0.01] * 3 + [0.001])


def test_without_mixing_patches_need_not_fit(tmp_path):
    trainer = Trainer(tiny(tmp_path, mixing="none", target="token-labels", mix_patch_size=5, box_grid=5))
    assert trainer.task.teacher is None


def test_a_run_is_never_written_over(tmp_path):
    RunFolder(tiny(tmp_path / "run"))
    with pytest.raises(UsageError, match="expected a new or empty folder"):
        RunFolder(tiny(tmp_path / "run"))


def test_two_runs_in_one_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "20250101-000000")
    first, second = (RunFolder(TrainConfig(**load_recipe("digits"))) for _ in range(2))
    assert str(first.path) == "runs/20250101-000000-vit_tiny_patch16_224-cutmix+tl-align"
    assert second.path != first.path


def test_runs_that_start_at_the_same_time_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Another process makes it after this one looked whether it is there.
    monkeypatch.setattr(Path, "exists", lambda self: False)
    monkeypatch.setattr("time.strftime", lambda form: "now")
    folders = [RunFolder(TrainConfig(**load_recipe("digits"))).path for _ in range(3)]
    assert len(set(folders)) == 3


def test_progress_on_a_terminal_is_a_bar_with_rates_and_the_time_left():
    written = io.StringIO()
    with TrainingProgress(2, 3, Console(file=written, force_terminal=True, width=80)) as progress:
        progress.step_done(1, 2, 1.5, 321.0)
        progress.epoch_done(87.5)
        progress.step_done(2, 4, 1.25, 320.0)
        progress.bar.refresh()
    for text in ("epoch 2/2", "320 images/s", "loss 1.250", "top-1 87.5 %", "left", "━"):
        assert text in written.getvalue()


def test_progress_on_a_dumb_terminal_is_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    written = io.StringIO()
    dumb = Console(file=written, force_terminal=True, width=80)
    with TrainingProgress(2, 3, dumb) as progress:
        progress.last_line -= 3600
        progress.step_done(1, 2, 1.5, 321.0)
        assert written.getvalue().startswith("epoch 1/2  step 2/6  321 images/s  loss 1.500")
    assert written.getvalue().count("\n") == 1
    with ComparisonProgress(dumb) as progress:
        progress.start(2, 0)
        progress.run_done("cutmix", 1.0)
        assert "1/2  cutmix" in written.getvalue()
    assert "━" not in written.getvalue()
