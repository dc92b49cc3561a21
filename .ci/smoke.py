"""Uses the installed wheel, away from the checkout: attach, save, load on the bundled model."""

import tempfile
from pathlib import Path

import torch

import visionpeft as vp
from visionpeft.models import nano

here = Path.cwd().resolve()
assert Path(vp.__file__).resolve().is_relative_to(here), f"this is not the wheel: {vp.__file__}"

images = torch.randn(2, 3, 32, 32)
model = nano.create("nano_vit").eval()
tuner = vp.attach(model, vp.LoRA(rank=2))
with torch.no_grad():
    for parameter in tuner.parameters():
        parameter.add_(0.01)
expected = model(images)
with tempfile.TemporaryDirectory() as folder:
    tuner.save(f"{folder}/adapter.safetensors")
    other = nano.create("nano_vit").eval()
    vp.load(other, f"{folder}/adapter.safetensors")
assert torch.equal(other(images), expected)
print(f"the wheel works: {tuner.num_parameters} adapter parameters")
