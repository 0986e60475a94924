"""Decode steps over static buffers; here they are repeated, on a GPU replayed from a graph."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from test_slot_engine import STOP, assert_scores_match, make_engine, make_model, request, tokens
from torch.multiprocessing.reductions import StorageWeakRef

from aem_lightning.rollout.cuda_graphs import CudaCapture, DecodeGraphs
from aem_lightning.rollout.slot_engine import SlotEngine


def capture(step):
    """What a graph does, without one: the same step over the same buffers, again and again."""
    step()  # as a warm-up writes
    return step


def with_graphs(engine, graphs):
    engine._model.graphs = graphs
    return engine


def play(engine, count=12, turns=3):
    """Ragged multi-turn episodes: prompts and results by episode and turn."""
    prompts = {str(i): tokens(20 + 3 * (i // 4), i // 4) for i in range(count)}
    played = {}
    for turn in range(turns):
        engine.submit(
            request(key, prompt, 3 + (int(key) + turn) % 9, 0.8, STOP, 10 * int(key) + turn)
            for key, prompt in prompts.items()
        )
        for result in engine.poll(wait_all=True):
            played[result.key, turn] = (prompts[result.key], result)
            added = tokens(4 + turn, int(result.key))
            prompts[result.key] = [*prompts[result.key], *result.tokens, *added]
    return played


@pytest.fixture(scope="module")
def policy():
    return SimpleNamespace(causal_lm=make_model())


def test_static_steps_score_as_teacher_forcing_and_sample_the_same(policy):
    eager = play(make_engine(policy, slots=18))
    graphs = DecodeGraphs(18, 255, capture)
    static = play(with_graphs(make_engine(policy, slots=18), graphs))
    assert len(graphs) > 2
    for place, (prompt, result) in static.items():
        assert result.tokens == eager[place][1].tokens
        assert_scores_match(policy, prompt, result, 0.8)


def test_graphs_outlive_a_sync_unless_the_weights_have_moved(policy):
    engine = with_graphs(make_engine(policy), DecodeGraphs(8, 255, capture))
    graphs, read = engine._model.graphs, (engine._model.cache, engine._model._band)
    engine.sync(policy, 2)
    assert engine._model.graphs is graphs
    # What is captured reads these where they are: freed, they would be other tensors' memory.
    assert engine._model.cache is read[0]
    assert engine._model._band is read[1]
    weight = policy.causal_lm.lm_head.weight
    kept = weight.data
    weight.data = kept.clone()
    engine.sync(policy, 3)
    weight.data = kept
    assert engine._model.graphs is None


def test_a_model_that_went_away_and_came_back_cannot_look_as_if_it_had_not_moved():
    policy = SimpleNamespace(causal_lm=make_model())
    engine = with_graphs(make_engine(policy), DecodeGraphs(8, 255, capture))
    held = [StorageWeakRef(p.untyped_storage()) for p in policy.causal_lm.parameters()]
    for _ in range(2):  # to the CPU and back, as between two stages of a run
        policy.causal_lm._apply(torch.clone)
    # Freed to the last, every address could come back, and buffers would stand elsewhere.
    assert not all(storage.expired() for storage in held)
    engine.sync(policy, 2)
    assert engine._model.graphs is None


def test_a_capture_that_fails_leads_back_to_the_stream_it_came_from(monkeypatch):
    @contextlib.contextmanager
    def stream(other):
        before, current[0] = current[0], other
        try:
            yield
        finally:
            current[0] = before

    class Capturing:
        def __init__(self, graph, pool, stream):
            streams.append(stream)

        def __enter__(self):
            current[0] = made("capture")

        def __exit__(self, *args):
            raise RuntimeError("operation failed due to a previous error during capture")

    def made(name="side"):
        return SimpleNamespace(name=name, wait_stream=lambda other: None)

    current = [made("default")]
    fakes = {"stream": stream, "Stream": made, "graph": Capturing, "CUDAGraph": object}
    for name, fake in {**fakes, "current_stream": lambda: current[0]}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    streams, capture = [], CudaCapture()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="previous error"):
            capture(lambda: None)
        assert current[0].name == "default"
    with pytest.raises(RuntimeError, match="previous error"):
        CudaCapture()(lambda: None)
    # One of each engine's own: torch's default one is shared by all.
    assert streams[0] is streams[1] is not streams[2]


def test_a_step_that_cannot_be_captured_runs_without_and_says_so_once(policy, caplog):
    calls = []

    def fails(step):
        calls.append(step)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    engine = with_graphs(make_engine(policy), DecodeGraphs(8, 255, fails))
    played = play(engine, count=4)
    plain = play(make_engine(policy), count=4)
    assert played == plain
    assert len(calls) == 1
    assert caplog.text.count("cannot be captured") == 1
    assert "not permitted when stream is capturing)" in caplog.text


def test_an_unknown_choice_of_graphs_is_refused():
    with pytest.raises(ValueError, match=r"engine\.cuda_graphs=False is unknown"):
        SlotEngine(cuda_graphs=False)


def test_a_cpu_captures_nothing(policy):
    assert make_engine(policy)._model.graphs is None


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_graphs_on_a_gpu_follow_the_weights_and_score_as_eager_steps(autocast):
    policy = SimpleNamespace(causal_lm=make_model().cuda())
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        engine = SlotEngine(slots=18, max_length=256, bucket=16)
        eager = SlotEngine(slots=18, max_length=256, bucket=16, cuda_graphs="off")
        for version in range(2):
            engine.sync(policy, version)
            eager.sync(policy, version)
            graphed, plain = play(engine), play(eager)
            assert len(engine._model.graphs) > 2
            for (prompt, result), (other_prompt, other) in zip(
                graphed.values(), plain.values(), strict=True
            ):
                if prompt == other_prompt and result.tokens == other.tokens:
                    assert result.logprobs == pytest.approx(
                        other.logprobs, abs=0.1 if autocast else 1e-4
                    )
            same = [graphed[k][1].tokens == plain[k][1].tokens for k in graphed]
            assert sum(same) > (0.5 if autocast else 0.9) * len(same)
            with torch.no_grad():
                for name, parameter in policy.causal_lm.named_parameters():
                    if "lora_B" in name:
                        parameter.add_(torch.randn_like(parameter) * 0.3)
