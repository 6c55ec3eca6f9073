"""What the benchmarks race computes what the operator does, and what does not is left out and named."""

import dataclasses
from typing import ClassVar

import pytest
import torch

from benchmarks import models, peers, racing
from benchmarks import test_loss as loss

SMALL = {
    "tokens": peers.Problem("tokens", 2, 3, 21, 21, 16, classes=12),
    "several sources": peers.Problem("sources", 2, 3, 21, 21, 16, sources=3, classes=12),
    "reduced keys": peers.Problem("reduced", 2, 3, 21, 9, 16, classes=12),
    "windows": peers.in_windows("windows", 2, 14, 2, 0, torch.float32),
    "shifted windows": peers.in_windows("shifted", 2, 14, 2, 3, torch.float32),
}
PLAIN = {"SDPA", "eager", "SDPA + column", "materialised, share", "materialised, classes"}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", SMALL)
def test_every_peer_is_right(name, backward):
    # In float64 only rounding separates a peer from the reference.
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        problem = dataclasses.replace(SMALL[name], dtype=dtype)
        runs, left_out = peers.contenders(problem, "cpu", backward)
        assert runs.keys() >= PLAIN, (dtype, left_out)
        assert not [reason for reason in left_out.values() if reason.startswith(("wrong", "fails"))], left_out


def test_the_benchmark_is_skipped_without_ours_and_fails_if_ours_is_wrong():
    peers.require_ours({"ours (cuda)": None, "SDPA": None}, {"ours (triton)": "wrong: its output is off"})
    with pytest.raises(pytest.skip.Exception, match="not built"):
        peers.require_ours({"SDPA": None}, {"ours (cpu)": "not built", "FlexAttention": "fails: it"})
    with pytest.raises(AssertionError, match="its output is off"):
        peers.require_ours({"SDPA": None}, {"ours (cpu)": "wrong: its output is off"})


def test_a_race_has_all_run_in_each_round_and_keeps_all_but_the_first(monkeypatch):
    class Benchmark:
        extra_info: ClassVar[dict] = {}

        def pedantic(self, target, rounds):
            for _ in range(rounds):
                target()

    now, log = [0.0], []

    def runner(name, seconds):
        def run():
            log.append(name)
            now[0] += seconds

        return run

    monkeypatch.setattr(racing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(racing, "DEVICE", "cpu")
    before = racing.CLOCK.now
    runs = {"ours": runner("ours", 1.0), "one": runner("one", 2.0), "two": runner("two", 0.5)}
    racing.race(Benchmark(), 3.5 * 20, runs, {"three": "absent"}, level="block", row="B=1", value=4)
    kept = Benchmark.extra_info
    assert kept["seconds"] == {"ours": [1.0] * 20, "one": [2.0] * 20, "two": [0.5] * 20}
    assert (kept["ours"], kept["left_out"], kept["value"]) == ("ours", {"three": "absent"}, 4)
    rounds = [tuple(log[start : start + 3]) for start in range(0, len(log), 3)]
    assert len(rounds) == 21
    assert all(sorted(of_round) == ["one", "ours", "two"] for of_round in rounds)
    assert len(set(rounds)) > 3  # in random order
    assert racing.CLOCK.now - before == pytest.approx(21)

    racing.race(Benchmark(), 0.1, runs, {}, level="block", row="B=1")
    assert len(kept["seconds"]["ours"]) == racing.MIN_ROUNDS


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_compiled_peers_are_right(backward):
    problem = dataclasses.replace(SMALL["tokens"], is_compiled=True)
    runs, left_out = peers.contenders(problem, "cpu", backward)
    flex = set() if backward else {"FlexAttention", "FlexAttention + column"}
    assert runs.keys() >= PLAIN | flex | {"compiled, share", "compiled, classes"}, left_out


def test_a_wrong_peer_is_left_out_with_its_error(monkeypatch):
    right = peers._materialised
    monkeypatch.setattr(peers, "_materialised", lambda *inputs: (right(*inputs)[0], right(*inputs)[1] * 1.001))
    runs, left_out = peers.contenders(SMALL["tokens"], "cpu", backward=True)
    assert {"materialised, share", "materialised, classes"}.isdisjoint(runs)
    assert left_out["materialised, share"].startswith("wrong: its share is off by 0.000")
    assert "SDPA" in runs


def test_eager_is_no_excuse_for_itself(monkeypatch):
    right = peers._eager
    monkeypatch.setattr(peers, "_eager", lambda *inputs: (right(*inputs)[0] * 1.1, right(*inputs)[1]))
    runs, left_out = peers.contenders(SMALL["tokens"], "cpu", backward=False)
    assert left_out["eager"].startswith("wrong: its output")
    assert "SDPA" in runs


def test_a_backend_without_right_labels_is_left_out_altogether(monkeypatch):
    right = peers.tlk.attention_qkv

    def wrong(*inputs, backend):
        output, share = right(*inputs, backend=backend)
        return output, share if share is None or backend == "reference" else share + 0.1

    monkeypatch.setattr(peers.tlk, "attention_qkv", wrong)
    _, left_out = peers.contenders(SMALL["tokens"], "cpu", backward=False)
    assert {"ours (cpu)", "ours (cpu), no labels"} <= left_out.keys()


def test_a_wrong_gradient_is_noticed(monkeypatch):
    right = peers.F.scaled_dot_product_attention
    monkeypatch.setattr(
        peers.F, "scaled_dot_product_attention", lambda q, k, v, *a, **o: right(q, k.detach(), v, *a, **o)
    )
    assert "wrong: its gradient of qkv" in peers.contenders(SMALL["tokens"], "cpu", backward=True)[1]["SDPA"]
    assert "SDPA" in peers.contenders(SMALL["tokens"], "cpu", backward=False)[0]


def test_a_peer_that_raises_is_left_out_with_what_it_said():
    def run():
        raise RuntimeError("no kernel\nfor this")

    assert peers.why_not(run, {}, {}) == "fails: RuntimeError: no kernel"
    assert peers.why_not(lambda: {"output": torch.tensor(float("nan"))}, {"output": torch.zeros(())}, {"output": 1.0})


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("deit_tiny_patch16_224:blocks.0", (2, 197, 192)),
        ("swin_tiny_patch4_window7_224:layers.2.blocks.1", (2, 14, 14, 384)),
        ("pvt_tiny:block3.0", (2, 196, 320)),
    ],
)
def test_the_official_way_through_a_block_is_right(monkeypatch, path, shape):
    runs, wrong = models.make_blocks(path, shape, "cpu", torch.float32)
    assert (set(runs), wrong) == (set(models.variants_of(path)), {})

    right = models.DenseLabels.mix

    def without_residual(labels, *arguments):
        before = labels.of_tokens
        right(labels, *arguments)
        labels.of_tokens = 2 * labels.of_tokens - before

    monkeypatch.setattr(models.DenseLabels, "mix", without_residual)
    _, wrong = models.make_blocks(path, shape, "cpu", torch.float32)
    assert set(wrong) == {models.OFFICIAL}
    assert "labels" in wrong[models.OFFICIAL]


@pytest.mark.slow  # whole models in float64
@pytest.mark.parametrize("name", models.MODELS)
def test_the_official_way_through_a_model_is_right(name):
    assert models.check_steps(name, "cpu") == {}


@pytest.mark.parametrize("name", loss.CASES)
@pytest.mark.parametrize("which", [loss.OURS, loss.TIMM])
def test_losses_are_those_of_the_pixels(which, name):
    strategy, classes = loss.CASES[name]
    run = loss.make_run(which, strategy, classes)
    for _ in range(3):
        assert loss.what_is_wrong(run, classes) == ""
    assert "wrong" in loss.what_is_wrong(lambda *inputs: (run(*inputs)[0], run(*inputs)[1] * 1.01), classes)
