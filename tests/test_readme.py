"""The README's own example runs as it is printed, and its tables have all that can be chosen."""

import re
import typing
from pathlib import Path

import torch

import tlalign_kernels as tlk
from tlalign.config import Mixing, Target

README = Path(__file__).parents[1] / "README.md"


def test_the_loop_and_the_block_in_the_readme_run():
    loop, block, *_ = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    variables = {}
    exec(loop, variables)
    assert variables["loss"].isfinite()
    assert variables["aligned"].ratio.shape == (2, 1)
    assert all(p.grad is not None for p in variables["model"].parameters())
    before = variables["aligned"].ratio
    exec(block, variables)
    assert type(variables["model"].blocks[0]) is variables["AlignedAttentionBlock"]
    assert not torch.equal(variables["aligned"].ratio, before)
    plain = tlk.unpatch_model(variables["model"])(variables["images"])
    torch.testing.assert_close(variables["logits"], plain)


def test_every_mixing_and_target_is_in_the_tables():
    for flag, choices in (("--mixing", Mixing), ("--target", Target)):
        table = README.read_text().split(f"| `{flag}` |")[1].split("\n\n")[0]
        first_cells = "".join(line.split("|")[1] for line in table.splitlines()[2:])
        assert set(re.findall("`(.*?)`", first_cells)) == set(typing.get_args(choices))
