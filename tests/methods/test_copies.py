"""Copies are independent, pickles and moves keep the adapter, and every dtype that the base takes the adapter takes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import zoo

import visionpeft as vp

every = pytest.mark.parametrize("case", zoo.CASES, ids=str)


def assert_alone(case: zoo.Case, copied: torch.nn.Module, y: torch.Tensor) -> None:
    """A copy gives y, has a tuner of its own that works, and detaches to the base."""
    x = zoo.inputs(case.backbone)
    assert torch.equal(y, zoo.see(copied, x))
    tuner = vp.tuners(copied)["default"]
    assert {id(p) for p in tuner.parameters()} == {id(p) for p in copied.parameters() if p.requires_grad}
    base = zoo.base(case.backbone)
    with tuner.disabled():
        assert torch.equal(base, zoo.see(copied, x))
    if case.method not in {"linear", *zoo.WHOLE}:
        tuner.scale = 0.5
        assert not torch.equal(y, zoo.see(copied, x))
        tuner.scale = 1.0
    assert torch.equal(y, zoo.see(copied, x))
    zoo.step(copied, tuner, x)
    assert not torch.equal(y, zoo.see(copied, x))
    tuner.detach()
    assert torch.equal(zoo.see(zoo.plain(case.backbone), x), zoo.see(copied, x))
    assert not any("peft" in name for name, _ in copied.named_modules())


@every
def test_a_deep_copy_is_independent(case):
    x = zoo.inputs(case.backbone)
    model, tuner = zoo.tune(case)
    y = zoo.see(model, x)
    copied = copy.deepcopy(model)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in copied.parameters()}
    zoo.disturb(tuner, seed=5)
    z = zoo.see(model, x)
    assert not torch.equal(z, y)
    assert_alone(case, copied, y)
    assert torch.equal(z, zoo.see(model, x))
    other = copy.deepcopy(model)
    tuner.detach()
    assert_alone(case, other, z)


@every
def test_an_average_of_weights_is_independent(case):
    from timm.utils import ModelEmaV3

    x = zoo.inputs(case.backbone)
    model, tuner = zoo.tune(case)
    y = zoo.see(model, x)
    ema = ModelEmaV3(model, decay=0.5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    zoo.disturb(tuner, seed=5)
    assert torch.equal(y, zoo.see(ema.module, x))
    ema.update(model)
    after, averaged = model.state_dict(), ema.module.state_dict()
    for key, value in averaged.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (before[key] + after[key]) / 2)
    assert not torch.equal(y, zoo.see(ema.module, x))
    assert not torch.equal(zoo.see(model, x), zoo.see(ema.module, x))


@every
def test_pickle_and_torch_save_keep_the_adapter(case, tmp_path):
    x = zoo.inputs(case.backbone)
    model, _ = zoo.tune(case)
    y = zoo.see(model, x)
    assert_alone(case, pickle.loads(pickle.dumps(model)), y)
    torch.save(model, tmp_path / "model.pt")
    assert_alone(case, torch.load(tmp_path / "model.pt", weights_only=False), y)
    assert torch.equal(y, zoo.see(model, x))


@every
def test_double_precision_and_back(case):
    x = zoo.inputs(case.backbone)
    model, tuner = zoo.tune(case)
    y = zoo.see(model, x)
    model.double()
    tensors = [*model.parameters(), *model.buffers()]
    assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float64}
    wide = zoo.see(model, zoo.inputs(case.backbone, torch.float64))
    assert wide.dtype == torch.float64 and zoo.distance(wide, y.double()) < 1e-4
    zoo.step(model, tuner, zoo.inputs(case.backbone, torch.float64))
    tuner.detach()
    plain = zoo.plain(case.backbone).double()
    assert torch.equal(zoo.see(plain.requires_grad_(False), zoo.inputs(case.backbone, torch.float64)),
                       zoo.see(model.requires_grad_(False), zoo.inputs(case.backbone, torch.float64)))  # fmt: skip


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_models(case, dtype):
    """A base in half precision, adapted and then moved, or moved and then adapted: the output's dtype is the base's."""
    x = zoo.inputs(case.backbone, dtype)
    reference = zoo.see(zoo.tune(case)[0], zoo.inputs(case.backbone))
    noise = zoo.distance(zoo.base(case.backbone, dtype).float(), zoo.base(case.backbone))
    moved, _ = zoo.tune(case)
    moved.to(dtype)
    attached, tuner = zoo.tune(case, zoo.plain(case.backbone, dtype))
    for model in (moved, attached):
        y = zoo.see(model, x)
        assert y.dtype == dtype
        assert zoo.distance(y.float(), reference) < 5 * noise + 0.02
    grads = zoo.gradients(attached, tuner, x)
    assert len(grads) == len(list(tuner.parameters())) and all(g.isfinite().all() for g in grads.values())


@every
def test_meta_models_count_and_run(case):
    """Counting the parameters of a model of any size costs nothing."""
    _, real = zoo.tune(case)
    model, tuner = zoo.tune(case, zoo.plain(case.backbone).to("meta"), shake=False)
    assert tuner.num_parameters == real.num_parameters
    assert all(p.is_meta for p in model.parameters())
    moved, _ = zoo.tune(case)
    shape = zoo.see(moved, zoo.inputs(case.backbone)).shape
    moved.to("meta")
    assert all(t.is_meta for t in [*moved.parameters(), *moved.buffers()])
    x = tuple(t.to("meta") for t in zoo.inputs(case.backbone))
    if case.backbone == "clip":
        return  # its end-of-text position is data
    assert zoo.see(moved, x).shape == shape == zoo.see(model, x).shape


@every
def test_merged_then_moved_then_unmerged(case):
    model, tuner = zoo.tune(case)
    try:
        tuner.merge()
    except vp.errors.MergeError:
        pytest.skip("does not merge")
    model.double()
    tuner.unmerge()
    tensors = [*model.parameters(), *model.buffers()]
    assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float64}
    y = zoo.see(model, zoo.inputs(case.backbone, torch.float64))
    wide, _ = zoo.tune(case)
    assert torch.equal(y, zoo.see(wide.double(), zoo.inputs(case.backbone, torch.float64)))


@torch.no_grad()
def output_dtypes(model: torch.nn.Module, x: tuple[torch.Tensor, ...]) -> dict[str, torch.dtype]:
    """dtype of what every module of the user's returns."""
    seen: dict[str, torch.dtype] = {}

    def note(path):
        return lambda m, i, y: seen.update({path: (y[0] if isinstance(y, tuple) else y).dtype})

    handles = [m.register_forward_hook(note(path)) for path, m in model.named_modules()]
    model(*x)
    for handle in handles:
        handle.remove()
    return seen


@every
def test_bf16_autocast(case):
    """The dtype is that of the plain model under autocast, and so is the accuracy; gradients come in fp32."""
    x = zoo.inputs(case.backbone)
    plain = zoo.plain(case.backbone).requires_grad_(False)
    model, tuner = zoo.tune(case)
    exact, grads = zoo.see(model, x), zoo.gradients(model, tuner, x)

    def rounded(fn, *args):
        with torch.autocast("cpu", torch.bfloat16):  # one each: its cache of weights forgets gradients under no_grad
            return fn(*args)

    dtypes = [rounded(output_dtypes, m, x) for m in (plain, model)]
    both = dtypes[0].keys() & dtypes[1].keys()  # torch's attention does not call its projection while it is plain
    assert {k: dtypes[1][k] for k in both} == {k: dtypes[0][k] for k in both}
    noise = zoo.distance(rounded(zoo.see, plain, x).float(), zoo.base(case.backbone))
    quiet, loud = rounded(zoo.see, model, x), rounded(zoo.run, model, x).detach()
    assert torch.equal(quiet, loud) or zoo.distance(loud.float(), quiet.float()) < 0.02
    slack = 0.03 if case == ("full", "points") else 0.01  # eight numbers of a classifier with other weights
    assert 0 < noise and zoo.distance(quiet.float(), exact) < 4 * noise + slack
    found = rounded(zoo.gradients, model, tuner, x)
    assert set(found) == set(grads)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in found.values())
    flat, flat_found = (torch.cat([g[n].flatten() for n in grads]) for g in (grads, found))
    assert torch.nn.functional.cosine_similarity(flat, flat_found, dim=0) > 0.98
