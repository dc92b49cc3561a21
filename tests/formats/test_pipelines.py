"""Live pipelines: native files into them, several at once, swapped; converting on the command line."""

from __future__ import annotations

import warnings

import pytest
import tiny_diffusers as tiny
import torch
from tiny_pipeline import draw, pipeline

import visionpeft as vp
from visionpeft.cli import main
from visionpeft.errors import AdapterFileError, DeadAdapterError

pytest.importorskip("diffusers")


def shake(tuner: vp.Tuner, seed: int = 4) -> vp.Tuner:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in tuner.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return tuner


@pytest.fixture
def pipe(tmp_path):
    return pipeline(tmp_path / "tokenizer")


def test_every_component_is_probed(pipe):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "liveness is not checked")
        tuner = vp.attach(pipe, vp.LoRA(rank=2, targets="query value", within="*t*"))
    assert {s.path.split(".")[0] for s in tuner.sites} == {"unet", "text_encoder", "vae"}
    tuner.detach()
    pipe.text_encoder.encoder.layers[1].mlp.forward = lambda x: x
    with pytest.raises(DeadAdapterError, match=r"text_encoder\.encoder\.layers\.1\.mlp\.fc1"):
        vp.attach(pipe, vp.LoRA(rank=2, targets="mlp_in"))


def test_a_file_of_a_unet_loads_into_the_pipeline_and_back(pipe, tmp_path):
    ranks = {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 3}
    tuner = shake(vp.attach(pipe.unet, vp.LoRA(rank=2, ranks=ranks)))
    expected = draw(pipe)
    tuner.save(tmp_path / "cat.safetensors")
    tuner.detach()
    cat = vp.load(pipe, tmp_path / "cat.safetensors")
    assert torch.equal(draw(pipe), expected) and cat.sites[0].path.startswith("unet.")
    cat.save(tmp_path / "again.safetensors")
    cat.detach()
    back = vp.load(pipe.unet, tmp_path / "again.safetensors")
    assert torch.equal(draw(pipe), expected) and back.sites[0].path.startswith("down_blocks.")
    back.detach()
    with pytest.raises(AdapterFileError, match="not here"):
        vp.load({"unet": tiny.unet(layers_per_block=2)}, tmp_path / "cat.safetensors")


def test_a_file_of_a_pipeline_needs_only_the_components_that_it_touches(pipe, tmp_path):
    tuner = shake(vp.attach(pipe, vp.LoRA(rank=2, targets="diffusers")))
    expected = draw(pipe)
    tuner.save(tmp_path / "cat.safetensors")
    other = {"unet": tiny.unet(), "text_encoder": tiny.text(), "safety_checker": tiny.vae()}
    vp.load(other, tmp_path / "cat.safetensors")
    pipe.unet, pipe.text_encoder = other["unet"], other["text_encoder"]
    assert torch.equal(draw(pipe), expected)


def test_several_at_once_swapped_between_calls(pipe, tmp_path):
    for i, name in enumerate(("cat", "ink")):
        tuner = shake(vp.attach(pipe, vp.KronA(a1=4, a2=4) if i else vp.LoRA(rank=2), name=name), seed=i)
        tuner.save(tmp_path / f"{name}.safetensors")
        tuner.detach()
    plain = draw(pipe)
    for name in ("cat", "ink"):
        vp.load(pipe, tmp_path / f"{name}.safetensors")
    alone = {}
    for name in ("cat", "ink"):
        vp.activate(pipe, name)
        alone[name] = draw(pipe)
        image = pipe("a", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
        assert image.shape == (1, 16, 16, 3)
    vp.activate(pipe, {"cat": 0.7, "ink": 0.5})
    both = draw(pipe)
    assert all(float((both - y).abs().max()) > 1e-3 for y in (plain, *alone.values()))
    vp.activate(pipe, {})
    assert torch.equal(draw(pipe), plain)


def test_a_merged_pipeline_saves_and_loads_as_a_plain_one(pipe, tmp_path):
    from diffusers import StableDiffusionPipeline

    tuner = shake(vp.attach(pipe, vp.KronA(a1=4, a2=4)))
    expected = draw(pipe)
    tuner.merge()
    pipe.save_pretrained(tmp_path / "merged")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert float((draw(again) - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert type(again.unet) is type(tiny.unet())


@pytest.mark.parametrize("to", ["diffusers", "kohya", "peft", "lycoris", "cloneofsimo"])
def test_convert_on_the_command_line(to, pipe, tmp_path, capsys):
    pipe.save_pretrained(tmp_path / "base")
    tuner = shake(vp.attach(pipe.unet, vp.LoRA(rank=2, alpha=3, targets="query value")))
    expected = draw(pipe)
    tuner.save(tmp_path / "cat.safetensors")
    out = tmp_path / {"peft": "cat_peft", "cloneofsimo": "cat.pt"}.get(to, "out.safetensors")
    base = ["--base", str(tmp_path / "base")]
    assert main(["convert", str(tmp_path / "cat.safetensors"), str(out), *base, "--to", to]) == 0
    assert f"visionpeft -> {to}" in capsys.readouterr().out
    assert main(["convert", str(out), str(tmp_path / "back.safetensors"), *base, "--to", "visionpeft"]) == 0
    tuner.detach()
    vp.load(pipe, tmp_path / "back.safetensors")
    assert float((draw(pipe) - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_convert_of_what_is_told_by_the_weights(pipe, tmp_path, capsys):
    """SVFit's file has singular values alone, whose vectors are those of the base."""
    pipe.save_pretrained(tmp_path / "base")
    tuner = shake(vp.attach(pipe, "svfit"))
    expected = draw(pipe)
    tuner.save(tmp_path / "cat.safetensors")
    tuner.detach()
    arguments = ["convert", str(tmp_path / "cat.safetensors"), str(tmp_path / "x.safetensors"), "--base"]
    assert main([*arguments, str(tmp_path / "base")]) == 0
    pipe.load_lora_weights(str(tmp_path / "x.safetensors"))
    assert float((draw(pipe) - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    for weights in (tmp_path / "base" / "unet").glob("*.safetensors"):
        weights.unlink()
    (tmp_path / "x.safetensors").unlink()
    assert main([*arguments, str(tmp_path / "base")]) == 2
    assert "needs the weights of its base" in capsys.readouterr().err and not (tmp_path / "x.safetensors").exists()


def test_what_cannot_be_converted_says_so(pipe, tmp_path, capsys):
    pipe.unet.save_pretrained(tmp_path / "base")
    vp.attach(pipe.unet, "difffit").save(tmp_path / "cat.safetensors")
    arguments = ["convert", str(tmp_path / "cat.safetensors"), str(tmp_path / "x.safetensors")]
    assert main([*arguments, "--base", str(tmp_path / "base"), "--to", "kohya"]) == 2
    assert "learnt in place" in capsys.readouterr().err and not (tmp_path / "x.safetensors").exists()
    assert main([*arguments, "--base", str(tmp_path / "base"), "--to", "webui"]) == 2
    assert "no format 'webui'" in capsys.readouterr().err
    assert main([*arguments, "--to", "kohya"]) == 2
    assert "give --base" in capsys.readouterr().err
    assert main([*arguments, "--base", "nothing", "--to", "kohya"]) == 2
    assert "no model of timm" in capsys.readouterr().err
