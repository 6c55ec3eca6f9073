"""`tune`: what it times, what "auto" does afterwards, and the file it keeps."""

import contextlib
import json
import sys
import time

import pytest
import torch

import tlalign_kernels as tlk
from tlalign_kernels import backends
from tlalign_kernels.backends import cpu, reference

tuning = sys.modules["tlalign_kernels.tuning"]

PROBLEM = backends.Problem("cpu", torch.float32, 1, 1, 1, 1, 8, 0, None, False, False, 0.0, False)
pytestmark = pytest.mark.skipif(bool(cpu.unsupported_reasons(PROBLEM)), reason="needs two backends on the CPU")


@pytest.fixture(autouse=True)
def untuned(monkeypatch):
    monkeypatch.setattr(tuning, "TUNED", {})
    monkeypatch.setattr(backends, "TUNED", tuning.TUNED)
    monkeypatch.setattr(tuning, "_RUNS", 3)


def step(batch=2, tokens=9, dtype=torch.float32, **options):
    qkv = torch.randn(batch, tokens, 3, 2, 16, dtype=dtype, requires_grad=True)
    output, _ = tlk.attention_qkv(qkv, torch.rand(batch, tokens, 1), **options)
    output.sum().backward()
    return qkv.grad


def explain(tokens=9, batch=2, backend="auto"):
    query = torch.randn(batch, 2, tokens, 16)
    return tlk.explain(query, query, query, torch.rand(batch, tokens, 1), backend=backend)


def slow(monkeypatch, module):
    forward = module.forward

    def slowed(*args):
        time.sleep(0.2)
        forward(*args)

    monkeypatch.setattr(module, "forward", slowed)


@pytest.mark.parametrize(("loser", "winner"), [(cpu, "reference"), (reference, "cpu")], ids=["reference", "cpu"])
def test_auto_takes_the_fastest_whatever_the_batch(monkeypatch, loser, winner):
    slow(monkeypatch, loser)
    choice, *others = tlk.tune(step)
    assert others == []
    assert choice.backend == winner
    assert set(choice.milliseconds) == {"cpu", "reference"}
    assert choice.failures == {}
    for batch in (2, 5):
        assert (explain(batch=batch).backend, explain(batch=batch).is_tuned) == (winner, True)
    assert (explain(tokens=10).backend, explain(tokens=10).is_tuned) == ("cpu", False)
    assert f"backend: {winner} (by tune)" in str(explain())
    # Who asks for a backend gets it.
    assert (explain(backend="cpu").backend, explain(backend="cpu").is_tuned) == ("cpu", False)


def test_calls_take_the_choice(monkeypatch):
    slow(monkeypatch, cpu)
    tlk.tune(step)
    monkeypatch.setattr(cpu, "forward", None)
    step()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda qkv: tlk.attention_qkv(qkv, torch.rand(2, 9, 1))[0], fullgraph=True, backend="eager"
    )
    compiled(torch.randn(2, 9, 3, 2, 16))


def test_a_choice_gives_way_where_it_can_not_do_the_call(monkeypatch):
    slow(monkeypatch, cpu)
    tlk.tune(step)
    assert (explain().backend, explain().is_tuned) == ("reference", True)
    monkeypatch.setattr(reference, "unsupported_reasons", lambda problem: ["not today"])
    assert (explain().backend, explain().is_tuned) == ("cpu", False)


def test_a_step_is_timed_with_its_gradient_if_a_forward_without_comes_first():
    def steps():
        with torch.no_grad():
            tlk.attention_qkv(torch.randn(2, 9, 3, 2, 16), torch.rand(2, 9, 1))
        step()

    (choice,) = tlk.tune(steps)
    assert "needs_gradient=True" in choice.problem


def test_each_class_of_problems_is_timed_once():
    def steps():
        for batch, tokens in ((2, 9), (3, 9), (2, 10)):
            step(batch, tokens)
        with torch.no_grad():
            tlk.attention_qkv(torch.randn(2, 9, 3, 2, 16), torch.rand(2, 9, 1))
        tlk.attention(torch.randn(2, 2, 5, 16), torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 16), dropout_p=0.5)

    choices = tlk.tune(steps)
    described = [tuple(word in choice.problem for word in ("queries=9", "queries=10", "keys=7")) for choice in choices]
    assert described == [(True, False, False), (False, True, False), (False, False, True)]
    assert ["needs_gradient=True" in choice.problem for choice in choices] == [True, True, False]


def test_bias_mask_and_autocast_are_timed_as_they_are():
    def biased():
        with torch.autocast("cpu", torch.bfloat16):
            step(bias=torch.randn(2, 9, 9, requires_grad=True), mask=torch.ones(9, 9, dtype=torch.bool))

    (choice,) = tlk.tune(biased)
    assert choice.failures == {}
    assert "dtype=torch.bfloat16" in choice.problem
    assert "has_bias=True has_mask=True" in choice.problem


def test_each_configuration_is_timed_and_only_the_choice_is_left(monkeypatch):
    preferred, forward = [], cpu.forward

    @contextlib.contextmanager
    def preferences_kept():
        before = preferred.copy()
        yield
        preferred[:] = before

    def configured(*args):
        time.sleep(0.1 if preferred[-1:] == [("slow",)] else 0)
        forward(*args)

    monkeypatch.setattr(cpu, "configurations", lambda problem: [("slow",), ("fast",)], raising=False)
    monkeypatch.setattr(cpu, "prefer", lambda problem, configuration: preferred.append(configuration), raising=False)
    monkeypatch.setattr(cpu, "preferences_kept", preferences_kept, raising=False)
    monkeypatch.setattr(cpu, "forward", configured)
    slow(monkeypatch, reference)
    (choice,) = tlk.tune(step)
    assert (choice.backend, choice.configuration) == ("cpu", ("fast",))
    assert choice.milliseconds["cpu, slow"] > 100
    assert preferred == [("fast",)]


def test_modes_around_the_call_of_tune_are_not_those_of_the_step(monkeypatch):
    dtypes, forward = set(), cpu.forward

    def recorded(inputs, *args):
        dtypes.add(inputs.query.dtype)
        forward(inputs, *args)

    def in_modes_of_its_own():
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            step()

    monkeypatch.setattr(cpu, "forward", recorded)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (choice,) = tlk.tune(in_modes_of_its_own)
    assert choice.failures == {}
    assert dtypes == {torch.float32}


def test_windows_are_timed_on_the_maps_of_the_step(monkeypatch):
    shapes, forward = set(), cpu.window_forward

    def recorded(inputs, *args):
        shapes.add(tuple(inputs.qkv.shape))
        forward(inputs, *args)

    monkeypatch.setattr(cpu, "window_forward", recorded)
    qkv = torch.randn(2, 6, 9, 3, 2, 16)
    tlk.tune(lambda: tlk.window_attention(qkv, torch.rand(2, 6, 9, 1), window_size=(3, 3), shift=(1, 1)))
    assert shapes == {tuple(qkv.shape)}


def test_the_random_state_stays():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    tlk.tune(lambda: step(dropout_p=0.5))
    assert torch.equal(torch.rand(4), expected)


def test_what_is_in_the_cache_is_not_timed_again(monkeypatch, tmp_path):
    cache = tmp_path / "choices" / "tuned.json"
    first = tlk.tune(step, cache=cache)
    other = tlk.tune(lambda: step(tokens=10), cache=cache)
    tuning.TUNED.clear()
    monkeypatch.setattr(tuning, "_time_all", None)
    assert tlk.tune(lambda: (step(), step(tokens=10)), cache=cache) == first + other
    assert explain().is_tuned
    assert [path.name for path in cache.parent.iterdir()] == ["tuned.json"]
    # Elsewhere they are worth nothing.
    monkeypatch.setattr(tuning, "_environment", lambda problem: "another machine")
    with pytest.raises(TypeError, match="not callable"):
        tlk.tune(step, cache=cache)


def test_a_choice_that_is_no_longer_there_is_made_again(tmp_path):
    cache = tmp_path / "tuned.json"
    tlk.tune(step, cache=cache)
    stored = json.loads(cache.read_text())
    for choices in stored.values():
        choices[0]["backend"] = "abacus"
    cache.write_text(json.dumps(stored))
    (choice,) = tlk.tune(step, cache=cache)
    assert choice.backend in ("cpu", "reference")
    assert "abacus" not in cache.read_text()


def test_choices_are_kept_as_soon_as_they_are_made_beside_those_of_another_process(monkeypatch, tmp_path):
    cache = tmp_path / "tuned.json"
    time_all = tuning._time_all

    def interrupted(problem):
        if problem.queries == 10:
            monkeypatch.setattr(tuning, "_time_all", time_all)
            tlk.tune(lambda: step(tokens=11), cache=cache)  # another process
            raise KeyboardInterrupt
        return time_all(problem)

    monkeypatch.setattr(tuning, "_time_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tlk.tune(lambda: (step(), step(tokens=10)), cache=cache)
    (stored,) = json.loads(cache.read_text()).values()
    assert [" queries=9 " in choice["problem"] for choice in stored] == [True, False]
    assert " queries=11 " in stored[1]["problem"]


def test_a_cache_that_has_all_need_not_be_written(monkeypatch, tmp_path):
    cache = tmp_path / "tuned.json"
    expected = tlk.tune(step, cache=cache)
    monkeypatch.setattr(tuning, "_add", None)
    assert tlk.tune(step, cache=cache) == expected


@pytest.mark.parametrize("text", ["", "[]", '{"here": [{"backend": "cpu"}]}', '{"here": 3}'])
def test_a_file_that_is_no_cache_is_refused_and_kept(tmp_path, text):
    cache = tmp_path / "notes.json"
    cache.write_text(text)
    with pytest.raises(ValueError, match=r"cache: expected a file that tune has written, got .*notes\.json"):
        tlk.tune(step, cache=cache)
    assert cache.read_text() == text


def test_a_cache_that_cannot_be_written_is_an_error_before_anything_is_timed(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(tuning, "_time_all", None)
    with pytest.raises(OSError, match="file"):
        tlk.tune(step, cache=tmp_path / "file" / "tuned.json")


@pytest.mark.parametrize("failing", [["cpu"], ["cpu", "reference"]], ids=len)
def test_a_candidate_that_fails_is_reported_and_not_taken(monkeypatch, failing):
    runner = tuning._runner

    def fails(problem):
        run = runner(problem)

        def run_or_fail(backend):
            if backend in failing:
                raise torch.OutOfMemoryError("too large")
            run(backend)

        return run_or_fail

    monkeypatch.setattr(tuning, "_runner", fails)
    if len(failing) == 2:
        with pytest.raises(RuntimeError, match=r"no candidate can run .*too large"):
            tlk.tune(step)
        assert not explain().is_tuned
    else:
        (choice,) = tlk.tune(step)
        assert choice.backend == "reference"
        assert choice.failures == {"cpu": "OutOfMemoryError: too large"}


def test_a_step_without_attention_is_refused():
    with pytest.raises(TypeError, match="step: expected a function, got int"):
        tlk.tune(5)
    with pytest.raises(ValueError, match="step: expected calls of attention with backend='auto', got none"):
        tlk.tune(lambda: step(backend="cpu"))


def test_threads_and_the_version_of_torch_are_part_of_the_environment(monkeypatch):
    told = {tuning._environment(PROBLEM)}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    told.add(tuning._environment(PROBLEM))
    monkeypatch.setattr(torch, "__version__", "0.0")
    told.add(tuning._environment(PROBLEM))
    assert len(told) == 3


def test_how_float32_is_multiplied_is_part_of_the_environment_of_a_gpu(monkeypatch):
    problem = PROBLEM._replace(device_type="cuda", device_index=1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    told = []
    for precision in ("ieee", "tf32"):
        monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", precision)
        told.append(tuning._environment(problem))
    assert told[0] != told[1] and told[0].startswith("GPU 1, ")


def test_what_runs_on_a_gpu_is_timed_on_that(monkeypatch):
    current = []

    @contextlib.contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(tuning, "_candidates", lambda problem: {"cuda": ("cuda", None)})
    monkeypatch.setattr(tuning, "_time_in_turn", lambda problem, candidates: ({"cuda": [float(*current)]}, {}))
    problems = [PROBLEM._replace(device_type="cuda", device_index=index) for index in (1, 3)]
    choices = [tuning._time_all(problem) for problem in problems]
    assert [choice.milliseconds["cuda"] for choice in choices] == [1000, 3000]
    assert choices[0].problem == choices[1].problem and not current
    # So is what the ranks tell one another.
    told = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda said, src: told.append(list(current)))
    monkeypatch.setattr(tuning, "_problems_of", lambda step: problems[1:])
    monkeypatch.setattr(tuning, "_find", lambda problems, cache: choices[1:])
    assert tlk.tune(step) == choices[1:] and told == [[3]]
