"""Scores of a personalised pipeline as DreamBooth has them (arXiv 2208.12242, section 4).

    DINO     mean cosine between drawn and real images under a self-supervised ViT
    CLIP-I   the same under CLIP's image encoder
    CLIP-T   mean cosine between a drawn image and its prompt without the token, under CLIP

The paper takes DINO ViT-S/16 and CLIP ViT-B/32 of OpenAI, which are the defaults of `visionpeft personalise`; their
weights must be on disk. The bundled pipeline has nano_vit and nano_clip, whose figures compare with nobody else's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visionpeft.diffusion.families import Family

Images = Sequence[Any]

# google/dreambooth, prompts_and_classes.txt (CC BY 4.0); {} is the token and the class.
_SHARED = (
    "a {} in the jungle", "a {} in the snow", "a {} on the beach", "a {} on a cobblestone street",
    "a {} on top of pink fabric", "a {} on top of a wooden floor", "a {} with a city in the background",
    "a {} with a mountain in the background", "a {} with a blue house in the background",
    "a {} on top of a purple rug in a forest",
)  # fmt: skip
OBJECT_PROMPTS = (
    *_SHARED, "a {} with a wheat field in the background", "a {} with a tree and autumn leaves in the background",
    "a {} with the Eiffel Tower in the background", "a {} floating on top of water",
    "a {} floating in an ocean of milk", "a {} on top of green grass with sunflowers around it",
    "a {} on top of a mirror",
    "a {} on top of the sidewalk in a crowded street", "a {} on top of a dirt road", "a {} on top of a white rug",
    "a red {}", "a purple {}", "a shiny {}", "a wet {}", "a cube shaped {}",
)  # fmt: skip
LIVE_PROMPTS = (
    *_SHARED, "a {} wearing a red hat", "a {} wearing a santa hat", "a {} wearing a rainbow scarf",
    "a {} wearing a black top hat and a monocle", "a {} in a chef outfit", "a {} in a firefighter outfit",
    "a {} in a police outfit", "a {} wearing pink glasses", "a {} wearing a yellow shirt",
    "a {} in a purple wizard outfit", "a red {}", "a purple {}", "a shiny {}", "a wet {}", "a cube shaped {}",
)  # fmt: skip


@dataclass
class Encoder:
    """Unit-length features (N, D) of PIL images, and of texts where there is a text tower."""

    images: Callable[[Images], Tensor]
    texts: Callable[[Sequence[str]], Tensor] | None = None


def image_encoder(model: str, checkpoint: str | None = None) -> Encoder:
    """nano_vit, or a model of timm with weights from a file (else timm's own); features are those before its head."""
    from visionpeft.data.preprocessing import preprocessing
    from visionpeft.pipelines.backbone import Backbone, build

    vit: Any = build(Backbone(model, checkpoint), 0).eval()
    transform = preprocessing(vit).transform()

    @torch.no_grad()
    def images(pictures: Images) -> Tensor:
        x = torch.stack([transform(p.convert("RGB")) for p in pictures])
        return F.normalize(torch.cat([vit(part) for part in x.split(32)]), dim=-1)

    return Encoder(images)


def clip_encoder(model: str, checkpoint: str | None = None) -> Encoder:
    """nano_clip, or a model of open_clip with weights from a file or one of its tags."""
    from visionpeft.clip.model import build
    from visionpeft.clip.text import encode_all, tokenize

    clip = build(model, checkpoint)
    transform = clip.preprocessing.transform()

    @torch.no_grad()
    def images(pictures: Images) -> Tensor:
        x = torch.stack([transform(p.convert("RGB")) for p in pictures])
        return F.normalize(torch.cat([clip.model.encode_image(part) for part in x.split(32)]), dim=-1)

    def texts(words: Sequence[str]) -> Tensor:
        return encode_all(clip.model, tokenize(clip.tokenizer, words, clip.model.context_length))

    return Encoder(images, texts)


def likeness(drawn: Tensor, real: Tensor) -> float:
    """Mean cosine of all pairs of unit-length features (N, D), (M, D)."""
    return float((drawn @ real.t()).mean())


def among(real: Tensor) -> float:
    """Mean cosine of different images of one set; NaN for a single one."""
    n = len(real)
    return float(((real @ real.t()).sum() - n) / (n * (n - 1))) if n > 1 else float("nan")


def scores(drawn: Images, prompts: Sequence[str], real: Images, dino: Encoder, clip: Encoder) -> dict[str, float]:
    """DINO, CLIP-I and CLIP-T of drawn images; `prompts` are those without the token, one for each image."""
    assert clip.texts is not None
    own = clip.images(drawn)
    return {
        "dino": likeness(dino.images(drawn), dino.images(real)),
        "clip_i": likeness(own, clip.images(real)),
        "clip_t": float((own * clip.texts(prompts)).sum(1).mean()),
    }


def judges(config: Any) -> tuple[Encoder, Encoder]:
    """The encoders of the DINO score and of both CLIP scores."""
    return image_encoder(config.dino, config.dino_checkpoint), clip_encoder(config.clip_model, config.clip_checkpoint)


def compare(config: Any, family: Family, tuner: Any, subject: Any, jury: tuple[Encoder, Encoder], result: Any) -> None:
    """Draw the DreamBench prompts without and with the adapter; put scores and sheet.png into the run."""
    from visionpeft.report.personalisation import sheet
    from visionpeft.training import runs

    dino, clip = jury
    prompts = [p for p in (LIVE_PROMPTS if config.live else OBJECT_PROMPTS) for _ in range(config.score_images)]
    said = [p.replace("{}", config.class_name or "thing") for p in prompts]
    real = [picture.open() for picture in subject.pictures]

    def draw(words: Sequence[str]) -> list[Any]:
        return [image for i, text in enumerate(words)
                for image in family.draw([text], [config.seed + i], config.inference_steps, config.guidance,
                                         config.resolution)]  # fmt: skip

    filled = [subject.fill(p) for p in prompts]
    with tuner.disabled():
        before = draw(said if config.word_vectors else filled)  # the base does not know a new word
    after = draw(filled)
    result.before, result.after = (scores(images, said, real, dino, clip) for images in (before, after))
    result.real = {"dino": among(dino.images(real)), "clip_i": among(clip.images(real))}
    step = config.score_images
    with runs.replacing(config.folder / "sheet.png") as temporary:
        sheet({"real": real, "before": before[::step], "after": after[::step]}).save(temporary, format="PNG")
