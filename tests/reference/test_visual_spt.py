"""SPT: sensitivities, what a budget buys against a naive search, and allocations of several methods in a model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import timm
import torch
from test_formulas import D, assert_equal, image, shake, vit
from torch import Tensor, nn

import visionpeft as vp
from visionpeft.methods import spt

M = vp.methods
TAUS = range(50, 2001, 50)


def batches(n: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    draw = [torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(n)]
    return [(x, torch.tensor([i % 5, (i + 1) % 5])) for i, x in enumerate(draw)]


def scored() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = vit()
    return model, spt.sensitivity(model, batches())


# ---- sensitivity ----------------------------------------------------------------------------------------------------


def test_sensitivity_is_the_sum_of_squared_gradients_of_the_first_batches():
    torch.manual_seed(0)
    model = vit()
    found = spt.sensitivity(model, iter(batches(5)), limit=3)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x, target in batches(3):
        grads = torch.autograd.grad(nn.functional.cross_entropy(model(x), target), list(model.parameters()))
        for name, grad in zip(expected, grads, strict=True):
            expected[name] += grad**2
    assert set(found) == set(expected)
    assert all(torch.allclose(found[n], expected[n], rtol=1e-10, atol=0) for n in expected)


def test_sensitivity_leaves_no_trace():
    model = timm.create_model("test_resnet", num_classes=5).double().eval()
    frozen = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    frozen.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    scores = spt.sensitivity(model, batches(1))
    name = next(n for n, p in model.named_parameters() if p is frozen.weight)
    assert scores[name].any() and not frozen.weight.requires_grad and frozen.weight.grad is None
    assert bool((model.fc.weight.grad == 1).all()) and not any(m.training for m in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


# ---- allocation -----------------------------------------------------------------------------------------------------

PARTS = {"query": (0, D), "key": (D, 2 * D), "value": (2 * D, 3 * D)}


def matrices(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for i in (0, 1):
        for part, rows in PARTS.items():
            found[f"blocks.{i}.attn.qkv:{part}"] = scores[f"blocks.{i}.attn.qkv.weight"][slice(*rows)]
        for name in ("attn.proj", "mlp.fc1", "mlp.fc2"):
            found[f"blocks.{i}.{name}"] = scores[f"blocks.{i}.{name}.weight"]
    return found


def naive(scores: dict[str, Tensor], size) -> list[tuple[int, set[str], dict[str, list[int]], set[str]]]:
    """Total, structured sites, sparse entries and vectors for each tau; `size(shape)` of a matrix's adapter."""
    flat = matrices(scores)
    vectors = {n: s for n, s in scores.items() if s.dim() == 1 and not n.startswith(("head", "patch_embed"))}
    every = [(-v, name, i) for name, s in {**flat, **vectors}.items() for i, v in enumerate(s.flatten().tolist())]
    ordered = sorted(every, key=lambda e: e[0])
    return [bought(ordered[:tau], flat, vectors, size) for tau in TAUS]


def bought(selected, flat: dict[str, Tensor], vectors: dict[str, Tensor], size):
    chosen: dict[str, list[int]] = {}
    for _, name, i in selected:
        chosen.setdefault(name, []).append(i)
    structured = {n for n in flat if size and len(chosen.get(n, ())) >= size(flat[n].shape) / 10}
    sparse = {n: sorted(c) for n, c in chosen.items() if n in flat and n not in structured}
    whole = {n for n, c in chosen.items() if n in vectors and len(c) >= 0.2 * vectors[n].numel()}
    total = sum(size(flat[n].shape) for n in structured) + sum(map(len, sparse.values()))
    return total + sum(vectors[n].numel() for n in whole) + D, structured, sparse, whole


CASES = {
    "lora": (vp.LoRA(rank=2), lambda shape: 2 * sum(shape)),
    "adapter": (M.LinearAdapter(hidden=2), lambda shape: 4 * shape[0] + 2 + shape[0]),
    "unstructured": (None, None),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("budget", [600, 2000, 4000])
def test_allocation_is_that_of_a_naive_search(case, budget):
    model, scores = scored()
    method, size = CASES[case]
    plan = spt.allocate(model, scores, method, budget=budget, taus=TAUS)
    total, structured, sparse, whole = min(naive(scores, size), key=lambda found: abs(found[0] - budget))
    assert set(plan.structured) == structured and set(plan.vectors) == whole
    assert {name: index.tolist() for name, index in plan.sparse.items()} == sparse
    tuner = vp.attach(model, plan, train="head")
    assert tuner.num_parameters == total  # structured + unstructured + vectors + class token
    assert structured or size is None or budget == 600


def test_a_larger_budget_buys_more():
    model, scores = scored()
    sizes = []
    for budget in (300, 1000, 3000, 6000):
        tuner = vp.attach(model, spt.allocate(model, scores, vp.LoRA(rank=2), budget=budget, taus=TAUS), probe=False)
        sizes.append(tuner.num_parameters)
        tuner.detach()
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_a_budget_is_met_or_it_is_said():
    """The paper's steps of 20,000 are too wide for a small model: finer ones are tried."""
    model, scores = scored()
    for budget, method in ((600, None), (2000, vp.LoRA(rank=2)), (4000, None)):
        plan = spt.allocate(model, scores, method, budget=budget)
        assert abs(vp.attach(model, plan, probe=False).num_parameters - budget) <= budget / 10
        vp.tuners(model)["default"].detach()
    with pytest.warns(UserWarning, match="a budget of 3 scalars, and the nearest allocation has"):
        spt.allocate(model, scores, vp.LoRA(rank=2), budget=3)


SMALL = {"rank": 2, "hidden": 4, "tokens": 2, "a1": 2, "a2": 4, "lora": 2, "adapter": 2, "prompts": 2}
LEARN_IN_PLACE = ("bitfit", "ln_tuning", "linear", "full")  # without adapters
ELSEWHERE = ("pointgst", "idpt", "dapt", "ppt", "point_peft", "textual_inversion")


def made(key: str) -> Any:
    own = {f.name for f in dataclasses.fields(vp.METHODS[key])}
    return vp.METHODS[key](**{name: value for name, value in SMALL.items() if name in own})


@pytest.mark.parametrize("method", [*(made(k) for k in vp.METHODS if k not in LEARN_IN_PLACE + ELSEWHERE),
                                    M.VPT(tokens=2, deep=False)], ids=lambda m: m.summary())  # fmt: skip
def test_any_method_can_be_allocated(method, tmp_path):
    """Its sites are those of its kind; where it acts no entry of the same matrices learns; it goes through a file."""
    model, scores = scored()
    total, plan = spt.Ranking(vp.sites.Backbone(model), scores, method, 2000).plan(1500, alpha=6, beta=5)
    assert plan.structured
    for name in plan.structured:
        path, _, part = name.partition(":")
        below = {"mlp": f"{path}.mlp", "attention": f"{path}.attn"}.get(part, path)
        taken = [s for s in plan.sparse if s.partition(":")[0] == below or s.startswith(below + ".")]
        assert part in PARTS or not taken, (name, taken)
    x, tuner = image(), shake(vp.attach(model, plan, train="head"))
    assert tuner.num_parameters == total
    y = model(x)
    tuner.save(tmp_path / "spt.safetensors")
    count = tuner.num_parameters
    tuner.detach()
    loaded = vp.load(model, tmp_path / "spt.safetensors")
    if method.key.startswith("binary"):  # files hold their moments in single precision
        assert torch.allclose(model(x), y, rtol=1e-6, atol=1e-6)
    else:
        assert_equal(model(x).detach(), y.detach())
    assert loaded.num_parameters == count
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "spt.safetensors").read_bytes()


@pytest.mark.parametrize("key", LEARN_IN_PLACE)
def test_methods_without_adapters_cannot_be_allocated(key):
    model, scores = scored()
    with pytest.raises(vp.errors.MethodError, match="can act nowhere in this model, or has no adapters"):
        spt.allocate(model, scores, vp.METHODS[key](), budget=2000, taus=TAUS)


def test_keys_and_values_of_a_prefix_are_bought_together():
    """One of them by itself would be refused: both speak for both."""
    model, scores = scored()
    for name in scores:
        scores[name].zero_()
    scores["blocks.1.attn.qkv.weight"][2 * D : 2 * D + 2] = 1.0  # the values of block 1 alone
    total, plan = spt.Ranking(vp.sites.Backbone(model), scores, M.PrefixTuning(tokens=1), 48).plan(48, 10, 5)
    assert plan.structured == ["blocks.1.attn.qkv:key", "blocks.1.attn.qkv:value"] and not plan.sparse
    assert vp.attach(model, plan).num_parameters == total == 2 * D + D


def test_a_method_that_takes_no_rows_gets_whole_projections():
    model, scores = scored()
    _, plan = spt.Ranking(vp.sites.Backbone(model), scores, M.RepAdapter(hidden=4), 2000).plan(1500, alpha=40, beta=5)
    assert set(plan.structured) == {f"blocks.{i}.{p}" for i in (0, 1) for p in
                                    ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}  # fmt: skip
    assert not plan.sparse


def test_spt_lora_is_w_plus_ba_plus_s_and_merges():
    model, scores = scored()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plan = spt.allocate(model, scores, vp.LoRA(rank=2), budget=2000, taus=TAUS)
    x, tuner = image(), shake(vp.attach(model, plan))
    y = model(x).detach()
    expected = {k: v.clone() for k, v in before.items()}
    for site, adapter in tuner.adapters.items():
        t = {**dict(adapter.named_parameters()), **dict(adapter.named_buffers())}
        rows = expected[f"{site.path}.weight"][slice(*(site.rows or (None, None)))]
        if "index" in t:
            for i, value in zip(t["index"].tolist(), t["values"], strict=True):
                rows[i // rows.shape[1], i % rows.shape[1]] += value.detach()
        else:
            rows += (t["b"] @ t["a"]).detach()
    for path, name in tuner.in_place:
        expected[f"{path}.{name}".lstrip(".")] = tuner.learnt(path, name).detach()
    fresh = vit()
    fresh.load_state_dict(expected)
    assert_equal(fresh(x).detach(), y)
    tuner.merge()
    assert_equal(model(x).detach(), y)
    assert all(torch.allclose(v, expected[k], rtol=1e-12, atol=1e-14) for k, v in model.state_dict().items()
               if "peft" not in k)  # fmt: skip
    tuner.unmerge()
    tuner.detach()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_spt_on_convs_and_on_torchs_attention(tmp_path):
    """Sparse entries of a conv act in its weight, those of nn.MultiheadAttention in its rows."""
    small = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True).double()
    net = nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.Flatten(2)).double()

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.layer, self.head = net, small, nn.Linear(8, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(self.net(x).transpose(1, 2)).mean(1))

    model, x = Both(), torch.randn(4, 3, 6, dtype=torch.float64)
    scores = spt.sensitivity(model, [(x, torch.tensor([0, 1, 2, 0]))])
    plan = spt.allocate(model, scores, budget=300, taus=range(10, 600, 10))
    assert {"net.0", "layer.self_attn:value", "layer.self_attn.out_proj"} <= set(plan.sparse)
    tuner = shake(vp.attach(model, plan, train="head", probe=False))
    y = model.train()(x).detach()
    assert_equal(model.eval()(x).detach(), y)
    tuner.merge()
    assert_equal(model(x).detach(), y)


@pytest.mark.parametrize("layers", [2, (1, 1, 1, 1)], ids=["ViT", "ResNet"])
@pytest.mark.parametrize("custom", [False, True], ids=["torch's attention", "its own"])
def test_spt_on_clip(layers, custom):
    """Rows of in_proj_weight, the pooling's projections; what a plan counts is what is attached and what learns."""
    import open_clip

    side = 32 if isinstance(layers, tuple) else 8
    vision = {"layers": layers, "width": 8, "head_width": 4, "patch_size": 4, "image_size": side,
              "block_type": "custom" if custom else None}
    text = {"context_length": 5, "vocab_size": 20, "width": 8, "heads": 2, "layers": 2}
    torch.manual_seed(0)
    model = open_clip.CLIP(8, vision, text).eval()
    scores = {name: torch.rand_like(p) * torch.rand(()) for name, p in model.named_parameters()}
    ranking = spt.Ranking(vp.sites.Backbone(model), scores, vp.LoRA(rank=1), 3000)
    total, plan = ranking.plan(3000 if side == 32 else 600, alpha=2, beta=5)
    assert plan.structured and plan.sparse
    names = {name.partition(":")[0] for name in (*plan.structured, *plan.sparse)}
    assert any("attn" in name for name in names) and not any("projection" in name for name in names)
    tuner = shake(vp.attach(model, plan, probe=False))
    assert tuner.num_parameters == total
    x = torch.randn(2, 3, side, side), torch.randint(1, 20, (2, 5))
    image, words = model(*x)[:2]
    (image.sum() + words.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tuner.parameters())


def test_what_cannot_be_allocated_says_so():
    model, scores = scored()
    with pytest.raises(vp.errors.MethodError, match="allocate"):
        M.SPT()
    with pytest.raises(vp.errors.MethodError, match=r"no scores of blocks\.0\.attn\.qkv\.weight"):
        spt.allocate(model, {}, budget=100)
    plan = spt.allocate(model, scores, vp.LoRA(rank=2), budget=2000, taus=TAUS)
    with pytest.raises(vp.errors.SiteError, match="another model"):
        vp.attach(timm.create_model("test_resnet"), plan)
    with pytest.raises(vp.errors.MethodError, match="LoRA can act nowhere"):
        spt.allocate(model, scores, vp.LoRA(rank=99), budget=2000)


def test_linear_adapter():
    """y + Up gelu(Down y) behind a Linear."""
    model = vit()
    tuner = shake(vp.attach(model, M.LinearAdapter(hidden=4)))
    linear, u = model.blocks[0].mlp.fc2, torch.randn(2, 4 * D, dtype=torch.float64)
    t = dict(tuner.adapters[next(s for s in tuner.sites if s.path == "blocks.0.mlp.fc2")].named_parameters())
    y = u @ linear.weight.T + linear.bias
    h = nn.functional.gelu(y @ t["down_weight"].T + t["down_bias"])
    assert_equal(linear(u).detach(), (y + h @ t["up_weight"].T + t["up_bias"]).detach())


@pytest.mark.parametrize("method", [vp.LoRA(rank=2), M.FacTTT(rank=2), M.Houlsby(hidden=4), None], ids=str)
def test_the_total_of_a_plan_is_what_learns(method):
    """Structured, shared, sparse, whole vectors and class token."""
    model, scores = scored()
    ranking = spt.Ranking(vp.sites.Backbone(model), scores, method, most=2000)
    for tau in (100, 700, 2000):
        total, plan = ranking.plan(tau, alpha=10, beta=5)
        tuner = vp.attach(model, plan, train="head")
        assert tuner.num_parameters == total
        tuner.detach()
