"""The README's own words: its example of a new method runs, and its table of counts is what is counted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import visionpeft as vp
from visionpeft.methods import (
    SSF,
    VPT,
    AdaptFormer,
    BitFit,
    FullFineTuning,
    Houlsby,
    LinearProbe,
    LNTuning,
    LoRA,
    Pfeiffer,
)

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def new_method() -> type:
    """The class Scale, made by running the README's code block."""
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "class Scale(Method)" in b)
    header = (
        "from dataclasses import dataclass\nfrom typing import ClassVar\nimport torch\nfrom torch import nn\n"
        "from visionpeft.adapter import Adapter, Method, factory\n"
    )
    names: dict = {"__name__": __name__}
    exec(compile(header + block, "README.md", "exec", dont_inherit=True), names)
    return names["Scale"]


def test_the_new_method_acts_merges_and_leaves_no_trace() -> None:
    torch.manual_seed(0)
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).double().eval()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    with torch.no_grad():
        base, keys = net(x), list(net.state_dict())
        tuner = vp.attach(net, new_method()())
        for p in tuner.parameters():
            nn.init.normal_(p, 1.0, 0.5)
        adapted = net(x)
        tuner.merge()
        merged = net(x)
        tuner.detach()
    assert (adapted - base).abs().max() > 1e-2
    torch.testing.assert_close(merged, adapted, rtol=1e-10, atol=1e-10)
    assert torch.equal(net(x), base) or torch.allclose(net(x), base, atol=1e-12)
    assert list(net.state_dict()) == keys


COUNTED = {
    "lora": [LoRA(rank=8)],
    "ssf": [SSF()],
    "bitfit": [BitFit()],
    "ln_tuning": [LNTuning()],
    "adaptformer": [AdaptFormer(hidden=64), AdaptFormer(hidden=8)],
    "houlsby": [Houlsby(hidden=8)],
    "pfeiffer": [Pfeiffer(hidden=8)],
    "vpt": [VPT(tokens=10, deep=True), VPT(tokens=50, deep=False)],
    "linear": [LinearProbe()],
    "full": [FullFineTuning()],
}


def table_rows() -> dict[str, list[int]]:
    rows = re.findall(r"^\| `(\w+)` \| `[^|]*\| ([\d, ]+) \|", README, re.M)
    return {key: [int(cell.replace(",", "")) for cell in counts.split(", ")] for key, counts in rows}


def test_the_table_names_every_method() -> None:
    elsewhere = re.search(r"For diffusion models there are also (.*?)\n\n", README, re.S)
    assert elsewhere is not None
    assert set(table_rows()) | set(re.findall(r"`(\w+)`", elsewhere[1])) == set(vp.METHODS)


@pytest.mark.filterwarnings("ignore:the model has no classifier")
@pytest.mark.parametrize("key", COUNTED)
def test_the_table_counts_what_is_there(key: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
    counted = []
    for method in COUNTED[key]:
        tuner = vp.attach(model, method)
        counted.append(tuner.num_parameters)
        tuner.detach()
    assert table_rows()[key] == counted
