"""One way to ask every kind of denoiser: what its prompts become, how it predicts, what it was trained to predict.

A family makes conditions, a dict of tensors (N, ...), of prompts, and predicts from latents, time and conditions:

    StableDiffusion   text (N, L, D)
    SDXL              text (N, L, D), pooled (N, P), time_ids (N, 6): original size, crop's corner, target size
    DiT               label (N,): the class in place of a prompt
    SD3, Flux         text (N, L, D), pooled (N, P); flow matching

Latents go in and come out as (N, C, h, w); Flux's packing into tokens happens inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visionpeft.diffusion.errors import DiffusionError
from visionpeft.diffusion.words import check_lengths

Conditions = dict[str, Tensor]


class Family:
    """How a kind of pipeline is asked.

    Attributes:
        kind: what the denoiser predicts: epsilon, v_prediction or flow.
    """

    denoiser_name: ClassVar[str] = "unet"
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.kind = self._kind()

    def _kind(self) -> str:
        config = self.pipe.scheduler.config
        if "FlowMatch" in type(self.pipe.scheduler).__name__ or config.get("use_flow_sigmas"):
            return "flow"
        kind: str = config.get("prediction_type", "epsilon")
        if not hasattr(self.pipe.scheduler, "alphas_cumprod"):  # EDM's scales latents in its own way
            raise DiffusionError(f"{type(self.pipe.scheduler).__name__} has no alphas_cumprod: nothing here trains it")
        if kind not in ("epsilon", "v_prediction"):
            raise DiffusionError(f"the scheduler's prediction_type {kind!r} cannot be trained: epsilon, v_prediction")
        return kind

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipe, self.denoiser_name)

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """Those that this pipeline has."""
        return {n: e for n in self.encoders if isinstance(e := getattr(self.pipe, n, None), nn.Module)}

    @property
    def factor(self) -> int:
        """Pixels a latent, along each side, so that the denoiser can halve it as often as it does."""
        return int(self.pipe.vae_scale_factor)

    @property
    def multiple(self) -> int:
        """Sides of images must be multiples of this: the denoiser halves latents, or cuts them into patches."""
        config = self.denoiser.config
        return self.factor * (config.get("patch_size") or 2 ** (len(config.get("block_out_channels", (0,))) - 1))

    @property
    def resolution(self) -> int:
        """Pixels of the side that the denoiser was made for."""
        size = self.denoiser.config.get("sample_size") or 64
        return int(size if isinstance(size, int) else size[0]) * self.factor

    @property
    def alphas(self) -> Tensor | None:
        """Cumulative products of 1 - beta; None for flow matching."""
        return None if self.kind == "flow" else self.pipe.scheduler.alphas_cumprod.float()

    def train(self, mode: bool = True) -> None:
        """Put what may learn into train mode, or back."""
        for part in (self.denoiser, *self.text_encoders.values()):
            part.train(mode)

    def check(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that a text encoder would cut.

        Raises:
            DiffusionError: a prompt has more tokens than the encoder reads.
        """
        for name in self.tokenizers:
            if (tokenizer := getattr(self.pipe, name, None)) is not None:
                spread = getattr(self.pipe, "maybe_convert_prompt", None)  # a learnt word may have several vectors
                check_lengths(tokenizer, spread(list(prompts), tokenizer) if spread else prompts)

    def text(self, prompts: Sequence[str]) -> Conditions:
        """Conditions of prompts, with gradients if a text encoder learns; raises as `check` does."""
        self.check(prompts)
        return self._text(list(prompts))

    def _text(self, prompts: list[str]) -> Conditions:
        return {"text": self.pipe.encode_prompt(prompts, self.device, 1, False)[0]}

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def sized(self, original: tuple[int, int], corner: tuple[int, int], target: tuple[int, int]) -> Conditions:
        """Conditions (1, ...) that say an image's sizes, (height, width) and (top, left); none for most kinds."""
        return {}

    def predict(self, x: Tensor, t: Tensor, given: Conditions) -> Tensor:
        """The prediction (N, C, h, w) for latents x at times t (N,): steps of 0 .. T - 1, for flow 1000 sigma."""
        return self.denoiser(x, t, given["text"]).sample

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float,
             side: int | None = None) -> list[Any]:  # fmt: skip
        """A PIL image of each prompt, drawn together, each with the seed of its own."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        with torch.no_grad():
            return self.pipe(**self._asked(prompts, side), num_inference_steps=steps, guidance_scale=guidance,
                             generator=generators).images  # fmt: skip

    def _asked(self, prompts: Sequence[str], side: int | None) -> dict[str, Any]:
        return {"prompt": list(prompts)} | ({} if side is None else {"height": side, "width": side})


class StableDiffusion(Family):
    """SD 1.x and 2.x."""


class SDXL(Family):
    """Two text encoders, and the sizes of the image as conditions."""

    encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")

    def _text(self, prompts: list[str]) -> Conditions:
        text, _, pooled, _ = self.pipe.encode_prompt(prompts, None, self.device, 1, False)
        return {"text": text, "pooled": pooled}

    def sized(self, original: tuple[int, int], corner: tuple[int, int], target: tuple[int, int]) -> Conditions:
        return {"time_ids": torch.tensor([[*original, *corner, *target]], dtype=torch.float32)}

    def predict(self, x: Tensor, t: Tensor, given: Conditions) -> Tensor:
        added = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]}
        return self.denoiser(x, t, given["text"], added_cond_kwargs=added).sample


class DiT(Family):
    """Classes in place of prompts: a prompt is the number of a class, or its name in the pipeline's labels."""

    denoiser_name, encoders, tokenizers = "transformer", (), ()

    @property
    def factor(self) -> int:
        return 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)

    def train(self, mode: bool = True) -> None:
        """diffusers' copies of the class table would each drop the label by a draw of their own: dropping is ours."""
        super().train(mode)
        for module in self.denoiser.modules():
            if type(module).__name__ == "LabelEmbedding":
                module.eval()

    def label(self, prompt: str) -> int:
        """The class of a prompt.

        Raises:
            DiffusionError: it is neither a number below the number of classes nor a known name.
        """
        classes, known = int(self.denoiser.config["num_embeds_ada_norm"]), getattr(self.pipe, "labels", None) or {}
        found = int(prompt) if prompt.strip().isdigit() else known.get(prompt, -1)
        if not 0 <= found < classes:
            raise DiffusionError(f"{prompt!r} is no class: a DiT takes numbers below {classes}, or a name it knows")
        return found

    def check(self, prompts: Sequence[str]) -> None:
        """Refuse what is no class; the empty prompt stands for none."""
        for prompt in filter(None, prompts):
            self.label(prompt)

    def _text(self, prompts: list[str]) -> Conditions:
        return {"label": torch.tensor([self.label(p) if p else self._nothing for p in prompts])}

    @property
    def _nothing(self) -> int:
        """The row behind the classes, which stands for no class."""
        return int(self.denoiser.config["num_embeds_ada_norm"])

    def predict(self, x: Tensor, t: Tensor, given: Conditions) -> Tensor:
        # The second half of the channels is the variance, which stays as it was trained.
        return self.denoiser(x, t, given["label"].to(x.device)).sample[:, : x.shape[1]]

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float,
             side: int | None = None) -> list[Any]:  # fmt: skip
        """As the pipeline draws, whose row for no class is number 1,000 whatever the table has."""
        scheduler, size = self.pipe.scheduler, (side or self.resolution) // self.factor
        shape = (1, self.denoiser.config["in_channels"], size, size)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        x = torch.cat(noise).to(self.device)
        given = self._text([*prompts, *("" for _ in prompts)])
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            both = scheduler.scale_model_input(torch.cat([x, x]), t)
            own, none = self.predict(both, t.expand(len(both)).to(self.device), given).chunk(2)
            x = scheduler.step(none + guidance * (own - none), t, x).prev_sample
        images = self.pipe.vae.decode(x / self.pipe.vae.config.scaling_factor).sample
        return self.pipe.numpy_to_pil((images / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).float().numpy())


class SD3(Family):
    """Joint attention over image and text; flow matching."""

    denoiser_name = "transformer"
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizers = ("tokenizer", "tokenizer_2")

    def _text(self, prompts: list[str]) -> Conditions:
        text, _, pooled, _ = self.pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
        return {"text": text, "pooled": pooled}

    def predict(self, x: Tensor, t: Tensor, given: Conditions) -> Tensor:
        return self.denoiser(x, given["text"], given["pooled"], t).sample


class Flux(Family):
    """Latents as tokens of 2 x 2; flow matching; guidance as a condition where the model was distilled."""

    denoiser_name = "transformer"
    encoders, tokenizers = ("text_encoder", "text_encoder_2"), ("tokenizer",)

    @property
    def multiple(self) -> int:
        return 2 * self.factor

    @property
    def resolution(self) -> int:
        return int(self.pipe.default_sample_size) * self.factor

    def _text(self, prompts: list[str]) -> Conditions:
        text, pooled, _ = self.pipe.encode_prompt(prompts, None)
        return {"text": text, "pooled": pooled}

    def predict(self, x: Tensor, t: Tensor, given: Conditions) -> Tensor:
        n, c, h, w = x.shape
        tokens = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)
        ids = torch.zeros(h // 2, w // 2, 3, device=x.device)
        ids[..., 1] += torch.arange(h // 2, device=x.device)[:, None]
        ids[..., 2] += torch.arange(w // 2, device=x.device)
        guided = self.denoiser.config["guidance_embeds"]
        out = self.denoiser(
            hidden_states=tokens, encoder_hidden_states=given["text"], pooled_projections=given["pooled"],
            timestep=t / 1000, guidance=torch.ones(n, device=x.device) if guided else None,
            txt_ids=torch.zeros(given["text"].shape[1], 3, device=x.device), img_ids=ids.view(-1, 3),
        ).sample  # fmt: skip
        return out.view(n, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)


FAMILIES: dict[str, type[Family]] = {
    "StableDiffusionPipeline": StableDiffusion, "StableDiffusionXLPipeline": SDXL, "DiTPipeline": DiT,
    "StableDiffusion3Pipeline": SD3, "FluxPipeline": Flux,
}  # fmt: skip


def family_of(pipe: Any) -> Family:
    """The family of a live pipeline.

    Raises:
        DiffusionError: it is of none that can be personalised.
    """
    for cls in type(pipe).__mro__:
        if (found := FAMILIES.get(cls.__name__)) is not None:
            return found(pipe)
    raise DiffusionError(f"{type(pipe).__name__} cannot be personalised here: it takes {', '.join(FAMILIES)}")
