"""Textual Inversion: rows of the table by hand, tokenizers, pivotal tuning, and diffusers' own reader."""

from __future__ import annotations

import big_diffusers as big
import pytest
import tiny_diffusers as tiny
import torch
from tiny_pipeline import pipeline
from torch import nn

import visionpeft as vp
from visionpeft.errors import FormatError, SiteError, VisionPEFTError
from visionpeft.methods.textual_inversion import new_token, save_embedding

pytest.importorskip("diffusers")
TI = vp.methods.TextualInversion


def test_rows_behind_the_table_and_in_it():
    torch.manual_seed(0)
    for first, words in ((None, [6, 7, 3]), (7, [7, 1, 3]), (3, [3, 4, 1])):
        table = nn.Embedding(6, 4).double()
        original = table.weight
        tuner = vp.attach(table, TI(vectors=2, first=first, initial=(1, 2), targets="embed"), probe=False)
        (adapter,) = tuner.adapters.values()
        assert torch.equal(adapter.v.detach(), original[[1, 2]])
        nn.init.normal_(adapter.v)
        start = 6 if first is None else first
        whole = torch.zeros(10, 4, dtype=torch.float64)
        whole[:6] = original.detach()
        whole = whole.index_put((torch.arange(start, start + 2),), adapter.v)
        ids = torch.tensor([words])
        torch.testing.assert_close(table(ids), whole[ids], rtol=0, atol=0)
        found, wanted = (torch.autograd.grad(y.cos().sum(), adapter.v)[0] for y in (table(ids), whole[ids]))
        torch.testing.assert_close(found, wanted)
        tuner.merge()
        assert torch.equal(table(ids), whole[ids].detach())
        tuner.detach()
        assert table.weight is original


def test_two_words_in_any_order():
    table = nn.Embedding(6, 4)
    for name, first in (("ink", 7), ("cat", 6)):
        tuner = vp.attach(table, TI(first=first, targets="embed"), name=name, probe=False)
        nn.init.constant_(next(iter(tuner.adapters.values())).v, first)
    vp.activate(table, {"ink": 1.0, "cat": 1.0})
    assert table(torch.tensor([7, 6]))[:, 0].tolist() == [7, 6]
    vp.activate(table, "ink")
    assert table(torch.tensor([7]))[0, 0] == 7
    with pytest.raises(VisionPEFTError, match="wholly or not at all"):
        vp.activate(table, {"ink": 0.5})


def test_wrong_words_are_named(tmp_path):
    pipe = pipeline(tmp_path / "t")
    with pytest.raises(SiteError, match="initial=50 is no id of its 50 words"):
        vp.attach(pipe.text_encoder, TI(initial=(50,)))
    with pytest.raises(VisionPEFTError, match="'a' is a word of this tokenizer already"):
        new_token(pipe.tokenizer, "a")
    with pytest.raises(FormatError, match="found 0"):
        save_embedding(vp.attach(pipe.unet, "lora"), tmp_path / "x.safetensors", "<cat>")


@pytest.mark.parametrize("vectors", [1, 2])
def test_pivotal_tuning_learns_both_and_diffusers_reads_the_word(vectors, tmp_path):
    pipe = pipeline(tmp_path / "t")
    first = new_token(pipe.tokenizer, "<cat>", vectors)
    assert first == 50
    word = vp.attach(pipe, TI(vectors=vectors, first=first, initial=(5,)), name="word", probe=False)
    lora = vp.attach(pipe, vp.LoRA(rank=2), name="lora", probe=False)
    nn.init.normal_(next(iter(lora.adapters.values())).b)
    prompt = pipe.maybe_convert_prompt("a <cat>", pipe.tokenizer) if vectors == 1 else "a <cat> <cat>_1"
    ids = pipe.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
    assert set(range(first, first + vectors)) <= set(ids[0].tolist())
    text = pipe.text_encoder(ids).last_hidden_state
    noise = torch.randn(1, 4, 8, 8)
    pipe.unet(noise, torch.tensor([5]), text).sample.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in word.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in lora.parameters())
    with torch.no_grad():
        next(word.parameters()).add_(torch.randn(vectors, 16))
        expected = pipe.text_encoder(ids).last_hidden_state
    save_embedding(word, tmp_path / "learned_embeds.safetensors", "<cat>")
    theirs = pipeline(tmp_path / "t2")
    theirs.load_textual_inversion(str(tmp_path / "learned_embeds.safetensors"))
    converted = theirs.maybe_convert_prompt("a <cat>", theirs.tokenizer)
    found = theirs.tokenizer(converted, padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(found, ids)
    with torch.no_grad():
        torch.testing.assert_close(theirs.text_encoder(found).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


def test_a_file_of_ours(tmp_path):
    model = tiny.text()
    tuner = vp.attach(model, TI(vectors=2, initial=(5, 6)))
    nn.init.normal_(next(tuner.parameters()))
    ids = torch.tensor([[48, 50, 51, 49]])
    expected = tiny.see(model, (ids,))
    tuner.save(tmp_path / "cat.safetensors")
    other = tiny.text()
    vp.load(other, tmp_path / "cat.safetensors", probe=False)
    assert torch.equal(tiny.see(other, (ids,)), expected)


def test_count_on_the_text_encoder_of_stable_diffusion():
    tuner = vp.attach(big.meta("clip"), vp.methods.TextualInversion(vectors=4), probe=False)
    assert tuner.num_parameters == 4 * 768
    tuner.detach()
