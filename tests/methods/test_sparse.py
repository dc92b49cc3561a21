"""x S^T multiplies the columns of S that are not zero, and is the dense product."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import visionpeft as vp
from visionpeft.methods import SPT, sparse

OUT, WIDTH = 6, 10
MASKS = {
    "one column": [3, 13, 43],
    "columns apart": [0, 9, 10, 29, 34],
    "half": [0, 11, 22, 33, 44],
    "most": list(range(0, 60, 7)),
    "none": [],
}


def dense(x, y, values, places):
    s = torch.zeros(OUT * WIDTH, dtype=values.dtype).index_put((places.long(),), values)
    return y + F.linear(x, s.view(OUT, WIDTH))


@pytest.mark.parametrize("at", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("of_x", [True, False], ids=["input learns", "input fixed"])
def test_it_is_the_dense_product(at, of_x):
    torch.manual_seed(0)
    places = torch.tensor(at, dtype=torch.int32)
    given = [torch.randn(s, dtype=torch.float64) for s in ((2, 3, WIDTH), (2, 3, OUT), (len(at),))]
    weights = torch.randn(2, 3, OUT, dtype=torch.float64)
    found = []
    for add in (lambda *a: sparse.add(*a, (OUT, WIDTH), sparse.Columns()), dense):
        x, y, values = (t.clone().requires_grad_(i > 0 or of_x) for i, t in enumerate(given))
        z = add(x, y, values, places)
        (z * weights).sum().backward()
        found.append([z.detach(), y.grad, values.grad] + ([x.grad] if of_x else []))
        assert of_x or x.grad is None
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        assert torch.equal(sparse.add(*given, places, (OUT, WIDTH), sparse.Columns()), found[0][0])


@pytest.mark.parametrize("change", ["written", "replaced", "copied"])
def test_other_places_are_seen(change):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, OUT), nn.Linear(OUT, 2)).double()
    tuner = vp.attach(model, SPT(sparse={"0": [3, 13, 43]}), probe=False)
    (adapter,) = tuner.adapters.values()
    nn.init.normal_(adapter.values)
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    for _ in range(2):  # versions of a copy's places count from one again, and would come to be the same
        adapter.load_state_dict(adapter.state_dict())
    model(x)
    other = torch.tensor([1, 18, 28], dtype=torch.int32)
    if change == "written":
        adapter.load_state_dict({"index": other, "values": adapter.values.detach()})
    elif change == "replaced":
        adapter.index = other
    else:
        model = copy.deepcopy(model)
        adapter = next(m for m in model.modules() if type(m) is type(adapter))
        adapter.index.copy_(other)
    y = model[0](x)
    expected = dense(x, F.linear(x, model[0].weight, model[0].bias), adapter.values, other)
    assert torch.allclose(y, expected, rtol=1e-12, atol=1e-14)


def test_columns_of_zeros_cost_nothing():
    x, y = torch.randn(7, WIDTH, requires_grad=True), torch.randn(7, OUT)
    values = torch.randn(3, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        sparse.add(x, y, values, torch.tensor([3, 13, 44]), (OUT, WIDTH), sparse.Columns()).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 7 * OUT * 2  # three products, two columns
