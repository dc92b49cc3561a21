"""Numbers of parameters of the visual adapters on ViT-B/16, as in the papers; other backbones by closed formulas."""

from __future__ import annotations

import pytest
from test_counts import count

from visionpeft import methods as M

timm = pytest.importorskip("timm")

BASE = {  # ViT-B/16, without head
    **{f"fact_tt {r}": (M.FacTTT(rank=r), n) for r, n in {4: 8_448, 8: 21_504, 16: 61_440, 32: 196_608}.items()},
    **{f"fact_tk {r}": (M.FacTTK(rank=r), n) for r, n in {4: 6_784, 8: 13_952, 16: 30_976, 32: 86_528}.items()},
    "convpass": (M.Convpass(), 327_552),
    "convpass attention": (M.Convpass(attention_only=True), 163_776),
    "parallel 8": (M.ParallelAdapter(hidden=8), 156_768),
    "repadapter": (M.RepAdapter(), 239_808),
    "repadapter attention": (M.RepAdapter(targets="qkv"), 119_904),
    "hydra": (M.Hydra(), 239_712),
    "prefix 10": (M.PrefixTuning(), 12 * 2 * 10 * 768),
    "compacter 8": (M.Compacter(hidden=8), 55_936),
    "compacter 32": (M.Compacter(hidden=32), 57_664),
    "mosa": (M.MoSA(), 322_752),
    "rein": (M.Rein(), 12 * (100 * 16 + 16 * 768) + 2 * (768 * 768 + 768) + 1),
    "linear adapter": (M.LinearAdapter(), 2 * 12 * (8 * 2 * 768 + 8 + 768)),
    "binary adaptformer": (M.BinaryAdaptFormer(), 589_824),
    "binary lora": (M.BinaryLoRA(), 1_179_648),
    "block lora": (M.BlockLoRA(rank=8, blocks=2), 24 * (8 * 768 + 4 * 768)),
    "noah": (M.NOAH(), 12 * (5 * 4 * 768 + 2 * 5 * 768 + 5 + 768 + 5 * 768)),
    "noah by block": (M.NOAH(lora=(10,) * 6 + (0,) * 6, adapter=0, prompts=(1,) * 12), 6 * 10 * 4 * 768 + 12 * 768),
}

LARGE = {  # D = 1024, L = 24
    "fact_tt": (M.FacTTT(rank=8), 2 * 1024 * 8 + 12 * 24 * 64),
    "fact_tk": (M.FacTTK(rank=8), 2 * 1024 * 8 + 8**3 + 12 * 24 * 8),
    "convpass": (M.Convpass(hidden=8), 2 * 24 * (2 * 1024 * 8 + 9 * 64 + 2 * 8 + 1024)),
    "parallel": (M.ParallelAdapter(hidden=8), 24 * (2 * 1024 * 8 + 8 + 1024)),
    "repadapter": (M.RepAdapter(), 2 * 24 * (1024 * 8 + 8 + 1024 * 4 + 1024)),
    "hydra": (M.Hydra(rank=4), 24 * (5 * 1024 * 4 + 4 + 1024 + 3 * (2 * 1024 * 4 + 4 + 1024))),
    "rein": (M.Rein(), 2_990_081 - (1024 * 256 + 256) - (768 * 256 + 256)),  # without the decoder's link
}


@pytest.mark.parametrize("label", BASE)
def test_vit_base(label):
    method, expected = BASE[label]
    assert count(method) == expected


@pytest.mark.parametrize("label", LARGE)
def test_vit_large(label):
    method, expected = LARGE[label]
    assert count(method, "vit_large_patch16_224") == expected
