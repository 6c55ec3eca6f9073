"""Properties of the operator that hold for inputs of any shape."""

import torch

import tlalign_kernels as tlk
from tlalign_kernels.selftest import Case, make_inputs, run_operator


def call(inputs, **changes):
    """Attention of a case's inputs, some of them changed."""
    arguments = {name: tensor for name, tensor in inputs.items() if name != "grad_output"}
    return tlk.attention(**{**arguments, **changes})


def check_heads_may_be_permuted(case: Case, backend: str, seed: int) -> None:
    """Permuting heads permutes the output, and leaves labels alone."""
    inputs = make_inputs(case, "cpu", torch.float32, seed)
    order = torch.randperm(case.heads, generator=torch.Generator().manual_seed(seed))
    output, share = call(inputs, backend=backend)
    permuted = {name: inputs[name][:, order] for name in ("query", "key", "value")}
    permuted["bias"] = None if inputs["bias"] is None else inputs["bias"][order]
    permuted_output, permuted_share = call(inputs, **permuted, backend=backend)
    torch.testing.assert_close(permuted_output, output[:, order])
    torch.testing.assert_close(permuted_share, share, rtol=0, atol=1e-6)


def check_labels_never_influence_others(case: Case, backend: str, seed: int, sources: int) -> None:
    """Other labels, also of another number of sources, leave outputs and gradients as they are to the last bit."""
    inputs = make_inputs(case, "cpu", torch.float32, seed)
    first = run_operator(case, inputs, backend)
    other = torch.rand(case.batch, case.keys, sources, generator=torch.Generator().manual_seed(seed))
    second = run_operator(case, {**inputs, "share": other, "residual": None}, backend)
    for name in first.keys() - {"share"}:
        assert torch.equal(first[name], second[name]), name
