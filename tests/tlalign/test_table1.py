"""The models of the paper's Table 1 have the parameters and multiply-adds that it states (arXiv 2210.06455)."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import tlalign.models  # noqa: F401 (makes timm know them)


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds"),
    [
        # The table has 1.6 G, which no count of ours comes to: with a quarter of the channels of DeiT-B, DeiT-T has a
        # sixteenth of the multiply-adds of its linear layers (16.7 G), and a quarter of those of its attention (0.7 G)
        # and patch embedding (0.1 G).
        ("deit_tiny_patch16_224", 5.7e6, 1.254e9),
        ("pvt_tiny", 13.2e6, 1.9e9),
        ("deit_small_patch16_224", 22e6, 4.6e9),
        ("pvt_small", 24.5e6, 3.8e9),
        ("swin_tiny_patch4_window7_224", 29e6, 4.5e9),
        ("swin_small_patch4_window7_224", 50e6, 8.8e9),
        ("deit_base_patch16_224", 86e6, 17.5e9),
        ("swin_base_patch4_window7_224", 88e6, 15.4e9),
    ],
)
def test_models_have_the_parameters_and_multiply_adds_of_the_paper(name, parameters, multiply_adds):
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        images = torch.empty(1, 3, 224, 224)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # the counter sees products of matrices, not what fused attention does on the CPU
    with FlopCounterMode(display=False) as counter:
        model(images)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(parameters, rel=0.03)
    # It counts a multiplication and an addition as two.
    assert counter.get_total_flops() / 2 == pytest.approx(multiply_adds, rel=0.03)
