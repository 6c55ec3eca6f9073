"""The README's own example runs as it is printed."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_the_loop_in_the_readme_runs():
    example = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[0]
    variables = {
        "classes": torch.tensor([[3, 7], [7, 3]]),
        "boxes": torch.tensor([[[0, 0, 112, 224]], [[50, 60, 70, 90]]]),
        "images": torch.randn(2, 3, 224, 224),
    }
    exec(example, variables)
    assert variables["loss"].isfinite()
    assert variables["aligned"].ratio.shape == (2, 1)
    assert all(p.grad is not None for p in variables["model"].parameters())
