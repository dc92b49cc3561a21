"""Files for and from other tools, each judged by that tool's own code on tiny models."""

from __future__ import annotations

import json
import warnings

import pytest
import safetensors.torch
import tiny_diffusers as tiny
import tiny_pipelines
import torch
from tiny_pipeline import draw, pipeline

import visionpeft as vp
from visionpeft import formats
from visionpeft.errors import FormatError

pytest.importorskip("diffusers")
ATTENTION = "query key value attn_out"


def close(a, b) -> None:
    assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max()), float((a - b).abs().max())


def shake(tuner: vp.Tuner) -> vp.Tuner:
    torch.manual_seed(4)
    with torch.no_grad():
        for p in tuner.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return tuner


def lora(model, targets: str = "diffusers", **fields) -> vp.Tuner:
    fields = {"rank": 2, "alpha": 3.0} | fields
    return shake(vp.attach(model, vp.LoRA(targets=targets, **fields), probe=False))


def krona(model, a1: int = 4, a2: int = 4, **fields) -> vp.Tuner:
    return shake(vp.attach(model, vp.KronA(a1=a1, a2=a2, **fields), probe=False))


@pytest.fixture
def pipe(tmp_path):
    return pipeline(tmp_path / "tokenizer")


def fresh(tmp_path):
    return pipeline(tmp_path / "tokenizer2")


# ---- diffusers and kohya: pipe.load_lora_weights ---------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["diffusers", "kohya", "linear conv"])
@pytest.mark.parametrize("kind", ["diffusers", "kohya"])
def test_lora_into_a_pipeline_of_diffusers_and_back(kind, targets, pipe, tmp_path):
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    tuner = lora(parts, targets, exclude="*embed*" if targets == "linear conv" else None)
    tuner.scale = 0.7
    expected, file = draw(pipe), tmp_path / "cat.safetensors"
    formats.save(tuner, file, kind)
    assert formats.format_of(file) == kind

    theirs = fresh(tmp_path)
    plain = draw(theirs)
    theirs.load_lora_weights(str(file), adapter_name="cat")
    close(draw(theirs), expected)
    assert float((draw(theirs) - plain).abs().max()) > 1e-2 * float(plain.abs().max())

    ours = fresh(tmp_path)
    back = formats.load(ours, file)
    close(draw(ours), expected)
    assert back.name == "cat" and len(back.sites) == len(tuner.sites)
    back.detach()
    assert torch.equal(draw(ours), plain)


@pytest.mark.parametrize("kind", ["diffusers", "kohya"])
def test_mixed_ranks(kind, tmp_path):
    unet, x = tiny.unet(), tiny.inputs("unet")
    tuner = lora(unet, ATTENTION, ranks={"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 5})
    expected, file = tiny.see(unet, x), tmp_path / "a.safetensors"
    formats.save(tuner, file, kind)
    theirs = fresh(tmp_path)
    theirs.load_lora_weights(str(file))
    close(tiny.see(theirs.unet, x), expected)
    ours = tiny.unet()
    back = formats.load(ours, file)
    close(tiny.see(ours, x), expected)
    back.save(tmp_path / "native.safetensors")
    again = tiny.unet()
    vp.load(again, tmp_path / "native.safetensors")
    close(tiny.see(again, x), expected)


@pytest.mark.parametrize("name", ["flux", "sd3", "sana"])
def test_load_lora_adapter_of_a_transformer(name, tmp_path):
    model, x = tiny.MODELS[name](), tiny.inputs(name)
    tuner = lora(model)
    expected = tiny.see(model, x)
    formats.save(tuner, tmp_path / "a.safetensors", "diffusers")
    theirs = tiny.MODELS[name]()
    theirs.load_lora_adapter(safetensors.torch.load_file(tmp_path / "a.safetensors"), prefix="transformer")
    close(tiny.see(theirs, x), expected)
    ours = tiny.MODELS[name]()
    formats.load(ours, tmp_path / "a.safetensors")
    close(tiny.see(ours, x), expected)


@pytest.mark.parametrize("targets", ["diffusers", "kohya"])
@pytest.mark.parametrize("kind", ["diffusers", "kohya"])
def test_lora_into_the_pipeline_of_sdxl_with_both_its_encoders(kind, targets, tmp_path):
    def see(pipe):
        made = pipe.encode_prompt("a cat", None, "cpu", 1, False)
        generator = torch.Generator().manual_seed(1)
        image = pipe("a cat", num_inference_steps=2, generator=generator, output_type="latent").images
        return torch.cat([t.flatten() for t in (made[0], made[2], torch.as_tensor(image))]).detach()

    pipe = tiny_pipelines.sdxl()
    plain = see(pipe)
    tuner = lora(pipe, targets)
    assert {s.path.split(".")[0] for s in tuner.sites} == {"unet", "text_encoder", "text_encoder_2"}
    expected = see(pipe)
    assert not torch.allclose(expected, plain, rtol=0, atol=1e-2)
    formats.save(tuner, tmp_path / "a.safetensors", kind)
    theirs, ours = tiny_pipelines.sdxl(), tiny_pipelines.sdxl()
    theirs.load_lora_weights(str(tmp_path / "a.safetensors"))
    close(see(theirs), expected)
    formats.load(ours, tmp_path / "a.safetensors")
    close(see(ours), expected)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_lora_into_pipelines_of_transformers(name, tmp_path):
    """Their own loaders; sd-scripts has other names for such, of which diffusers would find none, or stop."""
    def fresh():
        torch.manual_seed(0)
        pipe = tiny_pipelines.PIPELINES[name]()
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()  # T5 has dropout
        return pipe

    def see(pipe):
        generator = torch.Generator().manual_seed(1)
        return torch.as_tensor(pipe("a c", num_inference_steps=1, guidance_scale=1.0, generator=generator,
                                    output_type="latent").images)  # fmt: skip

    pipe = fresh()
    plain = see(pipe)
    tuner = lora(pipe, "diffusers", within="transformer.*")
    expected = see(pipe)
    assert float((expected - plain).abs().max()) > 1e-2
    formats.save(tuner, tmp_path / "a.safetensors", "diffusers")
    theirs = fresh()
    theirs.load_lora_weights(str(tmp_path / "a.safetensors"))
    close(see(theirs), expected)
    for kind in ("kohya", "lycoris", "comfyui"):
        with pytest.raises(FormatError, match="transformer: sd-scripts names and cuts"):
            formats.save(tuner, tmp_path / "b.safetensors", kind)
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("kind", [k for k in (*formats.FORMATS, *formats.VARIANTS) if k != "peft"])
def test_an_embedding_goes_to_peft_alone(kind, pipe, tmp_path):
    """Of `pipe.load_lora_weights` it stops the loading of all else."""
    tuner = lora({"unet": pipe.unet, "text_encoder": pipe.text_encoder}, "*.to_q text_encoder.*.token_embedding")
    with pytest.raises(FormatError, match="token_embedding: an embedding"):
        formats.save(tuner, tmp_path / "a.safetensors", kind)
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize("alpha,header", [(4, True), (2, False)])
def test_a_file_that_diffusers_wrote(alpha, header, pipe, tmp_path):
    """With its header an alpha counts, without it alpha is r."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    config = LoraConfig(r=2, lora_alpha=alpha, init_lora_weights=False, target_modules=["to_q", "ff.net.2"],
                        rank_pattern={"mid_block.*to_q": 3})  # fmt: skip
    torch.manual_seed(0)
    pipe.unet.add_adapter(config)
    text = LoraConfig(r=2, lora_alpha=alpha, init_lora_weights=False, target_modules=["q_proj"])
    pipe.text_encoder.add_adapter(text)
    layers = {part: convert_state_dict_to_diffusers(get_peft_model_state_dict(getattr(pipe, part)))
              for part in ("unet", "text_encoder")}  # fmt: skip
    own = {"unet_lora_adapter_metadata": config.to_dict(), "text_encoder_lora_adapter_metadata": text.to_dict()}
    pipe.save_lora_weights(tmp_path, unet_lora_layers=layers["unet"], text_encoder_lora_layers=layers["text_encoder"],
                           **(own if header else {}))  # fmt: skip
    file = tmp_path / "pytorch_lora_weights.safetensors"
    theirs, ours = fresh(tmp_path), fresh(tmp_path)
    theirs.load_lora_weights(str(file))
    formats.load(ours, file)
    close(draw(ours), draw(theirs))


def test_a_kohya_file_with_an_alpha_for_each_module_and_the_names_of_sdxl(tmp_path):
    """alpha / dim is the scale; SDXL's modules may have their original names."""
    unet, x = tiny.sdxl(), tiny.inputs("sdxl")
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    up = "up_blocks.1.attentions.1.proj_in"
    a, b = torch.randn(2, 16), torch.randn(16, 2)
    expected = {p: unet.get_submodule(p).weight + s / 2 * b @ a for p, s in ((path, 3.0), (up, 0.5))}
    names = {"lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q": 3.0,
             "lora_unet_output_blocks_3_1_proj_in": 0.5}  # fmt: skip
    tensors = {f"{n}.alpha": torch.tensor(s) for n, s in names.items()}
    tensors |= {f"{n}.lora_down.weight": a.clone() for n in names} | {f"{n}.lora_up.weight": b.clone() for n in names}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    tuner = formats.load(unet, tmp_path / "a.safetensors")
    tuner.merge()
    for p, w in expected.items():
        torch.testing.assert_close(unet.get_submodule(p).weight, w)
    assert tiny.see(unet, x).isfinite().all()


def test_the_header_of_a_kohya_file(tmp_path):
    tuner = lora(tiny.unet(cross_attention_dim=768), ATTENTION)
    formats.save(tuner, tmp_path / "my cat.safetensors", "kohya")
    with safetensors.safe_open(tmp_path / "my cat.safetensors", "pt") as file:
        header = file.metadata()
        alphas = {float(file.get_tensor(k)) for k in file.keys() if k.endswith("alpha")}  # noqa: SIM118
    assert header["ss_network_module"] == "networks.lora" and header["ss_network_dim"] == "2" and alphas == {2.0}
    assert header["ss_base_model_version"] == "sd_v1" and header["modelspec.title"] == "my cat"
    assert header["modelspec.architecture"] == "stable-diffusion-v1/lora"


# ---- KronA ----------------------------------------------------------------------------------------------------------


def test_krona_as_lokr_in_diffusers(tmp_path):
    unet, x = tiny.unet(), tiny.inputs("unet")
    tuner = krona(unet)
    tuner.scale = 0.5
    expected = tiny.see(unet, x)
    vp.formats.lycoris.save(tuner, tmp_path / "a.safetensors", as_diffusers=True)
    theirs = tiny.unet()
    theirs.load_lora_adapter(safetensors.torch.load_file(tmp_path / "a.safetensors"), prefix=None)
    close(tiny.see(theirs, x), expected)
    ours = tiny.unet()
    back = formats.load(ours, tmp_path / "a.safetensors")
    close(tiny.see(ours, x), expected)
    assert back.method.key == "krona" and back.num_parameters == tuner.num_parameters


def test_krona_of_a_pipeline_as_lokr_in_diffusers(pipe, tmp_path):
    tuner, file = krona(pipe), tmp_path / "a.safetensors"
    expected = draw(pipe)
    formats.save(tuner, file, "diffusers-lokr")
    theirs = fresh(tmp_path)
    theirs.unet.load_lora_adapter(safetensors.torch.load_file(file), prefix="unet")
    close(draw(theirs), expected)
    ours, alone = fresh(tmp_path), fresh(tmp_path)
    bare = formats.load(alone.unet, file)
    assert formats.load(ours, file).method.key == bare.method.key == "krona"
    close(draw(ours), expected)
    close(draw(alone), expected)
    formats.save(bare, file, "diffusers-lokr")
    ours = fresh(tmp_path)
    assert formats.load(ours, file).sites[0].path.startswith("unet.")
    close(draw(ours), expected)
    both = krona({"unet": tiny.unet(), "text_encoder": tiny.text()}, targets="query")
    with pytest.raises(FormatError, match="is on text_encoder, unet, and load_lora_adapter is for one"):
        formats.save(both, file, "diffusers-lokr")


def test_krona_of_two_sizes_under_the_names_that_comfyui_has(pipe, tmp_path):
    """ComfyUI takes lora_unet_<path of diffusers> and multiplies lokr_w1 and lokr_w2 of whatever shapes."""
    tuner = krona(pipe, 2, 8)
    formats.save(tuner, tmp_path / "a.safetensors", "comfyui")
    found = safetensors.torch.load_file(tmp_path / "a.safetensors")
    tuner.merge()
    for site in tuner.sites:
        rest = site.path.removeprefix("unet.")
        key = f"lora_unet_{rest.replace('.', '_')}"
        delta = pipe.unet.get_submodule(rest).weight - tiny.unet().get_submodule(rest).weight
        torch.testing.assert_close(torch.kron(found.pop(f"{key}.lokr_w1"), found.pop(f"{key}.lokr_w2")), delta)
        assert found.pop(f"{key}.alpha") == 1.0
    assert not found


def test_krona_as_lokr_in_lycoris(tmp_path):
    lycoris = pytest.importorskip("lycoris")
    unet, x = tiny.unet(), tiny.inputs("unet")
    expected = tiny.see(krona(unet).model, x)
    formats.save(vp.tuners(unet)["default"], tmp_path / "a.safetensors", "lycoris")
    theirs = tiny.unet()
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(tmp_path / "a.safetensors"), theirs)
    network.apply_to()
    close(tiny.see(theirs, x), expected)
    ours = tiny.unet()
    assert formats.load(ours, tmp_path / "a.safetensors").method.key == "krona"
    close(tiny.see(ours, x), expected)


@pytest.mark.parametrize("algo,fields", [("lokr", {"factor": 4, "full_matrix": True}), ("lokr", {"factor": -1}),
                                         ("lokr", {"factor": 2, "linear_dim": 2, "decompose_both": True}),
                                         ("lora", {}), ("locon", {"linear_dim": 3})], ids=str)  # fmt: skip
def test_files_that_lycoris_wrote(algo, fields, tmp_path):
    lycoris = pytest.importorskip("lycoris")
    theirs, x = tiny.unet(), tiny.inputs("unet")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lycoris.LycorisNetwork.apply_preset({"target_module": ["Attention"]})
        network = lycoris.create_lycoris(theirs, 1.0, **({"linear_dim": 2, "linear_alpha": 3, "algo": algo} | fields))
    network.apply_to()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    expected = tiny.see(theirs, x)
    network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {})
    ours = tiny.unet()
    plain = tiny.see(ours, x)
    tuner = formats.load(ours, tmp_path / "a.safetensors")
    close(tiny.see(ours, x), expected)
    assert float((expected - plain).abs().max()) > 1e-2 and len(tuner.sites) == 32


def test_krona_of_two_sizes_is_refused_where_it_would_be_read_wrongly_and_goes_as_exact_lora(tmp_path):
    unet, x = tiny.unet(), tiny.inputs("unet")
    tuner = krona(unet, 2, 8)
    expected = tiny.see(unet, x)
    with pytest.raises(FormatError, match="one factor for rows and columns.*A is 2 x 8"):
        formats.save(tuner, tmp_path / "a.safetensors", "lycoris")
    with pytest.warns(UserWarning, match=r"exact LoRA: [\d,]+ numbers instead of [\d,]+ \(\d"):
        formats.save(tuner, tmp_path / "b.safetensors", "diffusers")
    theirs = fresh(tmp_path)
    theirs.load_lora_weights(str(tmp_path / "b.safetensors"))
    close(tiny.see(theirs.unet, x), expected)
    vp.formats.lycoris.save(tuner, tmp_path / "c.safetensors", any_shape=True)
    found = safetensors.torch.load_file(tmp_path / "c.safetensors")  # what ComfyUI does: the product of what is there
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    key = f"lycoris_{module.replace('.', '_')}"
    tuner.merge()
    delta = unet.get_submodule(module).weight - tiny.unet().get_submodule(module).weight
    torch.testing.assert_close(torch.kron(found[f"{key}.lokr_w1"], found[f"{key}.lokr_w2"]), delta)


def test_the_exact_lora_in_double_precision():
    from visionpeft.formats.common import Kron, exact_lora

    for a, b in (((4, 64), (80, 5)), ((2, 8), (8, 2)), ((1, 1), (6, 4))):
        w1, w2 = torch.randn(a), torch.randn(b)
        found = exact_lora(Kron("x", w1, w2))
        assert found.rank == min(a) * min(b)
        torch.testing.assert_close(found.up @ found.down, torch.kron(w1, w2), rtol=1e-4, atol=1e-4)


# ---- PEFT -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["unet", "dit", "text", "timm"])
@pytest.mark.parametrize("method", ["lora", "krona", "krona 2 4"])
def test_peft_folders(name, method, tmp_path):
    peft = pytest.importorskip("peft")
    make, x, targets = _models(name)
    model = make()
    if method == "lora":
        tuner = lora(model, targets)
    else:
        tuner = krona(model, *((2, 4) if "2" in method else (4, 4)), targets=targets)
    expected, folder = see(model, x), tmp_path / "folder"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "KronA is written")
        formats.save(tuner, folder, "peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    fused = name == "timm"
    assert config["peft_type"] == ("LOKR" if method == "krona" and not fused else "LORA")
    theirs = peft.PeftModel.from_pretrained(make(), str(folder))
    close(see(theirs.base_model.model, x), expected)
    ours = make()
    formats.load(ours, folder, name="back")
    close(see(ours, x), expected)


def _models(name):
    if name == "timm":
        timm = pytest.importorskip("timm")
        small = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3)
        return (lambda: tiny.stir(timm.create_model("vit_tiny_patch16_224", **small)), (torch.ones(2, 3, 32, 32),),
                "query value attn_out")  # fmt: skip
    return tiny.MODELS[name], tiny.inputs(name), ATTENTION


@torch.no_grad()
def see(model, x):
    out = model(*x)
    return out if isinstance(out, torch.Tensor) else tiny.run(lambda *a: out, x)


@pytest.mark.parametrize("fields", [
    {"lora_alpha": 5}, {"use_rslora": True, "lora_alpha": 5}, {"rank_pattern": {"attn1.to_q": 3}},
    {"alpha_pattern": {"mid_block.*to_q": 7}, "target_modules": ["to_q", "conv1", "proj_in"]}], ids=str)  # fmt: skip
def test_folders_that_peft_wrote(fields, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(**({"r": 2, "init_lora_weights": False, "target_modules": ["to_q", "to_v"]} | fields))
    theirs, x = peft.get_peft_model(tiny.unet(), config), tiny.inputs("unet")
    theirs.save_pretrained(str(tmp_path / "a"))
    ours = tiny.unet()
    formats.load(ours, tmp_path / "a")
    close(tiny.see(ours, x), tiny.see(theirs.base_model.model, x))


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_2"])
def test_folders_of_peft_whose_factors_belong_to_another_base(init, tmp_path):
    """PEFT takes them out of the base's weights when it loads; made into a plain LoRA by PEFT itself, they load."""
    peft = pytest.importorskip("peft")
    x = tiny.inputs("unet")
    config = peft.LoraConfig(r=2, init_lora_weights=init, target_modules=["to_q"])
    theirs = peft.get_peft_model(tiny.unet(), config)
    theirs.save_pretrained(str(tmp_path / "start"))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.add_(torch.randn_like(p), alpha=0.1)
    theirs.save_pretrained(str(tmp_path / "moved"))
    ours = tiny.unet()
    with pytest.raises(FormatError, match=f"init_lora_weights='{init}' took a part out of the base"):
        formats.load(ours, tmp_path / "moved")
    theirs.save_pretrained(str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    formats.load(ours, tmp_path / "plain")
    close(tiny.see(ours, x), tiny.see(theirs.base_model.model, x))


def test_a_folder_of_peft_that_fits_several_components(tmp_path):
    parts = {"text_encoder": tiny.text(), "text_encoder_2": tiny.text()}
    formats.save(lora(tiny.text(), "query"), tmp_path / "a", "peft")
    with pytest.raises(FormatError, match="is in text_encoder.encoder.* and in text_encoder_2.encoder.*give the comp"):
        formats.load(parts, tmp_path / "a")
    formats.load(parts["text_encoder_2"], tmp_path / "a")


@pytest.mark.parametrize("fields", [{"r": 2, "alpha": 3}, {"r": 64, "alpha": 16, "decompose_factor": 4}], ids=str)
def test_lokr_folders_that_peft_wrote(fields, tmp_path):
    """PEFT scales by alpha / r also where both factors are whole."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoKrConfig(init_weights=False, target_modules=["to_q", "to_v"], **fields)
    theirs, x = peft.get_peft_model(tiny.unet(), config), tiny.inputs("unet")
    theirs.save_pretrained(str(tmp_path / "a"))
    ours = tiny.unet()
    formats.load(ours, tmp_path / "a")
    close(tiny.see(ours, x), tiny.see(theirs.base_model.model, x))


def test_a_lokr_of_convs_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoKrConfig(r=2, target_modules=["conv1"])
    peft.get_peft_model(tiny.unet(), config).save_pretrained(str(tmp_path / "a"))
    with pytest.raises(FormatError, match="conv1 is a LoKr of a conv with a kernel"):
        formats.load(tiny.unet(), tmp_path / "a")


def test_embeddings_in_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model, x = tiny.text(), tiny.inputs("text")
    tuner = lora(model, "embeddings.token_embedding")
    expected = tiny.see(model, x)
    formats.save(tuner, tmp_path / "a", "peft")
    theirs = peft.PeftModel.from_pretrained(tiny.text(), str(tmp_path / "a"))
    close(tiny.see(theirs.base_model.model, x), expected)
    ours = tiny.text()
    formats.load(ours, tmp_path / "a")
    close(tiny.see(ours, x), expected)


@pytest.mark.parametrize("fields,word", [({"use_dora": True}, "DoRA"), ({"bias": "all"}, "biases"),
                                         ({"modules_to_save": ["conv_out"]}, "whole modules")])  # fmt: skip
def test_what_a_lora_here_cannot_be_is_refused(fields, word, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q"], **fields)
    peft.get_peft_model(tiny.unet(), config).save_pretrained(str(tmp_path / "a"))
    with pytest.raises(FormatError, match=word):
        formats.load(tiny.unet(), tmp_path / "a")


# ---- cloneofsimo ----------------------------------------------------------------------------------------------------


def test_lists_of_cloneofsimo(pipe, tmp_path):
    """The reader's rule, written out: up and down in turn for every Linear below the owners, as modules come."""
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    tuner = lora(parts, "query value unet.*.ff.net.0.proj")
    expected, file = draw(pipe), tmp_path / "lora.pt"
    formats.save(tuner, file, "cloneofsimo")
    theirs = fresh(tmp_path)
    beside = tmp_path / "lora.text_encoder.pt"
    for model, owners, path in ((theirs.unet, {"Attention", "GEGLU"}, file),
                                (theirs.text_encoder, {"CLIPAttention"}, beside)):  # fmt: skip
        tensors = torch.load(path, weights_only=True)
        for owner in (m for m in model.modules() if type(m).__name__ in owners):
            for linear in (m for m in owner.modules() if isinstance(m, torch.nn.Linear)):
                up, down = tensors.pop(0), tensors.pop(0)
                linear.weight.data += up @ down
        assert tensors == []
    close(draw(theirs), expected)
    ours = fresh(tmp_path)
    formats.load({"unet": ours.unet, "text_encoder": ours.text_encoder}, file)
    close(draw(ours), expected)


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", formats.FORMATS)
@pytest.mark.parametrize("method,why", [("difffit", "learnt in place"), ("ssf", "not a change of low rank")])
def test_other_methods_are_refused_with_the_reason(kind, method, why, tmp_path):
    tuner = vp.attach(tiny.unet(), method, probe=False)
    with pytest.raises(FormatError, match=why):
        formats.save(tuner, tmp_path / "a", kind)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", formats.FORMATS)
def test_a_file_for_another_model_names_what_is_missing(kind, tmp_path):
    tuner = lora(tiny.unet(), ATTENTION)
    formats.save(tuner, tmp_path / "a.pt", kind)
    other = tiny.unet(layers_per_block=2, block_out_channels=(16, 16), cross_attention_dim=8)
    with pytest.raises(FormatError, match="not here|is 16x8 here|places for them|are not here"):
        formats.module(kind).load(other, tmp_path / "a.pt")
    assert vp.tuners(other) == {}


def test_files_of_no_kind_are_named(tmp_path):
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "w.safetensors")
    safetensors.torch.save_file({"base_model.model.x.lora_A.weight": torch.ones(1)}, tmp_path / "p.safetensors")
    safetensors.torch.save_file({"lora_unet_x.hada_w1_a": torch.ones(1), "lora_unet_x.lora_down.weight": torch.ones(1)},
                                tmp_path / "h.safetensors")  # fmt: skip
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for name, word in (
        ("w", "keys look like w"),
        ("p", "give the folder"),
        ("broken", "no readable"),
        ("h", "hada_w1_a"),
    ):
        with pytest.raises(FormatError, match=word):
            formats.load(tiny.unet(), tmp_path / f"{name}.safetensors")
    torch.save({"state": 1}, tmp_path / "x.pt")
    with pytest.raises(FormatError, match="not a list"):
        formats.load(tiny.unet(), tmp_path / "x.pt")
