"""What a personalisation is asked for, and what it gives back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RATES = {"krona": 5e-4, "difffit": 1e-3, "svfit": 1e-3, "ssf": 1e-3, "bitfit": 1e-3}
"""Learning rates of the methods' papers or scripts; 1e-4 for all others."""

WORD_FILE = "learned_embeds.safetensors"
"""Where a learnt word lies, beside the adapter; `pipe.load_textual_inversion` reads it."""


@dataclass(frozen=True)
class Config:
    """A subject, a base, a method, and how to train. With no arguments: a drawn toy and the bundled nano pipeline."""

    base: str = "nano"
    """nano, a diffusers folder, or a single .safetensors file."""
    base_config: str | None = None
    """For a single file: folder of a pipeline of its kind, of which only configs and tokenizers are read."""
    images: str = "bundled:robo"
    """Folder of images, or bundled:NAME."""
    method: str = "krona"
    """A method with its settings, such as lora:rank=4 or krona:a1=16,a2=16 or difffit."""
    out: str = "runs/personalise"
    """Folder of the run."""

    token: str | None = None
    """Word for the subject; by default the rarest of the vocabulary that is whole and has no vowel, but not sks; a new
    word is by default <subject>."""
    word_vectors: int = 0
    """Vectors of a new word that learns together with the method (pivotal tuning); they start at the class's name. With
    0 the token is a rare word of the vocabulary, whose vector stays as it is."""
    class_name: str | None = None
    """What the subject is, such as dog."""
    prompt: str = "a photo of a {}"
    """Prompt of images without a caption; {} becomes the token and the class, in captions too."""
    allow_missing_captions: bool = False
    skip_corrupt: bool = False
    """Leave out images that cannot be read instead of stopping."""
    masks: str | None = None
    """Folder of masks named as the images, or alpha."""

    prior: int = 0
    """Class images for prior preservation, drawn by the base once and kept; needs class_name."""
    prior_weight: float = 1.0
    train_text: bool = False
    """Also adapt the text encoders."""

    new_classes: int = 0
    """For a DiT: number of classes of a fresh table, as DiffFit fine-tunes; captions are then class numbers."""

    resolution: int | None = None
    """Pixels of a side; by default the denoiser's own."""
    buckets: bool = False
    """Keep aspect ratios: shapes of about the same area instead of squares."""
    flip: bool = False
    """Also learn from mirror images."""
    crops: int = 1
    """Windows of each image: one is the centre, more are drawn once and kept."""

    steps: int = 1000
    """Updates in all; more than a finished run had extends it (see `schedule`)."""
    batch_size: int = 1
    accumulation: int = 1
    lr: float | None = None
    """By default the paper's for the method."""
    rates: tuple[str, ...] = ()
    """Other rates for roles or path globs, such as query=1e-4 "text_encoder.*=1e-5"; the last that fits counts. A new
    word has 1e-3 (Mix-of-Show, arXiv 2305.18292), or what "*token_embedding*=..." says."""
    schedule: str = "constant"
    """constant or cosine. An extended run goes on at the constant rate, as if it had been that long from the start;
    with cosine the added updates have a cosine of their own from the full rate, without warm-up."""
    warmup: int = 0
    """Updates."""
    weight_decay: float = 1e-2
    clip: float | None = 1.0
    min_snr: float | None = None
    """gamma of min-SNR weights; the paper's is 5."""
    noise_offset: float = 0.0
    caption_dropout: float = 0.0
    """Share of examples that learn without a prompt."""
    ema: float | None = None
    """Decay of an average of the adapter, min(decay, (1 + step) / (10 + step)), which is then what is saved."""
    precision: str = "fp32"
    """fp32, bf16 or fp16; latents are made in fp32 in any case."""
    gradient_checkpointing: bool = False
    seed: int = 0

    preview_every: int = 0
    """Updates between previews; 0 draws them at the end only."""
    previews: tuple[str, ...] = ("a photo of a {}",)
    """Prompts of previews."""
    inference_steps: int = 25
    guidance: float = 7.5
    score_images: int = 0
    """Images to draw for each of the DreamBench prompts, before and after, for DINO, CLIP-I and CLIP-T scores."""
    live: bool = False
    """The DreamBench prompts for animals instead of those for objects."""
    dino: str = "vit_small_patch16_224.dino"
    """Image encoder of the DINO score: timm's name; the default is DreamBooth's. nano_vit for the nano pipeline."""
    dino_checkpoint: str | None = None
    clip_model: str = "ViT-B-32-quickgelu"
    """Encoder of CLIP-I and CLIP-T: open_clip's name; the default, with openai's weights, is DreamBooth's."""
    clip_checkpoint: str | None = "openai"
    kohya: bool = True
    """Also write adapter_kohya.safetensors, which ComfyUI and the WebUIs read, where the format can say what learnt."""
    cache: str = "runs/cache"
    """Folder that keeps latents, text features and class images between runs."""
    checkpoint_seconds: float = 60.0
    """Least time between two resumable checkpoints."""

    @property
    def folder(self) -> Path:
        return Path(self.out).expanduser()

    @property
    def rate(self) -> float:
        return self.lr if self.lr is not None else RATES.get(self.method.partition(":")[0].strip(), 1e-4)

    def identity(self) -> dict[str, Any]:
        """What decides the numbers of every update: not how many there are, nor what is shown."""
        beside: tuple[str, ...] = (
            "out", "steps", "preview_every", "previews", "inference_steps", "score_images", "live", "dino",
            "dino_checkpoint", "clip_model", "clip_checkpoint", "kohya", "cache", "checkpoint_seconds",
        )  # fmt: skip
        if self.prior:  # class images are drawn with these
            beside = tuple(name for name in beside if name != "inference_steps")
        return {key: value for key, value in asdict(self).items() if key not in beside}


@dataclass
class Result:
    """What a personalisation measured."""

    base: str
    method: str
    token: str
    prompt: str
    steps: int = 0
    segments: list[int] = field(default_factory=list)
    """Number of updates after the first run and after each extension."""
    loss: float = 0.0
    """Mean over the last tenth of the updates."""
    parameters: int = 0
    file_bytes: int = 0
    seconds: float = 0.0
    """Of training, in the process that finished it."""
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    real: dict[str, float] = field(default_factory=dict)
    """Scores of the real images among themselves, as far as they have any."""
    account: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    folder: str = ""
