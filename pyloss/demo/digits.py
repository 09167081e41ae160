"""Digits without labels: views, an encoder, and classifiers that judge its features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyloss.demo.sorting import load_digits


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """(N, 1, 8, 8), each turned by up to 25 degrees, moved by a pixel, scaled, with noise."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(images), generator=generator)

    angle, scale = uniform(-0.45, 0.45), uniform(0.85, 1.15)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    rows = [cos, -sin, uniform(-0.25, 0.25), sin, cos, uniform(-0.25, 0.25)]
    grid = F.affine_grid(
        torch.stack(rows, 1).view(-1, 2, 3), [len(images), 1, 8, 8], align_corners=False
    )
    shown = F.grid_sample(images.unsqueeze(1), grid, align_corners=False)
    return shown + 0.1 * torch.randn(shown.shape, generator=generator)


class Encoder(nn.Module):
    """Features (N, 128) of images; `head` is for the training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 128),
        )  # fmt: skip
        # As GroCo's paper has it; without the normalisation GroCo lets all features become one.
        self.head = nn.Sequential(
            nn.ReLU(), nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU(),
            nn.Linear(128, 64), nn.BatchNorm1d(64, affine=False),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)


class Judge:
    """Accuracies of features, per cent, on images that are moved once and for all."""

    def __init__(self, seed: int, images: int | None) -> None:
        generator = torch.Generator().manual_seed(1000 + seed)
        self.parts = [
            (moved(part.images[:images], generator), part.labels[:images]) for part in load_digits()
        ]

    @torch.no_grad()
    def knn(self, features: nn.Module, classes: Tensor | None = None) -> float:
        """Five nearest by cosine; of held-out images of some classes alone, or of all."""
        (x, y), (test, truth) = [
            (F.normalize(features(images), dim=1), labels) for images, labels in self.parts
        ]
        votes = F.one_hot(y[(test @ x.t()).topk(min(5, len(x)), 1).indices], 10).sum(1)
        right = (votes.argmax(1) == truth).float()
        if classes is not None:
            right = right[torch.isin(truth, classes)]
        return 100 * right.mean().item()

    @torch.no_grad()
    def linear(self, features: nn.Module) -> float:
        """Logistic regression on features of mean 0 and variance 1."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        (x, y), (test, truth) = [(features(a).numpy(), labels.numpy()) for a, labels in self.parts]
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
        return 100 * float(classifier.fit(x, y).score(test, truth))
