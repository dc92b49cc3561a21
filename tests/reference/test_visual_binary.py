"""Adapters of one bit: their formula, what a file weighs, to the byte as published, and that it comes back exactly."""

from __future__ import annotations

import pytest
import safetensors.torch
import timm
import torch
from test_formulas import D, assert_equal, image, shake, vit
from test_visual_formulas import by_site, walk
from torch import Tensor

import visionpeft as vp
from visionpeft.methods.binary import Bits

M = vp.methods
QUARTILE = float(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(0.75, dtype=torch.float64)))


def one_bit(w: Tensor) -> Tensor:
    mean, deviation = w.mean(), ((w - w.mean()).square().sum() / (w.numel() - 1)).sqrt()
    return (w - mean).sign() * QUARTILE * deviation + mean


def test_binary_adaptformer():
    """x + MLP + s Up_1 ReLU(Down_1 x), x the stream."""
    model, x = vit(), image()
    tuner = shake(vp.attach(model, M.BinaryAdaptFormer(hidden=4, scale=0.7)))
    own = by_site(tuner)

    def mlp(p: str, h: Tensor, u: Tensor, z: Tensor) -> Tensor:
        down, up = (one_bit(own[p, "mlp"][f"{n}.weight"]) for n in ("down", "up"))
        return z + 0.7 * (h @ down.T).clamp(min=0) @ up.T

    assert_equal(model(x).detach(), walk(model, x, mlp=mlp).detach())
    with pytest.raises(vp.errors.MergeError, match=r"blocks\.0:mlp"):
        tuner.merge()


def test_binary_lora():
    """q and v get s B_1 A_1 u; merged it is the same."""
    model, x = vit(), image()
    tuner = shake(vp.attach(model, M.BinaryLoRA(rank=4, scale=0.7)))
    own = by_site(tuner)

    def op(path: str, u: Tensor, y: Tensor) -> Tensor:
        if not path.endswith("qkv"):
            return y
        deltas = [
            0.7 * u @ (one_bit(own[path, part]["up.weight"]) @ one_bit(own[path, part]["down.weight"])).T
            for part in ("query", "value")
        ]
        return y + torch.cat([deltas[0], torch.zeros_like(u), deltas[1]], -1)

    expected = walk(model, x, op).detach()
    assert_equal(model(x).detach(), expected)
    tuner.merge()
    assert_equal(model(x).detach(), expected)


def test_gradients_pass_the_sign_and_flow_through_the_moments():
    """d/dW of sum(g * (code(n) d + m)) with n = (W - m) / (d + 1e-5) and code'(n) taken for 1, by the chain rule."""
    bits = Bits(4, 5, dtype=torch.float64)
    with torch.no_grad():
        bits.weight.normal_()
    g, w = torch.randn(4, 5, dtype=torch.float64), bits.weight.detach()
    (found,) = torch.autograd.grad((bits() * g).sum(), bits.weight)
    n, mean, d = w.numel(), w.mean(), w.std()
    code, normal = (w - mean).sign() * QUARTILE, (w - mean) / (d + 1e-5)
    to_normal = g * d
    to_d = (g * code).sum() - (to_normal * normal).sum() / (d + 1e-5)
    to_mean = g.sum() - to_normal.sum() / (d + 1e-5)
    assert_equal(found, to_normal / (d + 1e-5) + to_mean / n + to_d * (w - mean) / (d * (n - 1)))


@pytest.mark.parametrize("shape", [(3, 8), (1, 7), (5, 5), (32, 192)], ids=str)
def test_bits_come_back_to_the_bit(shape):
    bits, again = Bits(*shape), Bits(*shape)
    with torch.no_grad():
        bits.weight.normal_(1e-4, 0.02)
        packed = bits.pack()
        again.unpack(**packed)
    assert packed["bits"].dtype == torch.uint8 and packed["bits"].numel() == -(-shape[0] * shape[1] // 8)
    assert packed["moments"].dtype == torch.float32
    assert torch.equal(bits(), again())
    assert all(torch.equal(a, b) for a, b in zip(packed.values(), again.pack().values(), strict=True))


def test_the_first_weight_is_in_the_lowest_bit():
    bits = Bits(2, 8)
    with torch.no_grad():
        bits.weight.copy_(torch.tensor([[1.0, -1, -1, -1, -1, -1, -1, 1], [-1, 1, 1, 1, -1, 1, -1, 1]]))
        assert bits.pack()["bits"].tolist() == [0b10000001, 0b10101110]


ROWS = {  # CIFAR-100: Bi-AdaptFormer and Bi-LoRA, hidden or rank, binary head -> bytes
    ("adaptformer", 32, False): 381_520, ("adaptformer", 32, True): 83_528,
    ("adaptformer", 1, False): 310_096, ("adaptformer", 1, True): 12_104,
    ("lora", 32, False): 455_440, ("lora", 32, True): 157_448,
    ("lora", 1, False): 312_592, ("lora", 1, True): 14_600,
}  # fmt: skip


@pytest.fixture(scope="module")
def base():
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=100)
    return model.to_empty(device="cpu").eval()  # values do not matter, sizes do


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_files_weigh_what_the_paper_says(row, base, tmp_path):
    kind, size, head = row
    method = M.BinaryAdaptFormer(hidden=size, binary_head=head) if kind == "adaptformer" else None
    method = method or M.BinaryLoRA(rank=size, binary_head=head)
    tuner = vp.attach(base, method, train=None if head else "head", probe=False)
    tuner.save(tmp_path / "a.safetensors")
    tuner.detach()
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors").values()
    assert sum(t.numel() * t.element_size() for t in tensors) == ROWS[row]


@pytest.mark.parametrize("head", [True, False], ids=["binary head", "head"])
@pytest.mark.parametrize("kind", [M.BinaryAdaptFormer, M.BinaryLoRA])
def test_trained_saved_loaded_and_trained_on(kind, head, tmp_path):
    """The output after loading is the same to the bit; one more step moves signs and moments on from there."""
    model, x = vit().float(), image().detach().float()
    tuner = shake(vp.attach(model, kind(binary_head=head, dropout=0), train=None if head else "head"))
    y = model(x).detach()
    tuner.save(tmp_path / "a.safetensors")
    tuner.detach()
    loaded = vp.load(model, tmp_path / "a.safetensors")
    assert torch.equal(model(x), y)
    loaded.save(tmp_path / "b.safetensors")
    files = [safetensors.torch.load_file(tmp_path / f"{n}.safetensors") for n in "ab"]
    assert all(torch.equal(files[0][k], files[1][k]) for k in files[0])
    model.train()
    optimiser = torch.optim.SGD(loaded.parameters(), lr=0.1)
    model(x).square().sum().backward()
    optimiser.step()
    model.eval()
    assert not torch.equal(model(x), y)


def test_a_binary_head_stands_for_the_classifier_and_its_bias():
    model, x = vit(), image()
    tuner = shake(vp.attach(model, M.BinaryLoRA(rank=2, binary_head=True, targets="query")))
    assert tuner.num_parameters == 2 * (2 * 2 * D) + 5 * D
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    expected = features @ one_bit(by_site(tuner)["head", ""]["matrix.weight"]).T
    assert_equal(model(x).detach(), expected.detach())
    tuner.merge()
    assert_equal(model(x).detach(), expected.detach())
    assert not model.head.bias.any()
    tuner.detach()
    with pytest.raises(vp.errors.SiteError, match="no classifier"):
        vp.attach(timm.create_model("vit_tiny_patch16_224", num_classes=0), M.BinaryLoRA(binary_head=True))
