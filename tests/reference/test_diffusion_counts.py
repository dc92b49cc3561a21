"""LoRA's numbers of parameters on the published diffusion models, all meta; KronA's and DiffFit's are with them."""

from __future__ import annotations

import big_diffusers as big
import pytest

import visionpeft as vp

pytest.importorskip("diffusers")

RANKS = (4, 8, 16)
LORA = {  # linears; r = 4, 8, 16
    "sd15": (128, 797_184, 1_594_368, 3_188_736),
    "sd21": (128, 829_952, 1_659_904, 3_319_808),
    "sdxl": (560, 5_806_080, 11_612_160, 23_224_320),
    "dit": (112, 1_032_192, 2_064_384, 4_128_768),
}
KOHYA = {"sd15": (192, {4: 1_695_744, 32: 13_565_952}), "sdxl": (722, {4: 10_639_360, 32: 85_114_880})}


def attached(name: str, **fields) -> tuple[int, int]:
    tuner = vp.attach(big.meta(name), vp.LoRA(**fields), probe=False)
    found = len(tuner.sites), tuner.num_parameters
    tuner.detach()
    return found


@pytest.mark.parametrize("name", LORA)
def test_all_of_attention_which_is_the_default(name):
    sites, *counts = LORA[name]
    assert [attached(name, rank=r) for r in RANKS[:1]] == [(sites, counts[0])]
    assert attached(name, rank=16, targets="diffusers") == (sites, counts[2])
    shapes = [s.shape for s in vp.LoRA(rank=1).choose(vp.sites.Backbone(big.meta(name)))]
    assert [r * sum(map(sum, shapes)) for r in RANKS] == counts


@pytest.mark.parametrize("name", KOHYA)
def test_the_set_of_kohya(name):
    sites, counts = KOHYA[name]
    assert {r: attached(name, rank=r, targets="kohya") for r in counts} == {r: (sites, n) for r, n in counts.items()}


def test_text_encoder_of_sd():
    assert attached("clip", rank=4, targets="diffusers") == (48, 294_912)
    assert attached("clip", rank=4, targets="kohya")[0] == 72


def test_published_totals():
    """SD with its text encoder: KronA 0.52 M, LoRA 1.09 M; (64, 8) of the paper 0.32 M."""

    def count(name, method) -> int:
        tuner = vp.attach(big.meta(name), method, probe=False)
        found = tuner.num_parameters
        tuner.detach()
        return found

    parts = ("sd15", "clip")
    assert sum(count(n, vp.KronA(a1=4, a2=64)) for n in parts) == 520_928
    assert sum(count(n, vp.LoRA(rank=4, targets="diffusers")) for n in parts) == 1_092_096
    assert sum(count(n, vp.KronA(a1=64, a2=8)) for n in parts) == 328_048
