"""From attach to detach: what an adapter is at the start, that all of it learns, and that it leaves nothing behind."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch
import zoo

import visionpeft as vp
from visionpeft.errors import VisionPEFTError

# What the papers start from where it is not the identity (reference B1, B3, B8). Houlsby's is near it.
START = {**dict.fromkeys(zoo.POINTS[1:], "elsewhere"),
         "ssf": "elsewhere", "pfeiffer": "elsewhere", "vpt": "elsewhere", "houlsby": "near",
         "prefix": "elsewhere", "noah": "elsewhere", "compacter": "near", "rein": "near",
         "binary_lora": "near", "binary_adaptformer": "near"}  # fmt: skip

# Rein changes patch tokens only: the classifier, which reads the class token, does not see those of the last block.
UNSEEN = {"rein": "blocks.1."}

# PointGST's norms come before a weight of zero that comes before another.
STEPS = {"pointgst": 3}

every = pytest.mark.parametrize("case", zoo.CASES, ids=str)


@every
def test_state_at_the_start(case):
    x = zoo.inputs(case.backbone)
    base = zoo.base(case.backbone)
    model, _ = zoo.tune(case, shake=False)
    far = zoo.distance(zoo.see(model, x), base)
    start = START.get(case.method, "identity")
    if start == "elsewhere":
        assert far > 1e-4
    elif start == "near":
        assert 0 < far < 1e-2
    else:
        assert far == 0 if case.exact else far < 1e-5


@every
def test_training_mode_at_the_start_is_the_identity_too(case):
    """BatchNorm stays in eval, so that the frozen part of the model is one and the same function."""
    if case.method in START:
        pytest.skip("starts elsewhere")
    x = zoo.inputs(case.backbone)
    base = zoo.plain(case.backbone).requires_grad_(False).train(not zoo.METHODS[case.method].freezes_statistics)
    reference = zoo.see(base, x)
    model, _ = zoo.tune(case, shake=False)
    far = zoo.distance(zoo.run(model.train(), x).detach(), reference)
    assert far == 0 if case.exact else far < 1e-5


@every
def test_every_tensor_learns_within_two_steps_and_nothing_else_moves(case):
    x = zoo.inputs(case.backbone)
    model, tuner = zoo.tune(case, shake=False)
    model.train()
    learnt = {id(p) for p in tuner.parameters()}
    frozen = {k: v.clone() for k, v in model.state_dict(keep_vars=True).items() if id(v) not in learnt}
    optimiser = torch.optim.SGD(tuner.parameters(), lr=0.05)
    reached: set[str] = set()
    for _ in range(STEPS.get(case.method, 2)):
        reached |= {name for name, grad in zoo.gradients(model, tuner, x).items() if grad.abs().sum() > 0}
        optimiser.step()
    names = {name for name, p in model.named_parameters() if id(p) in learnt}
    assert {n for n in names - reached if not n.startswith(UNSEEN.get(case.method, " "))} == set()
    assert all(p.grad is None for p in model.parameters() if id(p) not in learnt)
    if zoo.METHODS[case.method].freezes_statistics:
        now, own = model.state_dict(), (".block.mean", ".block.var")  # BatchNorms of IDPT and Point-PEFT's own
        assert [k for k, v in frozen.items() if not torch.equal(v, now[k]) and not k.endswith(own)] == []


@every
def test_only_what_learns_requires_grad(case):
    model, tuner = zoo.tune(case)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in tuner.parameters()}
    own = {id(p): p.numel() for adapter in tuner.adapters.values() for p in adapter.parameters()}
    if own:
        learnt = {id(p): p.numel() for key in tuner.in_place if key not in tuner.trained for p in [tuner.learnt(*key)]}
        assert tuner.num_parameters == sum((own | learnt).values())


@every
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_detach_restores_everything(case, mode):
    x = zoo.inputs(case.backbone)
    model = zoo.plain(case.backbone)
    base = zoo.see(model, x)
    model.train(mode == "train")
    next(model.parameters()).requires_grad_(False)
    before = zoo.snapshot(model)
    _, tuner = zoo.tune(case, model)
    for _ in range(2):
        zoo.step(model, tuner, x)
    tuner.detach()
    zoo.assert_same(before, zoo.snapshot(model))
    assert not any("peft" in name for name, _ in model.named_modules())
    assert vp.tuners(model) == {}
    assert torch.equal(base, zoo.see(model.eval(), x))


@every
def test_detach_after_the_mode_changed_leaves_the_new_mode(case):
    """Modes set after attach are the user's wish: BatchNorms follow the model, as if they had never been frozen."""
    model = zoo.plain(case.backbone).eval()
    _, tuner = zoo.tune(case, model)
    model.train()
    tuner.detach()
    assert all(module.training for module in model.modules())


@every
def test_attach_after_detach_starts_afresh(case):
    model, tuner = zoo.tune(case)
    first = zoo.see(model, zoo.inputs(case.backbone))
    tuner.detach()
    _, again = zoo.tune(case, model)
    assert torch.equal(first, zoo.see(model, zoo.inputs(case.backbone)))
    assert again.num_parameters == tuner.num_parameters or not tuner.adapters


@every
def test_base_keys_stay_and_a_base_checkpoint_loads_strictly(case):
    original = zoo.plain(case.backbone).state_dict()
    model, tuner = zoo.tune(case, train=False)
    keys = list(model.state_dict())
    assert [k for k in keys if k in original] == list(original)
    assert all("peft" in k.split(".") for k in keys if k not in original)
    x = zoo.inputs(case.backbone)
    y = zoo.see(model, x)
    result = model.load_state_dict(original, strict=True)
    assert result.missing_keys == [] and result.unexpected_keys == []
    expected = zoo.base(case.backbone) if not tuner.adapters else y
    if tuner.adapters and tuner.in_place:  # what learns in place is as in the checkpoint, the adapters are as they were
        other, theirs = zoo.tune(case, train=False)
        with torch.no_grad():
            for path, name in theirs.in_place:
                theirs.learnt(path, name).copy_(original[f"{path}.{name}".lstrip(".")])
        expected = zoo.see(other, x)
    far = zoo.distance(zoo.see(model, x), expected)
    assert far == 0 if case.exact else far < 1e-5
    with pytest.raises(RuntimeError, match="Missing key|Unexpected key"):
        model.load_state_dict({"nonsense": torch.zeros(1)}, strict=True)
    tuner.detach()
    assert torch.equal(zoo.see(model, x), zoo.see(zoo.plain(case.backbone), x))


@every
def test_its_own_checkpoint_loads_strictly(case):
    x = zoo.inputs(case.backbone)
    model, _ = zoo.tune(case)
    other, tuner = zoo.tune(case, shake=False)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(zoo.see(other, x), zoo.see(model, x))
    if tuner.adapters:
        state = model.state_dict()
        lost = next(k for k in state if "peft" in k)
        del state[lost]
        if any(lost.rpartition(".")[0] in k for k in state):  # part of an adapter is there, part is missing
            with pytest.raises(RuntimeError, match="Missing key"):
                other.load_state_dict(state, strict=True)


@every
def test_training_with_gradients_equals_eval_without(case):
    if not zoo.METHODS[case.method].freezes_statistics and case.backbone in (
        "resnet", "efficientnet", "points"
    ) or case.method in ("idpt", "point_peft"):  # fmt: skip
        pytest.skip("BatchNorm is a different function in training")
    x = zoo.inputs(case.backbone)
    model, _ = zoo.tune(case)
    quiet = zoo.see(model.eval(), x)
    loud = zoo.run(model.train(), x)
    assert loud.requires_grad
    far = zoo.distance(loud.detach(), quiet)
    # Attention takes other kernels where a position bias learns, in the plain model too.
    assert far == 0 if case.exact and case.method != "full" else far < 1e-5


@every
def test_dropout_acts_in_training_only(case):
    """Adapters take the mode of the model that they are put on; nobody has to call eval() again."""
    if "dropout" not in {f.name for f in dataclasses.fields(zoo.METHODS[case.method])}:
        pytest.skip("no dropout")
    if case.method == "lora" and case.backbone in ("efficientnet", "bit", "nfnet", "resnet"):
        pytest.skip("refused by name where only the weight can be adapted")
    x = zoo.inputs(case.backbone)
    model, _ = zoo.tune(case, dropout=0.5)
    quiet = zoo.see(model, x)
    assert torch.equal(quiet, zoo.see(model, x))
    assert torch.equal(quiet, zoo.see(zoo.tune(case)[0], x))
    model.train()
    assert not torch.equal(zoo.see(model, x), zoo.see(model, x))
    torch.manual_seed(1)
    first = zoo.see(model, x)
    torch.manual_seed(1)
    assert torch.equal(first, zoo.see(model, x))


@every
def test_saved_and_loaded_into_a_fresh_model_it_is_the_same(case, tmp_path):
    x = zoo.inputs(case.backbone)
    model, tuner = zoo.tune(case)
    y = zoo.see(model, x)
    path = tmp_path / "adapter.safetensors"
    tuner.save(path, licence="none", classes=["cat", "dog"])
    assert vp.state.read_header(path)["metadata"] == {"licence": "none", "classes": ["cat", "dog"]}
    assert torch.equal(y, zoo.see(model, x))
    fresh = zoo.plain(case.backbone)
    before = zoo.snapshot(fresh)
    loaded = vp.load(fresh, path)
    assert torch.equal(y, zoo.see(fresh, x))
    assert loaded.num_parameters == tuner.num_parameters and loaded.method.key == case.method
    assert {k: v.shape for k, v in loaded.state_dict().items()} == {k: v.shape for k, v in tuner.state_dict().items()}
    loaded.detach()
    zoo.assert_same(before, zoo.snapshot(fresh))


@every
def test_its_state_dict_goes_round(case):
    x = zoo.inputs(case.backbone)
    model, tuner = zoo.tune(case)
    other, second = zoo.tune(case, shake=False)
    second.load_state_dict(tuner.state_dict())
    assert torch.equal(zoo.see(model, x), zoo.see(other, x))
    state = {k: v.clone() for k, v in tuner.state_dict().items()}
    first = next(iter(state))
    y = zoo.see(other, x)
    for wrong in ({k: v for k, v in state.items() if k != first}, {**state, "foreign": state[first]},
                  {**state, first: torch.zeros(99, 99)}):  # fmt: skip
        with pytest.raises(VisionPEFTError, match="foreign|" + first.replace(".", r"\.")):
            second.load_state_dict(wrong)
    assert torch.equal(y, zoo.see(other, x))


@every
def test_foreign_hooks_survive_and_fire(case):
    x = zoo.inputs(case.backbone)
    model = zoo.plain(case.backbone)
    fired: list[str] = []
    for path, module in model.named_modules():
        module.register_forward_pre_hook(lambda m, i, path=path: fired.append(f"before {path}"))
        module.register_forward_hook(lambda m, i, o, path=path: fired.append(f"after {path}"))
    zoo.run(model, x)
    in_base = set(fired)
    before = zoo.snapshot(model)
    _, tuner = zoo.tune(case, model)
    fired.clear()
    zoo.run(model, x)
    assert in_base <= set(fired)
    tuner.detach()
    zoo.assert_same(before, zoo.snapshot(model))


@every
def test_the_model_is_freed(case):
    model, tuner = zoo.tune(case)
    zoo.step(model, tuner, zoo.inputs(case.backbone))
    other, kept = zoo.tune(case)
    refs = [weakref.ref(model), weakref.ref(other)]
    kept.detach()
    adapters = [weakref.ref(a) for a in kept.adapters.values()]
    del model, tuner, other, kept
    gc.collect()
    assert [r() for r in refs] == [None, None]
    assert all(a() is None for a in adapters)


@every
def test_no_input_is_kept_after_the_forward(case):
    """Taps of residual branches hold the stream only while the block runs, also if the block fails."""
    model, _ = zoo.tune(case)
    x = tuple(t.clone() for t in zoo.inputs(case.backbone))
    zoo.see(model, x)
    taps = [getattr(m, "tap", None) for m in model.modules()]
    assert all(t.x is None for t in taps if t is not None)


def test_a_failing_block_leaves_no_tap_behind():
    model, tuner = zoo.tune(zoo.Case("adaptformer", "vit"))

    def fail(*_):
        raise ZeroDivisionError

    handle = model.blocks[1].mlp.fc2.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        zoo.see(model, zoo.inputs("vit"))
    assert all(a.tap.x is None for a in tuner.adapters.values())
    handle.remove()
    zoo.see(model, zoo.inputs("vit"))
