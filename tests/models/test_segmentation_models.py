"""Decoders: which go with which backbone, images of any size, adapters in encoder and decoder, what they cost."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import visionpeft as vp
from visionpeft.memory import live_bytes
from visionpeft.models import nano
from visionpeft.models.segmentation import DECODERS, SegmentationError, Segmenter, find_fixed, segmenter
from visionpeft.training import make_accelerator
from visionpeft.training.dense import DenseLoss, Windows, score_masks, segment

timm = pytest.importorskip("timm")
smp = pytest.importorskip("segmentation_models_pytorch")

PLAIN = ("test_vit", "test_vit3")
HIERARCHICAL = ("test_resnet", "test_convnext", "test_efficientnet")
FITS = [(name, decoder) for name in PLAIN for decoder in DECODERS] + [
    (name, decoder) for name in HIERARCHICAL for decoder in ("fpn", "upernet")]


def make(name: str = "test_vit", decoder: str = "linear", classes: int = 5) -> Segmenter:
    torch.manual_seed(0)
    options = {"dynamic_img_size": True} if "vit" in name else {}
    return segmenter(timm.create_model(name, num_classes=0, **options), classes, decoder, 64).eval()


@pytest.mark.parametrize("name, decoder", FITS)
def test_logits_are_as_large_as_the_image(name: str, decoder: str) -> None:
    model = make(name, decoder)
    with torch.no_grad():
        assert model(torch.randn(2, 3, 50, 70)).shape == (2, 5, 50, 70)


def test_encoders_of_one_size_are_found_out() -> None:
    """They do not say so: a run at another size does. Larger images are then refused by name, smaller ones padded."""
    any_size = make("test_resnet", "fpn").train()
    find_fixed(any_size, 32)
    assert any_size.fixed is None and any_size.training
    model = segmenter(timm.create_model("maxvit_rmlp_pico_rw_256", num_classes=0, img_size=64), 3, "fpn", 64).eval()
    with pytest.raises((AssertionError, RuntimeError)):
        model(torch.zeros(1, 3, 64, 96))
    find_fixed(model, 64)
    assert model.fixed == (64, 64)
    with pytest.raises(SegmentationError, match="takes images of 64x64 only, not 64x96"):
        model(torch.zeros(1, 3, 64, 96))
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 40, 50)).shape == (1, 3, 40, 50)
    model.fixed = None
    with pytest.raises(SegmentationError, match="do not go together on images of 96x96"):
        find_fixed(model.train(), 96)
    assert model.training and model.fixed is None


@pytest.mark.parametrize("decoder", ["dpt", "upernet", "fpn"])
def test_a_decoder_of_another_width_is_refused(decoder: str, tmp_path) -> None:
    """Its tensors would stand in the place of ours, and its groups of channels not: another number of classes may."""

    def made(classes: int, channels: int) -> Segmenter:
        torch.manual_seed(0)
        encoder = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True)
        return segmenter(encoder, classes, decoder, channels)

    model = made(3, 64).eval()
    tuner = vp.attach(model, vp.LoRA(rank=1), train="head", probe=False)
    for p in tuner.parameters():
        nn.init.normal_(p, std=0.1)
    tuner.save(tmp_path / "a.safetensors")
    with pytest.raises(vp.errors.AdapterFileError, match=r"decoder\.\S+ is [\dx]+ in the file and [\dx]+ here"):
        vp.load(made(3, 128), tmp_path / "a.safetensors", probe=False)
    other, x = made(5, 64).eval(), torch.randn(1, 3, 32, 32)
    vp.load(other, tmp_path / "a.safetensors", probe=False)
    with torch.no_grad():
        assert torch.equal(other(x), model(x)) and other(x).shape[1] == 3


@pytest.mark.parametrize("name, decoder", FITS)
def test_padding_is_what_the_user_would_pad(name: str, decoder: str) -> None:
    model = make(name, decoder)
    image = torch.randn(1, 3, 50, 70)
    height, width = (math.ceil(side / model.multiple) * model.multiple for side in (50, 70))
    padded = torch.zeros(1, 3, height, width)
    padded[..., :50, :70] = image
    with torch.no_grad():
        assert torch.equal(model(image), model(padded)[..., :50, :70])


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "pvt_v2_b0", "eva02_tiny_patch14_224",
                                  "vit_small_patch14_reg4_dinov2"])
def test_other_families_on_meta(name: str) -> None:
    with torch.device("meta"):
        plain = "14" in name
        encoder = timm.create_model(name, num_classes=0, **({} if "pvt" in name else {"dynamic_img_size": True}))
        model = segmenter(encoder, 3, "dpt" if plain else "upernet")
        assert model(torch.empty(1, 3, 60, 90)).shape == (1, 3, 60, 90)


@pytest.mark.parametrize("name, decoder, told", [
    ("test_resnet", "linear", "linear decoder is for plain ViTs; for ResNet use fpn or upernet"),
    ("test_convnext", "dpt", "dpt decoder is for plain ViTs"), ("test_vit", "unet", "'unet': use one of linear")])
def test_what_does_not_fit_is_refused(name: str, decoder: str, told: str) -> None:
    with pytest.raises(SegmentationError, match=told):
        make(name, decoder)


def test_a_backbone_of_one_size_says_so() -> None:
    model = segmenter(timm.create_model("test_vit", num_classes=0, img_size=32, dynamic_img_size=False), 3)
    assert model(torch.randn(1, 3, 20, 32)).shape == (1, 3, 20, 32)
    with pytest.raises(SegmentationError, match="32x32 only, not 40x32.*--windows"):
        model(torch.randn(1, 3, 40, 32))


def test_the_linear_decoder_classifies_tokens() -> None:
    """At the centres of patches, where bilinear interpolation by an odd factor gives the token's own logits."""
    torch.manual_seed(0)
    encoder = timm.models.vision_transformer.VisionTransformer(
        img_size=15, patch_size=5, embed_dim=16, depth=2, num_heads=2, num_classes=0, dynamic_img_size=True)
    encoder.feature_info = [{"num_chs": 16, "reduction": 5, "module": f"blocks.{i}"} for i in range(2)]
    image = torch.randn(2, 3, 15, 20)
    with torch.no_grad():
        tokens = encoder.eval().forward_features(image)[:, 1:]  # behind the last norm
        model = segmenter(encoder, 4).eval()
        weight, bias = model.decoder.classify.weight[:, :, 0, 0], model.decoder.classify.bias
        expected = (tokens @ weight.T + bias).view(2, 3, 4, 4).permute(0, 3, 1, 2)
        assert torch.allclose(model(image)[:, :, 2::5, 2::5], expected, atol=1e-6)


def test_no_decoder_has_batch_statistics() -> None:
    for name, decoder in FITS:
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in make(name, decoder).decoder.modules())


# ---- adapters --------------------------------------------------------------------------------------------------------


ELSEWHERE = ("textual_inversion", "pointgst", "idpt", "dapt", "ppt", "point_peft")
SOME = [(name, decoder, method) for method in ("lora", "ssf", "full", "linear")
        for name, decoder in (*(("test_vit", d) for d in DECODERS[1:]), ("test_convnext", "upernet"))]  # fmt: skip


@pytest.mark.parametrize("name, decoder, method",
                         [*(("test_vit", "linear", key) for key in vp.METHODS if key not in ELSEWHERE), *SOME])
def test_head_is_the_decoder_and_every_adapter_acts(name: str, decoder: str, method: str) -> None:
    """Attaching probes for dead adapters; afterwards adapters and the whole decoder get gradients."""
    model = make(name, decoder)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tuner = vp.attach(model, method, train="head")
    assert not any(site.path.startswith("decoder") for site in tuner.sites) or method == "full"
    model.train()
    model(torch.randn(2, 3, 48, 64)).square().mean().backward()
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, _ in model.decoder.named_parameters(prefix="decoder")} <= learning
    silent = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert silent == []
    tuner.detach()
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_decoders_can_be_adapted_too() -> None:
    model = make("test_vit", "fpn")
    tuner = vp.attach(model, vp.LoRA(rank=2, targets="query value decoder.fuse.p?"))
    found = {site.path for site in tuner.sites}
    assert "decoder.fuse.p5" in found and "encoder.blocks.0.attn.qkv" in found
    tuner.probe(torch.randn(1, 3, 32, 32))


def test_prompts_and_bottlenecks_know_the_encoder() -> None:
    model = make()
    assert len(vp.attach(model, vp.methods.VPT(tokens=3), train="head").sites) == 6
    assert len(vp.attach(make(), vp.AdaptFormer(hidden=4), train="head").sites) == 6


@pytest.mark.parametrize("decoder", DECODERS)
def test_lora_on_all_linears_keeps_no_more_than_the_frozen_model(decoder: str) -> None:
    """Bytes alive after forward with gradients through the encoder; BitFit on one bias in the first block asks for
    these and keeps nothing of its own."""
    def alive(method: vp.methods.Method) -> int:
        torch.manual_seed(0)
        model = segmenter(nano.create(num_classes=0, dynamic_img_size=True), 5, decoder, 64)
        vp.attach(model, method, train="head")
        model.train()
        images = torch.randn(4, 3, 64, 64)
        model(images)
        return live_bytes(lambda: model(images))

    frozen = alive(vp.methods.BitFit(targets="encoder.patch_embed.*"))
    assert alive(vp.LoRA(rank=4, targets="linear")) <= 1.05 * frozen


# ---- loss ------------------------------------------------------------------------------------------------------------


def by_hand(logits: np.ndarray, mask: np.ndarray, dice: float, weights: np.ndarray) -> float:
    """The loss of one image: logits [C, H, W], mask [H, W]."""
    known = [(y, x) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x] != 255]
    if not known:
        return 0.0
    p = np.exp(logits) / np.exp(logits).sum(0)
    entropy = -sum(weights[mask[at]] * np.log(p[(mask[at], *at)]) for at in known) / len(known)
    total = share = 0.0
    for c in range(len(logits)):
        true = sum(mask[at] == c for at in known)
        both = sum(p[(c, *at)] for at in known if mask[at] == c)
        if true:
            total += weights[c] * (1 - 2 * both / (sum(p[(c, *at)] for at in known) + true))
            share += weights[c]
    return entropy + dice * total / share


@pytest.mark.parametrize("dice", [0.0, 0.7])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_by_hand(dice: float, weighted: bool) -> None:
    rng = np.random.default_rng(0)
    logits, mask = rng.normal(size=(3, 4, 5, 6)), rng.choice([0, 1, 3, 255], (3, 5, 6))
    mask[2] = 255
    weights = np.array([0.5, 2.0, 1.0, 0.25]) if weighted else np.ones(4)
    loss = DenseLoss(dice, torch.from_numpy(weights).float() if weighted else None)
    found = loss(torch.from_numpy(logits), torch.from_numpy(mask))
    expected = [by_hand(*both, dice, weights) for both in zip(logits, mask, strict=True)]
    assert torch.allclose(found.double(), torch.tensor(expected).double(), atol=1e-5) and found[2] == 0


def test_dice_is_that_of_smp_where_all_classes_occur() -> None:
    torch.manual_seed(0)
    logits, mask = torch.randn(1, 3, 6, 6), torch.randint(0, 3, (1, 6, 6))
    mask[0, 0] = 255
    oracle = smp.losses.DiceLoss("multiclass", ignore_index=255)(logits, mask)
    found = DenseLoss(1.0)(logits, mask) - DenseLoss()(logits, mask)
    assert found.item() == pytest.approx(oracle.item(), abs=1e-6)


def test_an_image_of_nothing_gives_no_gradient() -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    DenseLoss(1.0, torch.ones(3))(logits, torch.full((2, 4, 4), 255)).sum().backward()
    assert not logits.grad.any()


# ---- evaluation ------------------------------------------------------------------------------------------------------


class Local(nn.Module):
    """Gives logits that depend on the pixel alone, so that windows and whole images agree."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x[:, :1] * x[:, 1:2]], 1)


@pytest.mark.parametrize("side, overlap", [(8, 0.5), (8, 0.0), (5, 0.7), (40, 0.5), (16, 0.25)])
def test_windows_of_a_local_model_give_what_whole_images_give(side: int, overlap: float) -> None:
    images = torch.randn(3, 3, 19, 27)
    found = Windows(side, overlap, batch=4).logits(Local(), images)
    assert torch.allclose(found, Local()(images), atol=1e-6)


@pytest.mark.parametrize("side, batch, asked", [(None, 2, [2, 1]), (8, 5, [5, 1, 5, 1, 5, 1]), (8, 13, [12, 6]),
                                                (8, 1, [1] * 18)])
def test_a_model_never_sees_more_than_a_batch(side: int | None, batch: int, asked: list[int]) -> None:
    """Six windows an image: images share a batch where they fit, and the windows of one go over several."""
    class Same(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            if index > 2:
                raise IndexError
            return torch.zeros(3, 12, 16), torch.zeros(12, 16, dtype=torch.long)

    model, seen = Local(), []
    model.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    found = list(segment(model, Same(), make_accelerator(), Windows(side, 0.5, batch), workers=0))
    assert len(found) == 3 and seen == asked


def test_windows_cover_every_pixel_and_overlap() -> None:
    corners = Windows(8, 0.5).corners(19, 8)
    assert corners == [(0, 0), (4, 0), (8, 0), (11, 0)]
    seen = np.zeros((19, 8), int)
    for top, left in corners:
        seen[top:top + 8, left:left + 8] += 1
    assert seen.min() == 1 and seen.max() >= 2


def test_overlapping_logits_are_averaged() -> None:
    """A model that answers with the number of the window it is asked about."""
    class Counter(nn.Module):
        asked = 0.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            numbers = self.asked + torch.arange(len(x), dtype=torch.float32)
            Counter.asked += len(x)
            return numbers.view(-1, 1, 1, 1).expand(-1, 1, *x.shape[-2:])

    found = Windows(4, 0.5, batch=2).logits(Counter(), torch.zeros(1, 3, 4, 8))
    assert found[0, 0, 0].tolist() == [0, 0, 0.5, 0.5, 1.5, 1.5, 2, 2]


class Pictures(torch.utils.data.Dataset):
    """Images of several sizes, whose masks are the argmax of a local model but for a few pixels."""

    sizes = [(6, 8), (6, 8), (9, 5), (6, 8), (4, 4)]

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(3, *self.sizes[index], generator=generator)
        mask = Local()(image[None])[0].argmax(0)
        mask[0, 0], mask[1, 1] = (mask[0, 0] + 1) % 4, 255
        return image, mask


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_images_of_all_sizes_in_their_order(batch: int) -> None:
    model = nn.Sequential(Local(), nn.Dropout(0.9)).train()
    found = list(segment(model, Pictures(), make_accelerator(), Windows(batch=batch), workers=0))
    assert [index for index, *_ in found] == list(range(5)) and model.training
    for index, predicted, mask in found:
        image, expected = Pictures()[index]
        assert torch.equal(mask, expected) and torch.equal(predicted.long(), Local()(image[None])[0].argmax(0))


def test_scores_of_a_set_and_masks_kept() -> None:
    scores, kept = score_masks(Local(), Pictures(), 4, make_accelerator(), Windows(), 0, keep=(1, 4))
    pixels = sum(h * w for h, w in Pictures.sizes) - 5
    assert scores["pixels"] == pytest.approx((pixels - 5) / pixels) and int(scores["confusion"].sum()) == pixels
    assert sorted(kept) == [1, 4] and kept[4].shape == (4, 4)
