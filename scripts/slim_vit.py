"""A start for a small vision transformer: a large one seen through fewer directions, blocks, heads and units."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Slim:
    """Half of the teacher's blocks, heads and hidden units, in the principal directions of its residual stream.

    A pre-norm transformer reads its stream x (centred, d = 384) only through LayerNorm, that is by direction. With
    P [192, 384] the leading principal directions, rotated into the plane orthogonal to (1, ..., 1) so that the
    student's own LayerNorm has no mean to take away, the student carries P x, and a layer W gamma LN(x) + W beta
    becomes sqrt(2) rho W gamma P^T LN(P x) + W beta with rho = E |P x| / |x|. What is dropped leaves its mean behind.
    """

    def __init__(self, teacher: Any, depth: int, width: int, images: Tensor) -> None:
        self.teacher = teacher
        self.width = width
        self.chosen = [round(float(i)) for i in torch.linspace(0, len(self.teacher.blocks) - 1, depth)]
        self.inputs: dict[str, Tensor] = {}
        self.stream = [self._watch(f"blocks.{i}.norm1") for i in self.chosen] + [self._watch("norm")]
        for i in self.chosen:
            self._watch(f"blocks.{i}.attn.proj")
            self._watch(f"blocks.{i}.mlp.fc2")
        with torch.inference_mode():
            teacher(images)
        self.basis, self.rho = self._directions()

    def _watch(self, name: str) -> str:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.inputs[name] = args[0].flatten(0, -2)

        self.teacher.get_submodule(name).register_forward_pre_hook(keep)
        return name

    def _directions(self) -> tuple[Tensor, dict[str, float]]:
        unit = {}
        for name in self.stream:
            x = self.inputs[name] - self.inputs[name].mean(-1, keepdim=True)
            unit[name] = F.normalize(x, dim=-1)
        moment = sum(x.double().T @ x.double() for x in unit.values())
        top = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, : self.width - 1].T
        ones = torch.full((self.width, 1), self.width**-0.5, dtype=torch.float64)
        plane = torch.linalg.svd(ones).U[:, 1:]
        basis = (plane @ top).float()
        return basis, {name: float((x @ basis.T).norm(dim=-1).mean()) for name, x in unit.items()}

    def fill(self, student: Any) -> None:
        """Write the student's tensors in place (head left alone)."""
        from timm.layers import resample_patch_embed

        teacher, patch = self.teacher, student.patch_embed.proj
        with torch.no_grad():
            kernel = resample_patch_embed(teacher.patch_embed.proj.weight.detach(), list(patch.kernel_size))
            patch.weight.copy_(torch.einsum("pd,dcij->pcij", self.basis, kernel))
            patch.bias.copy_(self.basis @ teacher.patch_embed.proj.bias)
            student.cls_token.copy_(teacher.cls_token @ self.basis.T)
            student.pos_embed.copy_(self._positions(student) @ self.basis.T)
            for block, index in zip(student.blocks, self.chosen, strict=True):
                self._attention(block.attn, index)
                self._mlp(block.mlp, index)

    def _positions(self, student: Any) -> Tensor:
        from timm.layers import resample_abs_pos_embed

        return resample_abs_pos_embed(self.teacher.pos_embed, list(student.patch_embed.grid_size))

    def read(self, norm: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """A layer [out, 384] behind teacher norm `norm` as one [out, 192] behind a plain LayerNorm, and its bias."""
        affine = self.teacher.get_submodule(norm)
        ratio = self.rho.get(norm, sum(self.rho.values()) / len(self.rho))
        scale = ratio * (weight.shape[1] / self.width) ** 0.5
        shift = weight @ affine.bias
        return (weight * affine.weight) @ self.basis.T * scale, shift if bias is None else shift + bias

    def _write(self, layer: nn.Linear, source: nn.Linear, gamma: Tensor, name: str, unit: int) -> Tensor:
        """Fill an output layer with the groups of `unit` inputs that matter most; return their indices."""
        seen, weight = self.inputs[name], source.weight * gamma[:, None]
        weight_seen = weight.norm(dim=0) * seen.std(0)
        keep_groups = weight_seen.square().view(-1, unit).sum(1).topk(layer.in_features // unit).indices.sort().values
        keep = (keep_groups[:, None] * unit + torch.arange(unit)).flatten()
        dropped = torch.ones(seen.shape[1], dtype=torch.bool)
        dropped[keep] = False
        layer.weight.copy_(self.basis @ weight[:, keep])
        left_behind = weight[:, dropped] @ seen[:, dropped].mean(0)
        layer.bias.copy_(self.basis @ (source.bias * gamma + left_behind))
        return keep

    def _attention(self, attn: Any, index: int) -> None:
        block = self.teacher.blocks[index]
        keep = self._write(attn.proj, block.attn.proj, block.ls1.gamma, f"blocks.{index}.attn.proj", attn.head_dim)
        weight, bias = self.read(f"blocks.{index}.norm1", block.attn.qkv.weight, block.attn.qkv.bias)
        rows = torch.cat([keep + part * (len(weight) // 3) for part in range(3)])
        attn.qkv.weight.copy_(weight[rows])
        attn.qkv.bias.copy_(bias[rows])

    def _mlp(self, mlp: Any, index: int) -> None:
        block = self.teacher.blocks[index]
        keep = self._write(mlp.fc2, block.mlp.fc2, block.ls2.gamma, f"blocks.{index}.mlp.fc2", 1)
        weight, bias = self.read(f"blocks.{index}.norm2", block.mlp.fc1.weight, block.mlp.fc1.bias)
        mlp.fc1.weight.copy_(weight[keep])
        mlp.fc1.bias.copy_(bias[keep])
