"""The command line `python -m tlalign_kernels`."""

import re
import subprocess
import sys

import pytest
import torch

from tlalign_kernels import __main__, extension, ops, selftest
from tlalign_kernels.backends import BACKENDS, reference


def test_report_names_versions_devices_and_backends(capsys):
    assert __main__.main([]) == 0
    report = capsys.readouterr().out
    assert torch.__version__ in report
    assert extension.VERSION in report
    for name in BACKENDS:
        assert f"{name} " in report
    if extension.compiled is None:
        assert f"not usable: {extension.missing_reason}" in report
    else:
        assert extension.compiled.build_info()["compiler"] in report


def test_report_asks_for_each_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(BACKENDS["cuda"], "unsupported_reasons", lambda problem: [f"{problem[0]} {problem[-1]}"])
    assert __main__.main([]) == 0
    found = re.findall("  cuda +on (.*)", capsys.readouterr().out)
    assert found == ["cpu: cpu None", "cuda:0: cuda 0", "cuda:1: cuda 1"]


@pytest.mark.skipif(not hasattr(extension.compiled, "cpu_instruction_set"), reason="built without CPU kernels")
def test_report_names_the_instruction_set_of_the_cpu_kernels(capsys, monkeypatch):
    for wanted, shown in (("portable", "portable"), ("sse", "TLALIGN_CPU_ISA: expected one of ")):
        monkeypatch.setenv("TLALIGN_CPU_ISA", wanted)
        assert __main__.main([]) == 0
        assert f"  cpu kernels      {shown}" in capsys.readouterr().out


@pytest.fixture
def two_cases(monkeypatch):
    monkeypatch.setattr(selftest, "CASES", (selftest.Case("small", queries=9, keys=9), selftest.CASES[3]))


def test_selftest_passes(two_cases, capsys):
    assert __main__.main(["selftest", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all checks passed"
    assert sum("reference" in line and " ok," in line for line in lines) == 6


@pytest.mark.parametrize("device", ["meta", "nothing"])
def test_selftest_wants_a_device_that_computes(device, capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main(["selftest", "--device", device])
    assert stop.value.code == 2
    assert f"--device: expected one that computes, got '{device}'" in capsys.readouterr().err


def test_selftest_fails_where_a_backend_is_wrong(two_cases, monkeypatch, capsys):
    class Wrong:
        unsupported_reasons, forward = staticmethod(reference.unsupported_reasons), staticmethod(reference.forward)

        @staticmethod
        def backward(inputs, grad_output, output, log_sum_exp, grad_query, grad_key, *others):
            reference.backward(inputs, grad_output, output, log_sum_exp, grad_query, grad_key, *others)
            grad_key.mul_(1.001)

    monkeypatch.setitem(BACKENDS, "wrong", Wrong)
    monkeypatch.setitem(ops.LAUNCHERS, "wrong", Wrong)
    assert __main__.main(["selftest", "--device", "cpu"]) == 1
    output = capsys.readouterr().out
    assert "FAILED: ['gradient of key']" in output
    assert not any("FAILED" in line for line in output.splitlines() if line.startswith("reference"))


def test_selftest_goes_on_after_a_kernel_that_does_not_start(two_cases, monkeypatch, capsys):
    class Broken:
        unsupported_reasons = staticmethod(reference.unsupported_reasons)

        @staticmethod
        def forward(*arguments):
            raise RuntimeError("no kernel image\nand more")

    for registry in (BACKENDS, ops.LAUNCHERS):
        monkeypatch.setitem(registry, "broken", Broken)
    assert __main__.main(["selftest", "--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("FAILED: RuntimeError: no kernel image") for line in lines) == 6
    assert lines[-1] == "6 cases failed"


def test_models_lists_names_with_reasons(capsys):
    assert __main__.main(["models", "vit_d*wee_patch16_reg1_gap_256"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "0 of 2 models are supported"
    assert "blocks.0: can't follow labels through" in lines[0]
    assert __main__.main(["models", "deit_tiny*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "2 of 2 models are supported"
    assert __main__.main(["models", "VIT_*"]) == 2
    assert "expected one of timm's names, such as 'vit_*', got VIT_*" in capsys.readouterr().err
    assert lines[0].split() == ["deit_tiny_distilled_patch16_224", "supported"]


def test_a_missing_extension_is_said_once():
    code = (
        "import sys, warnings; sys.modules['tlalign_kernels._C'] = None; warnings.simplefilter('always')\n"
        "import tlalign_kernels as tlk, torch\n"
        "tlk.attention(*torch.randn(3, 1, 2, 4, 8).unbind(0))\n"
        "assert tlk.extension.compiled is None\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.count("the compiled extension is missing") == 1


def test_unknown_commands_exit_with_usage():
    with pytest.raises(SystemExit) as stop:
        __main__.main(["nonsense"])
    assert stop.value.code == 2
