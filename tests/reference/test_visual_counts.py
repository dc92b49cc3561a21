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


# ---- NOAH's sub-networks --------------------------------------------------------------------------------------------

SUBNETS = {  # widths of LoRA, adapter and prompts in each block, X for 10, as its 19 yaml files for VTAB-1k have them
    "caltech101": "1XXX5XXX51X1 X15XX155X15X 5X15X1X1X1X1", "cifar": "X1551X111X11 5XXX5111XXX1 X5X151X1X51X",
    "clevr_count": "11X5XXX151X1 1XXXX15XXX11 X15X51X555X1", "clevr_dist": "51X5XX115X1X 111X111X51XX X11X5X515X55",
    "diabetic_retinopathy": "11X55X1XX5X1 1155XXX51XX1 X15X155X5X55",
    "dmlab": "X515XX555XX1 515151555XXX 1X51XX5XX111", "dsprites_loc": "1111XX1X515X 111X11XXXXX1 5X1XX55155X1",
    "dsprites_ori": "1X1X15XX5515 1XXXX15XXX11 5511X51XXXXX", "dtd": "X5115X511511 111X11XXXXX1 X5115X511511",
    "eurosat": "X1XX15X111X1 XX51X1X5X1XX XXXXX155XX5X", "kitti": "5XXX1X55X5X1 51XX1X115X55 15X1X5111555",
    "oxford_flowers102": "XX551X15X15X 515511X55X5X XX551X15X15X",
    "oxford_pet": "X11X5115XX1X 15555X15X115 X55X1XXXX5XX",
    "patch_camelyon": "XX1X11555155 51X5511X1515 XX5X1XXX5155", "resisc45": "XX555XXX1515 555151X55155 55X1515X1151",
    "smallnorb_azi": "X5151155X11X 5111551X1151 1X1X15XX1XX5",
    "smallnorb_ele": "X11155X51X11 111X11XXXXX1 X11115XXXX1X",
    "sun397": "XX5511X1111X X5111X551151 51X55X151111", "svhn": "555X555XXXX5 55555X5X5555 X55X55555555",
}  # fmt: skip


def test_noahs_subnets_average_to_the_published_size():
    """0.36M, without the prompts and the position table of its first layer."""
    def widths(text: str) -> tuple[int, ...]:
        return tuple(10 if digit == "X" else int(digit) for digit in text)

    assert len(SUBNETS) == 19
    counts = []
    for text in SUBNETS.values():
        lora, adapter, prompts = map(widths, text.split())
        counts.append(count(M.NOAH(lora=lora, adapter=adapter, prompts=prompts)))
        assert counts[-1] == 768 * (4 * sum(lora) + 12 + sum(prompts)) + (2 * 768 + 1) * sum(adapter)
    assert round(sum(counts) / 19) == 360_134
