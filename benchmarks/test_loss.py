"""Time from pixels to the loss without a network: mixing a batch, its target, and the cross entropy of some logits.

`pytest benchmarks/test_loss.py --benchmark-only`. Ours is `tlalign.mixing` and `mixed_cross_entropy`, which has no
target of all classes; the other is timm's `Mixup` and `SoftTargetCrossEntropy`, whose CutMix pastes into the batch that
it is given, where ours makes another. Before it is timed, each is held against the pixels: from images of one colour
each it can be read off who is where, and what the loss has to be.
"""

import pytest
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy

import tlalign_kernels as tlk
from benchmarks.racing import DEVICE
from tlalign.mixing import CutMix, MixUp

SIDE, SMOOTHING = 224, 0.1
IMAGES = 64 if DEVICE == "cpu" else 256
OURS, TIMM = "ours", "timm"
CASES = {
    "CutMix, 1000 classes": (CutMix, 1000),
    "MixUp, 1000 classes": (MixUp, 1000),
    "CutMix, 21841 classes": (CutMix, 21841),
}


def make_run(which, strategy, classes):
    """Makes a function of images, class ids and logits that returns mixed images and the loss."""
    if which == OURS:
        mix = strategy(alpha=1.0)

        def run(images, ids, logits):
            mixed, target = mix(images, ids)
            return mixed, tlk.mixed_cross_entropy(logits, target, SMOOTHING)

        return run
    alphas = dict(mixup_alpha=0.0, cutmix_alpha=1.0) if strategy is CutMix else dict(mixup_alpha=1.0, cutmix_alpha=0.0)
    mix = Mixup(**alphas, label_smoothing=SMOOTHING, num_classes=classes)

    def run(images, ids, logits):
        mixed, target = mix(images, ids)
        return mixed, SoftTargetCrossEntropy()(logits, target)

    return run


def what_is_wrong(run, classes):
    """Empty if the loss is that of the mixture that the pixels show."""
    images = 8
    coloured = torch.arange(images, device=DEVICE).float().view(-1, 1, 1, 1).expand(-1, 3, SIDE, SIDE).contiguous()
    ids = torch.arange(images, device=DEVICE) * 3
    logits = torch.randn(images, classes, device=DEVICE)
    mixed, loss = run(coloured, ids, logits)
    own, partner = (torch.arange(images, device=DEVICE).double(), torch.arange(images - 1, -1, -1, device=DEVICE))
    ratio = (mixed.double().mean(dim=(1, 2, 3)) - own) / (partner - own)
    target = torch.zeros(images, classes, dtype=torch.float64, device=DEVICE)
    target.scatter_add_(1, ids[:, None], 1 - ratio[:, None])
    target.scatter_add_(1, ids.flip(0)[:, None], ratio[:, None])
    target = target * (1 - SMOOTHING) + SMOOTHING / classes
    exact = -(target * logits.double().log_softmax(dim=1)).sum(dim=1).mean()
    error = abs(float(loss) - float(exact))
    return "" if error < 1e-5 * float(exact) else f"wrong: its loss is off by {error:.2g}"


@pytest.mark.parametrize("name", CASES)
def test_mixing_and_loss(race, name):
    strategy, classes = CASES[name]
    images = torch.randn(IMAGES, 3, SIDE, SIDE, device=DEVICE)
    ids = torch.randint(0, classes, (IMAGES,), device=DEVICE)
    logits = torch.randn(IMAGES, classes, device=DEVICE, requires_grad=True)
    runs, left_out = {}, {}
    for which in (OURS, TIMM):
        run = make_run(which, strategy, classes)
        if wrong := what_is_wrong(run, classes):
            left_out[which] = wrong
        else:
            runs[which] = lambda run=run: torch.autograd.grad(run(images, ids, logits)[1], logits)
    assert OURS not in left_out, left_out
    race(runs, left_out, level="mixing and loss", row=f"{name}: B={IMAGES}, {SIDE}x{SIDE}")
