"""Orthogonal Adaptation, SVFit and SHiRA against their formulas in float64, and their counts on Stable Diffusion."""

from __future__ import annotations

import copy

import big_diffusers as big
import pytest
import tiny_diffusers as tiny
import torch
from torch import nn

import visionpeft as vp
from visionpeft.errors import MergeError, MethodError, SiteError
from visionpeft.methods import orthogonal, shira

M = vp.methods


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(10, 7).double()


def attached(method) -> tuple[nn.Linear, vp.Tuner, object]:
    module = layer()
    tuner = vp.attach(module, method, probe=False)
    return module, tuner, next(iter(tuner.adapters.values()))


def check(module: nn.Linear, weight: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    """Output and gradients are those of a Linear of this weight."""
    x = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    y, expected = module(x), x @ weight.T + module.bias
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    found, wanted = (torch.autograd.grad(t.cos().sum(), [x, *leaves], retain_graph=True) for t in (y, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# ---- Orthogonal Adaptation ------------------------------------------------------------------------------------------


def test_orthogonal_adaptation():
    module, tuner, adapter = attached(M.OrthogonalAdaptation(rank=3, targets="linear"))
    assert [n for n, _ in adapter.named_parameters()] == ["a"] and not adapter.a.any()
    nn.init.normal_(adapter.a)
    check(module, module.weight + adapter.a @ adapter.b.T, [adapter.a])


def test_concepts_do_not_hear_one_another():
    """Inputs in the span of one concept's columns are what the other leaves alone, to the last digits."""
    module = nn.Linear(12, 7).double()
    x = torch.randn(5, 12, dtype=torch.float64)
    tuners = [vp.attach(module, M.OrthogonalAdaptation(rank=3, seed=i, targets="linear"), name=f"c{i}", probe=False)
              for i in range(4)]  # fmt: skip
    adapters = [next(iter(t.adapters.values())) for t in tuners]
    for adapter in adapters:
        nn.init.normal_(adapter.a)
    whole = torch.cat([a.b for a in adapters], 1)
    torch.testing.assert_close(whole.T @ whole, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-13)
    for i, one in enumerate(adapters):
        inside = x @ one.b @ one.b.T
        vp.activate(module, f"c{i}")
        alone = module(inside)
        vp.activate(module, {f"c{j}": 1.0 for j in range(4)})
        torch.testing.assert_close(module(inside), alone, rtol=0, atol=1e-12)
        assert float((module(x) - alone).detach().abs().max()) > 0.1


def test_everybody_draws_the_same_matrix():
    assert torch.equal(orthogonal.columns(16, 4, 2), orthogonal.columns(16, 4, 2))
    assert not torch.equal(orthogonal.columns(16, 4, 2, public=1), orthogonal.columns(16, 4, 2))
    torch.testing.assert_close(orthogonal.columns(16, 4, 5), orthogonal.columns(16, 4, 1))  # the count goes round
    with pytest.raises(SiteError, match="10 columns to take and not rank 11"):
        vp.attach(layer(), M.OrthogonalAdaptation(rank=11, targets="linear"))
    with pytest.raises(MethodError, match="seed=-1"):
        M.OrthogonalAdaptation(seed=-1)


# ---- SVFit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [3, 7, 768])
def test_svfit(rank):
    module, tuner, adapter = attached(M.SVFit(rank=rank, targets="linear"))
    u, s, v = torch.linalg.svd(module.weight.detach(), full_matrices=False)
    r = min(rank, 7)
    torch.testing.assert_close(adapter.s.detach(), s[:r])
    x = torch.randn(2, 10, dtype=torch.float64)
    assert torch.equal(module(x), layer()(x))
    nn.init.normal_(adapter.s)
    new = torch.cat([adapter.s, s[r:]])
    check(module, u @ torch.diag(new) @ v, [adapter.s])
    assert list(adapter.state_dict()) == ["s", "start"]


def test_svfit_knows_its_weights(tmp_path):
    """Loaded before it has learnt they are decomposed anew; afterwards, and from a file of others, they are refused."""

    def net(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()

    x, base = torch.randn(3, 6).double(), net(1)
    model = net(0)
    tuner = vp.attach(model, M.SVFit(rank=2, targets="linear"), probe=False)
    model.load_state_dict(base.state_dict())
    assert torch.equal(model(x), base(x))
    for p in tuner.parameters():
        nn.init.normal_(p)
    y = model(x)
    model.load_state_dict(base.state_dict())  # the same weights
    assert torch.equal(model(x), y)
    tuner.save(tmp_path / "a.safetensors")
    twin = net(1)
    vp.load(twin, tmp_path / "a.safetensors", probe=False)
    assert torch.equal(twin(x), y)
    with pytest.raises(vp.errors.AdapterFileError, match="a.safetensors: 0: SVFit belongs to the weights"):
        vp.load(net(2), tmp_path / "a.safetensors", probe=False)
    with pytest.raises(RuntimeError, match="SVFit at 0 has learnt on other weights"):
        model.load_state_dict(net(2).state_dict())
    whole = net(4)
    vp.attach(whole, M.SVFit(rank=2, targets="linear"), name="a", probe=False)
    whole.load_state_dict(twin.state_dict())  # weights and what was learnt on them
    assert torch.equal(whole(x), y)


# ---- SHiRA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", shira.MASKS)
def test_shira(mask):
    module, tuner, adapter = attached(M.SHiRA(rank=1, mask=mask, targets="linear"))
    assert adapter.values.shape == adapter.places.shape == (17,) and len(set(adapter.places.tolist())) == 17
    x = torch.randn(2, 10, dtype=torch.float64)
    torch.testing.assert_close(module(x), layer()(x), rtol=1e-15, atol=1e-15)
    nn.init.normal_(adapter.values)
    change = torch.zeros(70, dtype=torch.float64)
    change = change.index_put((adapter.places,), adapter.values).view(7, 10)
    check(module, module.weight + change, [adapter.values])


def test_where_the_masks_are():
    _, _, adapter = attached(M.SHiRA(rank=1, mask="magnitude", targets="linear"))
    weights = layer().weight.detach().abs().flatten()
    kept = weights[adapter.places]
    assert kept.min() >= torch.cat([weights[i : i + 1] for i in range(70) if i not in adapter.places]).max()
    _, _, adapter = attached(M.SHiRA(rank=1, mask="struct", targets="linear"))
    assert {11 * i for i in range(7)} <= set(adapter.places.tolist())  # the diagonal
    random = [attached(M.SHiRA(rank=1, seed=s, targets="linear"))[2].places.tolist() for s in (0, 0, 1)]
    assert random[0] == random[1] != random[2]
    with pytest.raises(MethodError, match="random, magnitude, struct"):
        M.SHiRA(mask="grad")


def test_switching_is_exact_both_ways():
    model, x = tiny.unet(), tiny.inputs("unet")
    before = [p.clone() for p in model.parameters()]
    plain, seen = tiny.see(model, x), {}
    for i, name in enumerate(("cat", "ink")):
        torch.manual_seed(i)
        tuner = vp.attach(model, M.SHiRA(rank=2, seed=i), name=name, probe=False)
        for p in tuner.parameters():
            nn.init.normal_(p)
        vp.activate(model, name)
        seen[name] = tiny.see(model, x)
        vp.activate(model, {})
    cat, ink = vp.tuners(model)["cat"], vp.tuners(model)["ink"]
    shira.switch(None, cat)
    torch.testing.assert_close(tiny.see(model, x), seen["cat"], rtol=1e-4, atol=1e-4)
    shira.switch(cat, ink)
    torch.testing.assert_close(tiny.see(model, x), seen["ink"], rtol=1e-4, atol=1e-4)
    with pytest.raises(MergeError, match="'ink' is in the weights already"):
        shira.switch(None, ink)
    with pytest.raises(MergeError, match="'cat' was not put"):
        shira.switch(cat, None)
    for act in (ink.detach, lambda: vp.activate(model, "ink"), ink.disabled().__enter__):
        with pytest.raises(vp.VisionPEFTError, match="take it out first"):
            act()
    shira.switch(ink, None)
    assert torch.equal(tiny.see(model, x), plain)
    for tuner in (cat, ink):
        tuner.detach()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def switchable(model: nn.Module, name: str = "a") -> vp.Tuner:
    tuner = vp.attach(model, M.SHiRA(rank=1, seed=len(name), targets="linear"), name=name, probe=False)
    for p in tuner.parameters():
        nn.init.normal_(p)
    return tuner


def two_linears() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def test_what_was_written_is_taken_out_of_the_weights_that_are_there():
    """After `.to`, which may replace them, and out of a copy of the model, whose weights are its own."""
    model, x = two_linears(), torch.randn(2, 4)
    plain, tuner = model(x), switchable(model)
    adapted = model(x)
    shira.switch(None, tuner)
    model.double()
    model.float()
    twin = copy.deepcopy(model)
    shira.switch(vp.tuners(twin)["a"], None)
    assert torch.equal(twin(x), plain)
    torch.testing.assert_close(model(x), adapted)
    shira.switch(tuner, None)
    assert torch.equal(model(x), plain)


def test_switching_is_seen_by_kept_merges():
    model, x = two_linears(), torch.randn(2, 4)
    tuner, lora = switchable(model), vp.attach(model, vp.LoRA(rank=1, targets="linear"), name="lora", probe=False)
    for p in lora.parameters():
        nn.init.normal_(p)
    vp.activate(model, "lora")
    lora.merge(keep=True)
    with pytest.raises(MergeError, match="'lora' is merged: unmerge it to switch"):
        shira.switch(None, tuner)
    lora.unmerge()
    shira.switch(None, tuner)
    both = model(x)
    lora.merge(keep=True)
    torch.testing.assert_close(model(x), both)
    with pytest.raises(MergeError, match="'lora' is merged: unmerge it to switch"):
        shira.switch(tuner, None)


def test_what_switching_cannot_write_to_is_refused():
    model = two_linears()
    first, second = switchable(model, "a"), switchable(model, "bb")
    shira.switch(None, first)
    with pytest.raises(MergeError, match="'a' is in the weights: take that out first"):
        shira.switch(None, second)
    shira.switch(first, second)
    tied = two_linears()
    tied[1].weight = tied[0].weight
    with pytest.raises(MergeError, match="1 and 0 share one weight"):
        shira.switch(None, switchable(tied))
    normed = two_linears()
    nn.utils.parametrizations.weight_norm(normed[1])
    before = copy.deepcopy(normed.state_dict())
    tuner = switchable(normed)
    with pytest.raises(MergeError, match="1: the weight is computed from others"):
        shira.switch(None, tuner)
    tuner.detach()
    assert all(torch.equal(normed.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", ["unet", "sd3", "flux"])
def test_switching_and_fused_projections(name):
    """A fused copy of the weights would not hear of what is written into them, nor of its taking out."""
    model, x = tiny.MODELS[name](), tiny.inputs(name)
    plain = tiny.see(model, x)
    tuner = vp.attach(model, M.SHiRA(rank=2), probe=False)
    for p in tuner.parameters():
        nn.init.normal_(p)
    expected = tiny.see(model, x)
    model.fuse_qkv_projections()
    with pytest.raises(MergeError, match="to_q is fused with its neighbours.*unfuse_qkv_projections to switch"):
        shira.switch(None, tuner)
    torch.testing.assert_close(tiny.see(model, x), expected, rtol=1e-4, atol=1e-4)
    model.unfuse_qkv_projections()
    shira.switch(None, tuner)
    torch.testing.assert_close(tiny.see(model, x), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(vp.VisionPEFTError, match="shira.switch has written to \\w+: take that out to fuse"):
        model.fuse_qkv_projections()
    shira.switch(tuner, None)
    model.fuse_qkv_projections()
    tuner.detach()
    torch.testing.assert_close(tiny.see(model, x), plain, rtol=1e-4, atol=1e-4)


# ---- counts ---------------------------------------------------------------------------------------------------------

ATTENTION = "query key value attn_out"
COUNTS = {
    "orthogonal, all Linears": ("sd15", M.OrthogonalAdaptation(rank=20), 184, 4_697_600),
    "orthogonal, attention": ("sd15", M.OrthogonalAdaptation(rank=4, targets=ATTENTION), 128, 399_360),
    "svfit 320": ("sd15", M.SVFit(rank=320), 128, 40_960),
    "svfit 768": ("sd15", M.SVFit(), 128, 75_264),
    "svfit all": ("sd15", M.SVFit(rank=1280), 128, 93_696),
    "svfit sdxl": ("sdxl", M.SVFit(), 560, 419_840),
    "svfit sdxl all": ("sdxl", M.SVFit(rank=1280), 560, 665_600),
    "shira": ("sd15", M.SHiRA(rank=4), 128, 797_184),
}


@pytest.mark.parametrize("label", COUNTS)
def test_counts(label):
    pytest.importorskip("diffusers")
    name, method, sites, expected = COUNTS[label]
    tuner = vp.attach(big.meta(name), method, probe=False)
    found = len(tuner.sites), tuner.num_parameters
    tuner.detach()
    assert found == (sites, expected)
