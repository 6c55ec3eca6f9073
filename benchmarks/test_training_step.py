"""Time and peak memory of a training step with aligned labels, beside plain CutMix and beside materialised labels.

`pytest benchmarks/test_training_step.py --benchmark-only -s`. Each measured step follows a step of plain CutMix, which
is timed too, so that a busy machine disturbs both; the median of the ratios is printed and kept in `extra_info`. Memory
is that of a process of its own.
"""

import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from timm.loss import SoftTargetCrossEntropy

import tlalign.models  # noqa: F401 - timm learns of PVT
import tlalign_kernels as tlk

MODELS = [
    ("deit_tiny_patch16_224", 16),
    ("deit_small_patch16_224", 8),
    ("swin_tiny_patch4_window7_224", 8),
    ("pvt_v2_b1", 8),
    ("pvt_tiny", 8),
]
CLASSES, ROUNDS, WARMUP_ROUNDS = 1000, 7, 1
STATUS = Path("/proc/self/status")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class MaterialisedAttention(timm.layers.Attention):
    """Keeps the attention matrix and mixes C-class labels with its head mean, as the official code does."""

    labels = None  # (B, N, C) of the one model that is running

    def forward(self, x, attn_mask=None, is_causal=False):
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        attention = (query * self.scale @ key.transpose(-2, -1)).softmax(dim=-1)
        labels = MaterialisedAttention.labels
        MaterialisedAttention.labels = (attention.detach().mean(dim=1) @ labels + labels) / 2
        return self.proj((attention @ value).transpose(1, 2).reshape(batch, tokens, -1))


def cutmix(model, images, target):
    return None, tlk.mixed_cross_entropy(model(images), target)


def aligned(model, images, target):
    logits, aligned = model(images, target=target)
    return aligned.to_dense(CLASSES), tlk.mixed_cross_entropy(logits, aligned)


def materialised(model, images, target):
    own, partner = torch.nn.functional.one_hot(target.classes, CLASSES).float()[:, None].unbind(2)
    share = torch.cat((target.image_share()[:, None], target.token_share((14, 14), (16, 16))), dim=1)
    MaterialisedAttention.labels = (1 - share) * own + share * partner
    logits = model(images)
    labels = MaterialisedAttention.labels[:, 0]
    return labels, SoftTargetCrossEntropy()(logits, labels)


VARIANTS = {variant.__name__: variant for variant in (cutmix, aligned, materialised)}


def variants_of(name):
    """What can be run: labels are materialised in plain transformers only."""
    return [variant for variant in VARIANTS if variant != "materialised" or name.startswith("deit")]


STEPS = [
    pytest.param(name, batch, VARIANTS[variant], id=f"{name}-{variant}")
    for name, batch in MODELS
    for variant in variants_of(name)
]


def make_step(variant, name, batch):
    """Makes a function that runs one training step of a variant on one fixed batch, and returns its labels."""
    torch.manual_seed(0)
    options = {"attn_layer": MaterialisedAttention} if variant is materialised else {}
    model = timm.create_model(name, **options).to(DEVICE).train()
    if variant is aligned:
        tlk.patch_model(model)
    images = torch.randn(batch, 3, 224, 224, device=DEVICE)
    boxes = torch.tensor([[30, 40, 150, 200]]).expand(batch, 1, 4)
    target = tlk.MixedTarget.from_boxes(torch.randint(0, CLASSES, (batch, 2)), boxes, (224, 224)).to(DEVICE)

    def step():
        model.zero_grad()
        labels, loss = variant(model, images, target)
        loss.backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return labels

    return step


@pytest.mark.parametrize(("name", "batch", "variant"), STEPS)
def test_training_step(benchmark, name, batch, variant):
    step, baseline = make_step(variant, name, batch), make_step(cutmix, name, batch)
    if variant is not cutmix:
        torch.testing.assert_close(step(), make_step(aligned, name, batch)(), rtol=0, atol=1e-5)
    baseline_seconds = []

    def run_baseline():
        start = time.perf_counter()
        baseline()
        baseline_seconds.append(time.perf_counter() - start)

    benchmark.pedantic(step, setup=run_baseline, rounds=ROUNDS, warmup_rounds=WARMUP_ROUNDS)
    pairs = zip(benchmark.stats.stats.data, baseline_seconds[-ROUNDS:], strict=True)
    ratio = statistics.median(own / plain for own, plain in pairs)
    benchmark.extra_info.update(ratio_to_cutmix=ratio, device=DEVICE, threads=torch.get_num_threads())
    print(f"\n{variant.__name__}: {ratio:.2f}x the time of plain CutMix ({name}, batch {batch}, {DEVICE})")


@pytest.mark.skipif(DEVICE == "cpu" and not STATUS.exists(), reason="needs Linux's /proc to tell the peak")
@pytest.mark.parametrize(("name", "batch"), MODELS)
def test_peak_memory(benchmark, name, batch):
    # glibc then gives each tensor pages of its own and takes them back at once: the peak is that of what is alive,
    # without what its heap holds back, which differs by 5 % from run to run.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}

    def measure():
        peaks = {}
        for variant in variants_of(name):
            command = [sys.executable, __file__, variant, name, str(batch)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            peaks[variant] = int(done.stdout)
        return peaks

    peaks = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info.update(peak_bytes=peaks, device=DEVICE)
    ratios = {variant: peak / peaks["cutmix"] for variant, peak in peaks.items()}
    print(
        f"\npeak memory over that of plain CutMix ({name}, batch {batch}, {DEVICE}, {peaks['cutmix'] / 2**20:.0f} MiB):"
    )
    print(", ".join(f"{variant} {ratio:.3f}x" for variant, ratio in ratios.items()))


def peak_memory(step):
    """Bytes that three steps add to the peak of this process, on the CPU; that they have on the GPU at most."""
    if DEVICE == "cuda":
        for _ in range(3):
            step()
        return torch.cuda.max_memory_allocated()

    def peak():
        # Not getrusage: its peak is at least that of the process that started this one.
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())[1])

    before = peak()
    for _ in range(3):
        step()
    return peak() - before


if __name__ == "__main__":
    variant, name, batch = sys.argv[1:]
    print(peak_memory(make_step(VARIANTS[variant], name, int(batch))))
