r"""Classifiers on frozen CLIP features, for few images a class.

Features f are of unit length, W (d, C) is the zero-shot classifier, 100 the factor of its logits.

    CLIPAdapter    f' = r MLP(f) + (1 - r) f, then unit length                    (Gao et al., arXiv 2110.04544)
    TipAdapter     100 f W + alpha exp(-beta (1 - f F^T)) L, F the training features, L their one-hot labels; in
                   Tip-Adapter-F the keys F learn                                 (Zhang et al., arXiv 2207.09519)
    LinearProbe    f A + b, logistic regression on the features alone; W plays no part
    GDA            100 f W + alpha (f V + b), Gaussian discriminant analysis      (Wang et al., arXiv 2402.04087)

Strengths (alpha, beta) and epochs are chosen on validation images. The official Tip-Adapter-F takes the epoch that is
best on the test set, and GDA's code chooses alpha for ImageNet there: numbers made that way are not comparable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionpeft.clip.errors import ClipError
from visionpeft.errors import require

FACTOR = 100.0
ROWS = 8192  # features whose residuals GDA holds at once


def top1(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())


def check(features: Tensor, labels: Tensor, classes: int) -> None:
    """Refuse training features that leave a class out.

    Raises:
        ClipError: with the classes that have no image.
    """
    missing = sorted(set(range(classes)) - set(labels.tolist()))
    if missing or len(features) != len(labels):
        raise ClipError(f"{len(features)} training features, {len(labels)} labels; classes without any: {missing[:5]}")


class CLIPAdapter(nn.Module):
    """Linear(d, d / reduction), ReLU, Linear, ReLU, no biases, mixed with its input by `ratio`.

    The paper mixes before the feature gets unit length; since the branch is homogeneous the length makes no difference.
    """

    def __init__(self, width: int, reduction: int = 4, ratio: float = 0.2) -> None:
        super().__init__()
        self.ratio = ratio
        self.down = nn.Linear(width, width // reduction, bias=False)
        self.up = nn.Linear(width // reduction, width, bias=False)

    def forward(self, f: Tensor) -> Tensor:
        """Features (N, d) -> unit-length features (N, d)."""
        return F.normalize(self.ratio * F.relu(self.up(F.relu(self.down(f)))) + (1 - self.ratio) * f, dim=-1)

    def fit(self, features: Tensor, labels: Tensor, w: Tensor, val: Tensor, val_labels: Tensor, epochs: int = 20,
            lr: float = 1e-3, batch: int = 256, seed: int = 0) -> CLIPAdapter:  # fmt: skip
        """Train by cross-entropy; the epoch that is best on the validation features is kept."""

        def logits(f: Tensor) -> Tensor:
            return FACTOR * self(f) @ w

        _descend(self, logits, features, labels, val, val_labels, epochs, lr, batch, seed)
        return self


@dataclass(frozen=True)
class TipAdapter:
    """Keys (M, d) of unit length, values (M, C) one-hot, and how sharply and strongly they count."""

    keys: Tensor
    values: Tensor
    alpha: float = 1.17
    beta: float = 1.0

    @classmethod
    def build(cls, views: Tensor, labels: Tensor, classes: int) -> TipAdapter:
        """From the features of the training images (M, d), or of several augmented views of each (V, M, d)."""
        views = views if views.dim() == 3 else views[None]
        check(views[0], labels, classes)
        keys = F.normalize(views.mean(0), dim=-1)
        return cls(keys, F.one_hot(labels, classes).to(keys.dtype))

    def logits(self, f: Tensor, w: Tensor) -> Tensor:
        """Features (N, d) -> (N, C)."""
        return FACTOR * f @ w + self.alpha * ((f @ self.keys.t() - 1) * self.beta).exp() @ self.values

    def search(self, val: Tensor, labels: Tensor, w: Tensor, largest: tuple[float, float] = (7.0, 3.0),
               steps: tuple[int, int] = (200, 20)) -> TipAdapter:  # fmt: skip
        """The (beta, alpha) that is best on validation features; the first of equals, beta outermost.

        Args:
            largest: upper ends of the grids of beta and alpha, which begin at 0.1; the official code sets them by data
                set: (7, 3) on ImageNet, Pets and UCF101, (50, 50) on Flowers, (30, 30) on Aircraft.
            steps: how many values of each.
        """
        base, affinity = FACTOR * val @ w, val @ self.keys.t() - 1
        best, chosen = -1.0, (self.beta, self.alpha)
        for beta in _grid(largest[0], steps[0]):
            cached = (affinity * beta).exp() @ self.values
            for alpha in _grid(largest[1], steps[1]):
                if (accuracy := top1(base + alpha * cached, labels)) > best:
                    best, chosen = accuracy, (beta, alpha)
        return replace(self, beta=chosen[0], alpha=chosen[1])

    def fine_tune(self, features: Tensor, labels: Tensor, w: Tensor, val: Tensor, val_labels: Tensor, epochs: int = 20,
                  lr: float = 1e-3, batch: int = 256, seed: int = 0) -> TipAdapter:  # fmt: skip
        """Tip-Adapter-F: the keys learn at alpha 1.17 and beta 1; the epoch that is best on validation is kept."""
        keys = nn.Linear(self.keys.shape[1], len(self.keys), bias=False, dtype=self.keys.dtype)
        with torch.no_grad():
            keys.weight.copy_(self.keys)

        def logits(f: Tensor) -> Tensor:
            return FACTOR * f @ w + 1.17 * (keys(f) - 1).exp() @ self.values

        _descend(keys, logits, features, labels, val, val_labels, epochs, lr, batch, seed, eps=1e-4)
        return replace(self, keys=keys.weight.detach().clone())


def _grid(largest: float, steps: int) -> list[float]:
    return [0.1 + i * (largest - 0.1) / steps for i in range(steps)]


def _descend(module: nn.Module, logits: Callable[[Tensor], Tensor], features: Tensor, labels: Tensor, val: Tensor,
             val_labels: Tensor, epochs: int, lr: float, batch: int, seed: int, eps: float = 1e-8) -> None:  # fmt: skip
    """AdamW, cosine per step to 0; `module` ends as it was after the epoch with the best validation accuracy."""
    generator = torch.Generator().manual_seed(seed)
    per_epoch = math.ceil(len(features) / batch)
    optimiser = torch.optim.AdamW(module.parameters(), lr=lr, eps=eps)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * per_epoch)
    best, kept = -1.0, {k: v.clone() for k, v in module.state_dict().items()}
    for _ in range(epochs):
        for rows in torch.randperm(len(features), generator=generator).split(batch):
            loss = F.cross_entropy(logits(features[rows]), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        with torch.no_grad():
            accuracy = top1(logits(val), val_labels)
        if accuracy > best:
            best, kept = accuracy, {k: v.clone() for k, v in module.state_dict().items()}
    module.load_state_dict(kept)


@dataclass(frozen=True)
class LinearProbe:
    """Logistic regression, A (d, C) and b (C)."""

    a: Tensor
    b: Tensor

    @classmethod
    def fit(cls, features: Tensor, labels: Tensor, classes: int, val: Tensor, val_labels: Tensor) -> LinearProbe:
        """L-BFGS of scikit-learn; C among 10^-3 ... 10^4, the first that is best on the validation features."""
        check(features, labels, classes)
        linear = require("sklearn.linear_model", extra="train")
        best, kept = -1.0, None
        for c in (10.0**e for e in range(-3, 5)):
            fitted = linear.LogisticRegression(C=c, max_iter=1000).fit(features.double().numpy(), labels.numpy())
            probe = cls(torch.from_numpy(fitted.coef_.T.copy()), torch.from_numpy(fitted.intercept_.copy()))
            if (accuracy := top1(probe.logits(val), val_labels)) > best:
                best, kept = accuracy, probe
        assert kept is not None
        return kept

    def logits(self, f: Tensor) -> Tensor:
        """Features (N, d) -> (N, C), float64."""
        return f.double() @ self.a + self.b


# ---- Gaussian discriminant analysis ---------------------------------------------------------------------------------

ALPHAS = tuple(10.0**e for e in range(-4, 3))


@dataclass(frozen=True)
class GDA:
    r"""V (d, C) and b (C) of Gaussians with one covariance, in float64.

        Sigma^-1 = d ((N - 1) S + tr(S) I)^-1,   v_c = Sigma^-1 mu_c,   b_c = log(1 / C) - mu_c^T Sigma^-1 mu_c / 2

    S is the covariance of the residuals x - mu_y; the shrinkage is Kubokawa and Srivastava's. The official code takes a
    pseudo-inverse in single precision; the matrix is positive definite, so this is a Cholesky solve.
    """

    v: Tensor
    b: Tensor
    alpha: float = 1.0
    tried: dict[float, float] = field(default_factory=dict)

    @classmethod
    def fit(cls, features: Tensor, labels: Tensor, classes: int) -> GDA:
        """From training features (N, d), all views of all images, and labels (N)."""
        check(features, labels, classes)
        x = features.double()
        means = class_means(x, labels, classes)
        scatter = x.new_zeros(x.shape[1], x.shape[1])  # (N - 1) S
        for part, own in zip(x.split(ROWS), labels.split(ROWS), strict=True):
            residuals = part - means[own]
            scatter.addmm_(residuals.t(), residuals)
        trace = scatter.trace() / (len(x) - 1)
        factor = torch.linalg.cholesky(scatter + trace * torch.eye(x.shape[1], dtype=x.dtype))
        return cls._of(means, x.shape[1] * torch.cholesky_solve(means.t(), factor))

    @classmethod
    def fit_base(cls, features: Tensor, labels: Tensor, classes: int) -> GDA:
        """Base classes of a base-to-new split: the mean of the classes' own covariances, pseudo-inverted, unshrunk."""
        check(features, labels, classes)
        x = features.double()
        means = class_means(x, labels, classes)
        if int(torch.bincount(labels).min()) < 2:
            raise ClipError("a class with one feature has no covariance: give two views or shots of each")
        inverse = torch.linalg.pinv(sum(x[labels == c].t().cov() for c in range(classes)) / classes, hermitian=True)
        return cls._of(means, inverse @ means.t())

    @classmethod
    def fit_new(cls, features: Tensor, w: Tensor, neighbours: int = 64, copies: int = 16) -> GDA:
        """Classes without images, from their zero-shot weights W (d, C) and the base classes' training features (N, d).

        The mean of a class is that of its `neighbours` nearest features and `copies` of its weight; its covariance is
        taken about the weight, shrunk and inverted, and the inverses are averaged.
        """
        x, w = features.double(), w.double()
        k = min(neighbours, len(x))
        if k < 2:
            raise ClipError("at least two training features are needed for the covariance of a new class")
        d, inverse, means = x.shape[1], torch.zeros(len(w), len(w), dtype=x.dtype), []
        for column in w.t():
            near = x[(x @ column).topk(k).indices]
            means.append((near.sum(0) + copies * column) / (k + copies))
            scatter = (near - column).t() @ (near - column)
            shrunk = scatter + scatter.trace() / (k - 1) * torch.eye(d, dtype=x.dtype)
            inverse += d * torch.cholesky_inverse(torch.linalg.cholesky(shrunk)) / w.shape[1]
        stacked = torch.stack(means)
        return cls._of(stacked, inverse @ stacked.t())

    @classmethod
    def _of(cls, means: Tensor, v: Tensor) -> GDA:
        return cls(v, -math.log(len(means)) - 0.5 * (means * v.t()).sum(1))

    def logits(self, f: Tensor, w: Tensor) -> Tensor:
        """Features (N, d) -> (N, C), float64."""
        f = f.double()
        return FACTOR * f @ w.double() + self.alpha * (f @ self.v + self.b)

    def search(self, val: Tensor, labels: Tensor, w: Tensor, alphas: Sequence[float] = ALPHAS) -> GDA:
        """The alpha that is best on validation features, the first of equals."""
        tried = {alpha: top1(replace(self, alpha=alpha).logits(val, w), labels) for alpha in alphas}
        return replace(self, alpha=max(tried, key=lambda a: tried[a]), tried=tried)


def class_means(x: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Means (C, d) of the features of each class."""
    sums = torch.zeros(classes, x.shape[1], dtype=x.dtype).index_add_(0, labels, x)
    return sums / torch.bincount(labels, minlength=classes)[:, None]
