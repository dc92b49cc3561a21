"""Decoders on timm backbones: a class for every pixel.

    model = segmenter(timm.create_model("vit_small_patch16_224", num_classes=0, dynamic_img_size=True), classes=11)

`encoder` is the timm model itself, without its classifier; `decoder` is what `train="head"` means. Images of any size:
they are padded below and at the right to what the encoder can take, and the logits are cropped back.

    decoder   plain ViT                              hierarchical backbone
    linear    1x1 conv on the last tokens            -
    fpn       simple feature pyramid, then FPN       FPN (arXiv 1901.02446)
    upernet   simple feature pyramid, then UPerNet   UPerNet (arXiv 1807.10221)
    dpt       DPT (arXiv 2103.13413), four depths    -

The simple feature pyramid is that of ViTDet (arXiv 2203.16527). FPN, UPerNet and DPT are the decoders of
segmentation-models-pytorch with two differences: GroupNorm instead of BatchNorm, since adapters freeze batch
statistics and small batches have poor ones, and 128 channels instead of 256 unless told otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpeft.errors import VisionPEFTError, require

DECODERS = ("linear", "fpn", "upernet", "dpt")
STRIDES = (4, 8, 16, 32)


class SegmentationError(VisionPEFTError):
    """A backbone and a decoder do not fit, or an image is too large for a backbone of fixed size."""


class Segmenter(nn.Module):
    """encoder and decoder; images [B, 3, H, W] -> logits [B, C, H, W].

    Attributes:
        indices: which intermediate maps of the encoder the decoder gets.
        plain: whether the encoder is a plain ViT, whose maps then pass its last norm.
        multiple: both sides of what the encoder sees are multiples of this.
        fixed: the only size (height, width) that the encoder takes, None where it takes any.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, indices: list[int], plain: bool, multiple: int) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.indices, self.plain, self.multiple, self.fixed = indices, plain, multiple, _fixed_size(encoder)

    def get_classifier(self) -> nn.Module:
        """What learns beside an adapter, in timm's words."""
        return self.decoder

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = F.pad(x, self._missing(height, width))
        logits = self.decoder(self._maps(x))
        logits = F.interpolate(logits, x.shape[-2:], mode="bilinear", align_corners=False)
        return logits[..., :height, :width]

    def _missing(self, height: int, width: int) -> tuple[int, int, int, int]:
        if self.fixed is None:
            return 0, -width % self.multiple, 0, -height % self.multiple
        if height > self.fixed[0] or width > self.fixed[1]:
            raise SegmentationError(
                f"this backbone takes images of {self.fixed[0]}x{self.fixed[1]} only, not {height}x{width}: cut them "
                f"into windows of {min(self.fixed)} pixels (--windows)")
        return 0, self.fixed[1] - width, 0, self.fixed[0] - height

    def _maps(self, x: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """Maps [B, D, h, w], each with the tokens [B, P, D] before the patches where there are some."""
        forward: Any = self.encoder.forward_intermediates
        options: Any = {"indices": self.indices, "norm": self.plain, "intermediates_only": True}
        if self.plain and getattr(self.encoder, "num_prefix_tokens", None):
            return [(y, prefix) for y, prefix in forward(x, return_prefix_tokens=True, **options)]
        return [(y, None) for y in forward(x, **options)]


def segmenter(encoder: nn.Module, classes: int, decoder: str = "linear", channels: int = 128) -> Segmenter:
    """Put a decoder on a timm model, which loses its classifier.

    Args:
        decoder: one of DECODERS.
        channels: width of the decoder, a multiple of 64; "linear" has none.

    Raises:
        SegmentationError: the decoder does not go with the model, or is unknown.
        MissingExtra: segmentation-models-pytorch is not installed.
    """
    name = type(encoder).__name__
    if decoder not in DECODERS:
        raise SegmentationError(f"unknown decoder {decoder!r}: use one of {', '.join(DECODERS)}")
    if not hasattr(encoder, "forward_intermediates"):
        raise SegmentationError(f"{name} gives no intermediate maps (timm's forward_intermediates)")
    if channels % 64:
        raise SegmentationError(f"channels={channels}: use a multiple of 64")
    info = _feature_info(encoder)
    plain = len(set(info)) == 1
    if not plain and decoder in ("linear", "dpt"):
        raise SegmentationError(f"the {decoder} decoder is for plain ViTs; for {name} use fpn or upernet")
    indices = _indices(info, plain, decoder, name)
    made = _decoder(decoder, [info[i] for i in indices], plain, bool(getattr(encoder, "num_prefix_tokens", 0)),
                    classes, channels)
    encoder.prune_intermediate_layers(indices, prune_norm=not plain, prune_head=True)  # type: ignore[operator]
    stride = max(info[i][1] for i in indices)
    return Segmenter(encoder, made, indices, plain, 2 * stride if plain and decoder != "linear" else stride)


@torch.no_grad()
def find_fixed(model: Segmenter, side: int) -> None:
    """Run a segmenter on a square image and on a wider one: an encoder that takes the first alone gets its `fixed`.

    Raises:
        SegmentationError: it does not take the first either.
    """
    if model.fixed is not None:
        return
    side += -side % model.multiple
    mode, x = model.training, torch.zeros(1, 3, side, side, device=next(model.parameters()).device)
    model.eval()
    try:
        for width in (side, side + model.multiple):
            model(F.pad(x, (0, width - side)))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever it is: models of one size fail in ways of their own
        if width == side:
            raise SegmentationError(f"{type(model.encoder).__name__} and {type(model.decoder).__name__} do not go "
                                    f"together on images of {side}x{side}: {error}") from error
        model.fixed = (side, side)
    finally:
        model.train(mode)


def _feature_info(encoder: nn.Module) -> list[tuple[int, int]]:
    """(channels, stride) of every intermediate map."""
    info: Any = encoder.feature_info
    return [(f["num_chs"], int(f["reduction"])) for f in (info if isinstance(info, list) else info.info)]


def _indices(info: Sequence[tuple[int, int]], plain: bool, decoder: str, name: str) -> list[int]:
    if plain:
        count = 4 if decoder == "dpt" else 1
        return [len(info) * (i + 1) // count - 1 for i in range(count)]
    strides = [stride for _, stride in info]
    if any(s not in strides for s in STRIDES):
        raise SegmentationError(f"{name} has maps at strides {strides}; {decoder} needs {list(STRIDES)}")
    return [len(strides) - 1 - strides[::-1].index(s) for s in STRIDES]


def _fixed_size(encoder: nn.Module) -> tuple[int, int] | None:
    from visionpeft.data.preprocessing import fixed_size

    if (tokens := getattr(encoder, "tokens_spatial_shape", None)) is not None:  # Hiera
        high, wide = (t * s for t, s in zip(tokens, encoder.patch_stride, strict=True))  # type: ignore[arg-type]
        return high, wide
    return fixed_size(encoder)


def _decoder(kind: str, maps: list[tuple[int, int]], plain: bool, prefix: bool, classes: int,
             channels: int) -> nn.Module:
    if kind == "linear":
        return LinearDecoder(maps[0][0], classes)
    if kind == "dpt":
        return DPT(maps, prefix, classes, channels)
    pyramid = SimplePyramid(maps[0][0], 2 * channels) if plain else None
    return Fused(kind, pyramid, [2 * channels] * 4 if plain else [width for width, _ in maps], classes, channels)


class LinearDecoder(nn.Module):
    """A linear classifier of every token."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.classify = nn.Conv2d(width, classes, 1)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(self.classify.bias)  # type: ignore[arg-type]

    def forward(self, maps: list[tuple[Tensor, Tensor | None]]) -> Tensor:
        return self.classify(maps[-1][0])


class SimplePyramid(nn.Module):
    """Maps at 4, 2, 1 and 1/2 times the size of the last map of a plain ViT [B, D, h, w], each [B, channels, ., .].

    Made by two transposed convs, one, none, and max pooling, each then by a 1x1 and a 3x3 conv with a norm.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        half, quarter = width // 2, width // 4
        self.scale4 = nn.Sequential(nn.ConvTranspose2d(width, half, 2, 2), _norm(half), nn.GELU(),
                                    nn.ConvTranspose2d(half, quarter, 2, 2))
        self.scale2 = nn.ConvTranspose2d(width, half, 2, 2)
        self.scale_half = nn.MaxPool2d(2)
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.Conv2d(w, channels, 1, bias=False), _norm(channels),
                          nn.Conv2d(channels, channels, 3, padding=1, bias=False), _norm(channels))
            for w in (quarter, half, width, width))

    def forward(self, x: Tensor) -> list[Tensor]:
        scaled = (self.scale4(x), self.scale2(x), x, self.scale_half(x))
        return [lateral(y) for lateral, y in zip(self.lateral, scaled, strict=True)]


class Fused(nn.Module):
    """FPN or UPerNet over four maps, each twice the size of the next."""

    def __init__(self, kind: str, pyramid: SimplePyramid | None, widths: list[int], classes: int,
                 channels: int) -> None:
        super().__init__()
        smp = "segmentation_models_pytorch"
        file = require(f"{smp}.decoders.{kind}.decoder", extra="segmentation")
        self.pyramid = pyramid
        # Its decoders count from the image on and skip the first two maps.
        given = [3, 0, *widths]
        if kind == "fpn":
            self.fuse = file.FPNDecoder(given, pyramid_channels=channels)
        else:
            self.fuse = file.UPerNetDecoder(given, decoder_channels=channels)
        require(f"{smp}.base.initialization", extra="segmentation").initialize_decoder(self.fuse)
        without_batch_norm(self.fuse)
        self.classify = nn.Conv2d(getattr(self.fuse, "out_channels", channels), classes, 1)

    def forward(self, maps: list[tuple[Tensor, Tensor | None]]) -> Tensor:
        found = [y for y, _ in maps] if self.pyramid is None else self.pyramid(maps[-1][0])
        return self.classify(self.fuse([maps[0][0], maps[0][0], *found]))


class DPT(nn.Module):
    """Dense prediction transformer: maps of four depths, read with the class token, reassembled and fused."""

    def __init__(self, maps: list[tuple[int, int]], prefix: bool, classes: int, channels: int) -> None:
        super().__init__()
        smp = "segmentation_models_pytorch"
        file = require(f"{smp}.decoders.dpt.decoder", extra="segmentation")
        self.fuse = file.DPTDecoder(
            # As if the patch were 16, for which the factors 4, 2, 1 and 1/2 of the paper are meant: smp's own rounding
            # of them fails for patches of 14.
            encoder_out_channels=[width for width, _ in maps], encoder_output_strides=[16] * len(maps),
            encoder_has_prefix_tokens=prefix, readout="cat" if prefix else "ignore",
            intermediate_channels=(channels, 2 * channels, 4 * channels, 4 * channels), fusion_channels=channels)
        self.classify = file.DPTSegmentationHead(channels, classes)
        require(f"{smp}.base.initialization", extra="segmentation").initialize_decoder(self.fuse)
        without_batch_norm(self)

    def forward(self, maps: list[tuple[Tensor, Tensor | None]]) -> Tensor:
        return self.classify(self.fuse([y for y, _ in maps], [prefix for _, prefix in maps]))


def _norm(channels: int) -> nn.GroupNorm:
    """Groups of four channels at least: maps of a single pixel are normalised too."""
    return nn.GroupNorm(math.gcd(32, channels // 4), channels)


def without_batch_norm(module: nn.Module) -> None:
    """Replace every BatchNorm2d below a module by a GroupNorm."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            module.add_module(name, _norm(child.num_features))
        else:
            without_batch_norm(child)
