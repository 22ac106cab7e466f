"""How programs are captured, kept and dropped; with a stub in the place of the device."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdet.graphs.capture import LRUCache, Program, StaticStep, capture_program
from fastdet.graphs.step import COLUMNS
from fastdet.preserve import preserve_rng, preserve_tensors
from tests.helpers.detectors import small_scene
from tests.helpers.graphs import adamw, assert_same, changed_tensors, clone_state, detector, differ, sgd, trainer


def test_the_least_recently_used_program_is_dropped_first():
    made, dropped = [], []

    def make(key: str) -> Program:
        made.append(key)
        return Program((), lambda: key, {"large": 100}.get(key, 10), lambda: dropped.append(key))

    cache = LRUCache(limit=25)
    assert [cache.get(key, make).run() for key in "abab"] == list("abab")
    assert made == ["a", "b"]
    cache.get("a", make)
    cache.get("c", make)
    assert (dropped, list(cache), cache.nbytes) == (["b"], ["a", "c"], 20)
    cache.get("b", make)
    assert (made, dropped) == (["a", "b", "c", "b"], ["b", "a"])
    cache.get("large", make)
    assert list(cache) == ["large"], "kept although it is above the limit alone"
    cache.clear()
    assert list(cache) == []
    assert sorted(dropped) == ["a", "b", "b", "c", "large"]
    unlimited = LRUCache()
    assert [unlimited.get(str(key), make).run() for key in range(50)] == list(map(str, range(50)))
    assert len(list(unlimited)) == 50


def test_buckets_are_captured_when_used_and_dropped_over_the_limit():
    small, large = (1, 3, 64, 80), (1, 3, 96, 96)
    images, targets = small_scene()
    model = detector(size_buckets=())
    graphed = trainer(model, shape=[large, small])
    for index in (0, 1, 0):
        graphed.step(images[index : index + 1], targets[index : index + 1])
    assert graphed.captured == (large, small)
    total = graphed.nbytes
    assert total > 130_000
    limited = trainer(detector(size_buckets=()), shape=[large, small], memory_limit=130_000)
    for index, kept in ((0, small), (1, large), (0, small)):
        limited.step(images[index : index + 1], targets[index : index + 1])
        assert limited.captured == (kept,)
        assert 0 < limited.nbytes < total
    assert len(limited.losses()) == 3
    limited.recapture()
    assert limited.nbytes == 0


def test_graphs_go_with_their_trainer(monkeypatch):
    """At once, without Python's search for cycles: the memory of graphs is most of what is in use."""

    def captured(step: StaticStep) -> Program:
        return Program(step.inputs, lambda: torch.zeros(len(COLUMNS)), 0, lambda: None)

    monkeypatch.setattr("fastdet.graphs.capture.eager_program", captured)
    graphed = trainer()
    graphed.step(*small_scene())
    kept = weakref.ref(graphed)
    gc.disable()
    try:
        del graphed
        assert kept() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("make", [sgd, adamw])
def test_a_warm_up_leaves_all_as_it_was(make):
    graphed = trainer(make=make, amp=torch.float16)
    graphed.step(*small_scene())
    before, generator = clone_state(graphed), torch.get_rng_state()
    scale = [tensor.clone() for tensor in graphed.loss_scale]
    with preserve_rng(torch.device("cpu")), preserve_tensors([*changed_tensors(graphed), *graphed.loss_scale]):
        graphed.step(*small_scene())
        assert differ(clone_state(graphed), before)
    assert_same(clone_state(graphed), before)
    assert_same(list(graphed.loss_scale), scale)
    assert torch.equal(torch.get_rng_state(), generator)


class StubGraph:
    """Counts instead of replaying."""

    def __init__(self) -> None:
        self.replays, self.resets = 0, 0

    def replay(self) -> None:
        self.replays += 1

    def reset(self) -> None:
        self.resets += 1


def test_a_capture_warms_up_and_puts_back(monkeypatch):
    """The order of a capture, with a stub in the place of the device."""
    stream, graphs, pools = SimpleNamespace(wait_stream=lambda other: None), [], []
    reserved = iter((1000, 1700))

    def graph(stub: StubGraph, pool: object, **_: object) -> Any:
        graphs.append(stub)
        pools.append(pool)
        return nullcontext()

    for name, stub in {
        "current_stream": lambda device: stream,
        "stream": lambda stream: nullcontext(),
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
        "memory_reserved": lambda device: next(reserved),
        "CUDAGraph": StubGraph,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    calls, weight = [], torch.zeros(2)

    def function(x: Tensor) -> Tensor:
        calls.append(float(weight[0]))
        return weight.add_(torch.rand(2) + x)

    generator = torch.get_rng_state()
    program = capture_program(StaticStep(function, [torch.ones(2)], [weight]), stream, pool="shared")
    made_of = weakref.ref(function)
    del function
    assert made_of() is None, "it may refer to what keeps the program"
    assert calls[0] == calls[-1] == 0, "put back before the capture"
    assert len(calls) == 4
    assert torch.equal(torch.get_rng_state(), generator)
    assert program.nbytes == 700 + 8
    version = weight._version
    assert program.run() is program.run()
    assert weight._version == version + 2, "a replay counts as a change"
    assert (len(calls), graphs[0].replays, graphs[0].resets) == (4, 2, 0)
    program.drop()
    assert (graphs[0].resets, pools) == (1, ["shared"])


def test_a_capture_that_fails_leaves_the_callers_stream(monkeypatch):
    """torch's own context of a capture does not come to it then."""
    current, capturing = (
        SimpleNamespace(name=name, wait_stream=lambda other: None) for name in ("caller's", "capture's")
    )
    streams = [current]

    @contextmanager
    def switch(stream: Any) -> Iterator[None]:
        before, streams[-1] = streams[-1], stream
        try:
            yield
        finally:
            streams[-1] = before

    def graph(stub: StubGraph, stream: Any, **_: object) -> Any:
        streams[-1] = stream
        raise RuntimeError("operation not permitted when stream is capturing")

    for name, stub in {
        "current_stream": lambda device: streams[-1],
        "stream": switch,
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
        "memory_reserved": lambda device: 0,
        "CUDAGraph": StubGraph,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    with pytest.raises(RuntimeError, match="not permitted"):
        capture_program(StaticStep(lambda x: x, [torch.ones(2)], ()), capturing)
    assert streams == [current]
