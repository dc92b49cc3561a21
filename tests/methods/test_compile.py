"""`torch.compile` without a graph break, whole and per block, bound before and after; scales cost one graph at most."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import visionpeft as vp

# Every method on a plain ViT; where qkv is bypassed, on convs, BatchNorms and torch's attention those that go there.
_ELSEWHERE = {("lora", "beit"), ("ssf", "convnext"), ("lora", "efficientnet"), ("bitfit", "efficientnet"),
              ("lora", "encoder"), ("ssf", "encoder"), ("houlsby", "swinv2")}  # fmt: skip
some = pytest.mark.parametrize("case", [c for c in zoo.CASES if c.backbone == "vit" or c in _ELSEWHERE], ids=str)
few = pytest.mark.parametrize("case", [*zoo.on("vit"), zoo.Case("lora", "resnet"), zoo.Case("ssf", "encoder")], ids=str)
blocks = pytest.mark.parametrize("case", [*zoo.on("vit"), zoo.Case("lora", "beit"), zoo.Case("lora", "clip")], ids=str)
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@some
def test_whole_model_bound_before(case):
    x = zoo.inputs(case.backbone)
    model, tuner = zoo.tune(case, train=case.method == "linear")
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert zoo.distance(zoo.see(compiled, x), zoo.see(model, x)) < TOLERANCE
    assert counter.frame_count == 1
    zoo.disturb(tuner, seed=4)  # new values need no new graph
    assert zoo.distance(zoo.see(compiled, x), zoo.see(model, x)) < TOLERANCE
    assert counter.frame_count == 1
    if case.method in {"linear", *zoo.WHOLE}:
        return
    for scale in (0.5, 0.25, 0.75, 2.0):
        tuner.scale = scale
        assert zoo.distance(zoo.see(compiled, x), zoo.see(model, x)) < TOLERANCE
    assert counter.frame_count <= 2, "a scale costs more than one extra graph"
    tuner.scale = 1.0
    assert zoo.distance(zoo.see(compiled, x), zoo.see(model, x)) < TOLERANCE
    assert counter.frame_count <= 2


@few
def test_whole_model_bound_after(case):
    x = zoo.inputs(case.backbone)
    model = zoo.plain(case.backbone)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    base = zoo.see(compiled, x)
    _, tuner = zoo.tune(case, model)
    adapted = zoo.see(compiled, x)
    assert zoo.distance(adapted, base) > 1e-4
    assert zoo.distance(adapted, zoo.see(model, x)) < TOLERANCE
    with tuner.disabled():
        assert zoo.distance(zoo.see(compiled, x), base) < TOLERANCE
    assert zoo.distance(zoo.see(compiled, x), adapted) < TOLERANCE
    tuner.detach()
    assert zoo.distance(zoo.see(compiled, x), base) < TOLERANCE


@few
def test_gradients_of_a_compiled_model(case):
    x = zoo.inputs(case.backbone)
    model, tuner = zoo.tune(case)
    model.train()
    expected = zoo.gradients(model, tuner, x)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    model.zero_grad(set_to_none=True)
    zoo.loss(zoo.run(compiled, x)).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(found) == set(expected)
    scale = max(g.abs().max() for g in expected.values())
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-4 * float(scale))
    assert counter.frame_count == 1


@blocks
@pytest.mark.parametrize("bound", ["before", "after"])
def test_per_block(case, bound):
    """Equal blocks share a graph: however many there are, two are compiled at most (and two more once bound)."""
    x = zoo.inputs(case.backbone)
    model = zoo.plain(case.backbone)
    counter = CompileCounter()
    stack = model.visual.transformer.resblocks if case.backbone == "clip" else model.blocks
    deep = torch.nn.Sequential(*[copy.deepcopy(stack[i % 2]) for i in range(10)])
    if case.backbone == "clip":
        model.visual.transformer.resblocks = torch.nn.ModuleList(deep)
        stack = model.visual.transformer.resblocks
    else:
        stack = model.blocks = deep if case.backbone == "vit" else torch.nn.ModuleList(deep)
    model.requires_grad_(False)

    def compile_all() -> None:
        for block in stack:
            block.compile(fullgraph=True, backend=counter)

    if bound == "after":
        compile_all()
        zoo.see(model, x)
        assert counter.frame_count <= 2
    before = counter.frame_count
    _, tuner = zoo.tune(case, model, train=case.method == "linear")
    if bound == "before":
        compile_all()
    y = zoo.see(model, x)
    assert counter.frame_count - before <= (3 if case.method in {*zoo.WHOLE, "spt"} else 2)  # blocks of three kinds
    with torch.compiler.set_stance("force_eager"):
        eager = zoo.see(model, x)
    assert zoo.distance(y, eager) < TOLERANCE
    assert bound == "before" or case.method == "linear" or counter.frame_count > before, "the binding was ignored"


@pytest.mark.parametrize("case", zoo.on("vit"), ids=str)
@pytest.mark.parametrize("merged", [False, True], ids=["adapted", "merged"])
def test_export(case, merged):
    x = zoo.inputs(case.backbone)
    model, tuner = zoo.tune(case, train=case.method == "linear")
    if merged and not all(a.overrides("weight") for a in tuner.adapters.values()):
        pytest.skip("does not merge")
    if merged:
        tuner.merge()
    exported = torch.export.export(model, x).module()
    assert zoo.distance(zoo.see(exported, x), zoo.see(model, x)) < TOLERANCE


def test_a_second_adapter_after_compiling():
    case = zoo.Case("lora", "vit")
    x = zoo.inputs("vit")
    model, a = zoo.tune(case, name="a", train=False)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    zoo.see(compiled, x)
    _, b = zoo.tune(case, model, name="b", train=False)
    for which in ({"a": 1.0, "b": 1.0}, {"b": 1.0}, {"b": 0.5, "a": 2.0}, {}):
        vp.activate(model, which)
        assert zoo.distance(zoo.see(compiled, x), zoo.see(model, x)) < TOLERANCE


def test_switching_adapters_of_a_kind_needs_no_new_graph():
    """With names in compiled code every adapter would have a graph of its own, and the ninth would run uncompiled."""
    case = zoo.Case("lora", "vit")
    model, _ = zoo.tune(case, name="a0")
    for i in range(1, 4):
        zoo.disturb(zoo.tune(case, model, name=f"a{i}", shake=False)[1], seed=i)
    x = zoo.inputs(case.backbone)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model.eval(), backend=counter, fullgraph=True)
    for name in ("a0", "a1", "a2", "a3", "a0"):
        vp.activate(model, name)
        assert zoo.distance(zoo.see(compiled, x), zoo.see(model, x)) < TOLERANCE
    assert counter.frame_count == 1
