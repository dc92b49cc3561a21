"""Templates, tokens and zero-shot weights: open_clip's own builder is the oracle."""

from __future__ import annotations

import json
import logging

import open_clip
import pytest
import tiny_clip
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from safetensors.torch import save_file
from tiny_clip import tokenizer

import visionpeft as vp
from visionpeft.clip import ClipError, class_prompts, encode_tokens, read_templates, tokenize, zero_shot_weights
from visionpeft.clip import model as models
from visionpeft.clip.text import is_causal

CLASSES = ["cat", "dog", "sports_car", "a rather long name of a class", "tree"]


def tiny(kind: str = "flat", **text):
    cls = CLIP if kind == "flat" else CustomTextCLIP
    return tiny_clip.tiny(text={"layers": 2, **text}, cls=cls, embed=24, dtype=torch.float64)


def coca():
    vision = {**tiny_clip.VISION, "attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 3}
    text = {**tiny_clip.TEXT, "layers": 2, "width": 24, "embed_cls": True, "output_tokens": True}
    decoder = {**tiny_clip.TEXT, "width": 24, "vocab_size": 49408}
    torch.manual_seed(4)
    return CoCa(24, decoder, text, {**vision, "output_tokens": True}).double().eval()


def hugging_face():
    from open_clip.hf_model import HFTextEncoder
    from transformers import RobertaConfig

    config = RobertaConfig(vocab_size=49408, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                           intermediate_size=32, max_position_embeddings=40, pad_token_id=0)  # fmt: skip
    model = tiny("custom")
    torch.manual_seed(4)
    model.text = HFTextEncoder("local", 24, config=config, pooler_type="mean_pooler", proj_type="linear",
                               pretrained=False)  # fmt: skip
    return model.double().eval()


KINDS = {
    "flat": lambda: tiny(),
    "custom": lambda: tiny("custom"),
    "no mask": lambda: tiny("custom", no_causal_mask=True, pool_type="last"),
    "eos": lambda: tiny("custom", pool_type="eos", eos_id=49407),
    "linear": lambda: tiny("custom", proj_bias=True),
    "coca": coca,
    "hugging face": hugging_face,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("templates", ["simple", "a photo of a {}."])
def test_weights_are_those_of_open_clips_own_builder(kind, templates):
    model = KINDS[kind]()
    names = [c.replace("_", " ") for c in CLASSES]
    found = zero_shot_weights(model, tokenizer, CLASSES, read_templates(templates), batch=4)
    oracle = open_clip.build_zero_shot_classifier(model, tokenizer, names, read_templates(templates))
    torch.testing.assert_close(found, oracle, rtol=0, atol=1e-13)
    assert found.shape == (24, 5)
    assert is_causal(model) == (kind not in ("no mask", "coca", "hugging face"))


def test_open_clips_names_of_imagenet_are_taken_though_two_occur_twice():
    model = tiny()
    names = open_clip.IMAGENET_CLASSNAMES
    found = zero_shot_weights(model, tokenizer, names, ["a photo of a {}."])
    torch.testing.assert_close(found, open_clip.build_zero_shot_classifier(model, tokenizer, names,
                               ["a photo of a {}."], num_classes_per_batch=250), rtol=0, atol=1e-12)  # fmt: skip
    with pytest.raises(ClipError, match="'missile' is listed more than once"):
        class_prompts(names[:-1], ["{}"])


def test_padding_is_cut_off_where_nothing_depends_on_it():
    model = tiny()
    ids = tokenize(tokenizer, ["a cat", "a dog on a long road"], 32)
    lengths = []
    hook = model.ln_final.register_forward_hook(lambda m, args, out: lengths.append(out.shape[1]))
    found = encode_tokens(model, ids)
    hook.remove()
    assert lengths == [8]
    torch.testing.assert_close(found, model.encode_text(ids), rtol=0, atol=1e-13)


def test_given_embeddings_take_the_place_of_the_tokens():
    model = tiny()
    ids = tokenize(tokenizer, ["a cat", "a dog"], 32)
    own = model.token_embedding(ids)
    torch.testing.assert_close(encode_tokens(model, ids, own), model.encode_text(ids), rtol=0, atol=1e-13)
    moved = own.clone()
    moved[:, 1] = torch.randn(16)
    assert (encode_tokens(model, ids, moved) - encode_tokens(model, ids)).abs().max() > 1e-3
    with pytest.raises(ClipError, match="learnt prompts need open_clip's causal text tower"):
        encode_tokens(KINDS["no mask"](), ids, own)


def test_training_mode_is_left_as_it_was_and_no_gradient_flows():
    model = tiny().train()
    model.ln_final.eval()
    modes = [m.training for m in model.modules()]
    assert not zero_shot_weights(model, tokenizer, CLASSES, ["{}"]).requires_grad
    assert [m.training for m in model.modules()] == modes


def test_template_sets_and_both_forms_of_place(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"one": ["a {c}."], "two": ["{} x", "y {c}"]}))
    assert class_prompts(["sea_lion", "cat"], read_templates(f"{file}:two")) == [
        "sea lion x", "y sea lion", "cat x", "y cat"
    ]  # fmt: skip
    (tmp_path / "list.json").write_text(json.dumps(["{c}, {{really}}"]))
    assert class_prompts(["cat"], read_templates(str(tmp_path / "list.json"))) == ["cat, {{really}}"]
    assert class_prompts(["set {}", "map {c}"], ["a {c}."]) == ["a set {}.", "a map {c}."]
    assert len(read_templates("openai")) == 80 and len(read_templates("simple")) == 7
    assert class_prompts(["forest"], read_templates("coop:eurosat")) == ["a centered satellite photo of forest."]


@pytest.mark.parametrize(
    "spec, message",
    [
        ("coop:cats", "CoOp has none for it; it has imagenet"),
        ("a photo", "write {} or {c} once"),
        ("{} and {}", "write {} or {c} once"),
        ("absent.json", "cannot be read"),
        ([], "the list is empty"),
    ],
)
def test_bad_templates_are_named(spec, message):
    with pytest.raises(ClipError, match=message):
        read_templates(spec)


def test_bad_json_and_bad_classes_are_named(tmp_path):
    file = tmp_path / "t.json"
    file.write_text('{"a": ["{}"]}')
    with pytest.raises(ClipError, match="t.json:<name> with one of a"):
        read_templates(str(file))
    bad = (([], "empty"), (["a", ""], "class 1 has no name"), (["a", "b", "a"], "'a' is listed more"))
    for classes, message in bad:
        with pytest.raises(ClipError, match=message):
            class_prompts(classes, ["{}"])


def test_tokens_beyond_the_context_are_an_error_that_shows_the_text():
    fits = "word " * 30
    assert tokenize(tokenizer, [fits], 32).shape == (1, 32)
    assert torch.equal(tokenize(tokenizer, [fits, "cat"], 32), tokenizer([fits, "cat"]))
    long = tokenize(tokenizer, ["cat", fits + "more"], 32, cut=True)
    assert torch.equal(long[1, :-1], tokenize(tokenizer, [fits], 32)[0, :-1]) and int(long[1, -1]) == 49407
    with pytest.raises(ClipError, match=r"1 of 2 texts have more tokens than the context of 32: 'word .*\.\.\.'"):
        tokenize(tokenizer, ["cat", fits + "more"], 32)


def words(texts: list[str], context_length: int, end: int = 1, padding: int = 1) -> torch.Tensor:
    """A token a word, then the end; what is too long is cut before the end, as tokenizers of transformers do it."""
    rows = [[2 + len(word) for word in text.split()][: context_length - 1] + [end] for text in texts]
    return torch.tensor([row + [padding] * (context_length - len(row)) for row in rows])


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("over", [0, 1, 2, 9])
def test_texts_that_are_too_long_are_known_also_where_padding_is_the_end(padding, over):
    """SigLIP has one token for both."""
    def tokenizer(texts, context_length):
        return words(texts, context_length, padding=padding)

    texts = ["a cat", "a b c d", "word " * (7 + over)]  # with the end 8 tokens, if over is 0
    if over:
        with pytest.raises(ClipError, match="1 of 3 texts have more tokens than the context of 8: 'word word"):
            tokenize(tokenizer, texts, 8)
    else:
        assert torch.equal(tokenize(tokenizer, texts, 8), tokenizer(texts, 8))


def test_names_of_models_and_quickgelu_are_checked(tmp_path, monkeypatch):
    with pytest.raises(ClipError, match="no model 'ViT-B-33', perhaps ViT-B-32"):
        models.build("ViT-B-33")
    with pytest.raises(ClipError, match="neither a file nor a tag of ViT-B-32; its tags: .*openai"):
        models.build("ViT-B-32", "openay")
    with pytest.raises(ClipError, match="trained with QuickGELU, and ViT-B-32 has .* Use ViT-B-32-quickgelu"):
        models.check_activation("ViT-B-32", "openai")
    models.check_activation("ViT-B-32-quickgelu", "openai")
    models.check_activation("ViT-B-32", "laion2b_s34b_b79k")
    file = tmp_path / "openai.pt"
    torch.save({k: torch.tensor(1) for k in (*models.OPENAI_KEYS, "logit_scale")}, file)
    with pytest.raises(ClipError, match="Use ViT-B-16-quickgelu"):
        models.check_activation("ViT-B-16", str(file))
    for damaged in (b"no checkpoint", b"", b"\x80", b"\x80\x02.", file.read_bytes()[:300]):
        for name in ("bad.pt", "bad.safetensors"):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(ClipError, match="no safe torch checkpoint"):
                models.check_activation("ViT-B-16", str(tmp_path / name))
    monkeypatch.setattr(models, "_wants_quick_gelu", lambda *_: False)
    with pytest.raises(ClipError, match="trained with GELU, and ViT-B-32-quickgelu has .* Use ViT-B-32$"):
        models.check_activation("ViT-B-32-quickgelu", "some")


def test_a_folder_of_open_clips_has_configuration_weights_and_preprocessing(tmp_path):
    model = tiny_clip.tiny()
    config = {"embed_dim": 12, "vision_cfg": tiny_clip.VISION, "text_cfg": tiny_clip.TEXT}
    told = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.6, 0.7]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(told))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    clip = models.build(f"local-dir:{tmp_path}")
    found = clip.model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())
    assert (clip.preprocessing.mean, clip.preprocessing.std) == ((0.5, 0.4, 0.3), (0.5, 0.6, 0.7))
    assert clip.preprocessing.size == (16, 16) and clip.tokenizer(["a"]).shape == (1, 32)
    with pytest.raises(ClipError, match="brings its own weights: leave the checkpoint 'openai' out"):
        models.build(f"local-dir:{tmp_path}", "openai")
    with pytest.raises(ClipError, match="local-dir:nowhere with weights None cannot be made: .*not found"):
        models.build("local-dir:nowhere")


def test_a_model_without_weights_is_refused(tmp_path):
    """It would be evaluated, and tuned, as it was drawn."""
    with pytest.raises(ClipError, match=r"RN50 needs weights, .*one of its tags: openai, .*'random' if that is meant"):
        models.build("RN50")
    config = {"embed_dim": 12, "vision_cfg": tiny_clip.VISION, "text_cfg": tiny_clip.TEXT}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    with pytest.raises(ClipError, match="local-dir:.* with weights None cannot be made"):
        models.build(f"local-dir:{tmp_path}")


def test_a_built_model_knows_its_preprocessing_and_tokenizer():
    logging.disable(logging.WARNING)
    clip = models.build("RN50", "random")
    logging.disable(logging.NOTSET)
    assert clip.preprocessing.size == (224, 224) and clip.preprocessing.resize == "short_side_crop"
    assert clip.tokenizer(["a"]).shape == (1, 77)


@pytest.mark.parametrize("kind", ["flat", "custom", "linear"])
@pytest.mark.parametrize("method", [vp.LoRA(rank=2, targets="linear projection"), vp.AdaptFormer(hidden=4),
                                    vp.methods.BitFit(), vp.methods.LNTuning()])  # fmt: skip
def test_adapters_act_where_the_padding_is_cut_off(kind, method):
    model = KINDS[kind]()
    ids = tokenize(tokenizer, ["a cat", "a dog on a long road"], 32)
    plain = encode_tokens(model, ids)
    tuner = vp.attach(model, method)
    with torch.no_grad():
        for p in tuner.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    found = encode_tokens(model, ids)
    torch.testing.assert_close(found, model.encode_text(ids), rtol=0, atol=1e-12)
    assert (found - plain).abs().max() > 0.01
