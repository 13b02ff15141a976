"""Image networks for the benchmarks, as the papers have them: plain PyTorch, random weights."""

from __future__ import annotations

import torch
from torch import nn

RESNET50 = ((3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2))  # blocks, channels, stride
# Expansion, channels, blocks, stride of MobileNetV2's stages.
MOBILENET_V2 = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
    (6, 320, 1, 1),
)  # fmt: skip


def convolution(
    ci: int, co: int, kernel: int, stride: int = 1, groups: int = 1, activation: str = "relu"
) -> nn.Sequential:
    """Convolution, batch norm and, unless it is "", an activation: "relu" or "relu6"."""
    layers = [
        nn.Conv2d(ci, co, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(co),
    ]
    if activation:
        layers.append(nn.ReLU6() if activation == "relu6" else nn.ReLU())
    return nn.Sequential(*layers)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 around a residual; the 3 x 3 has the stride (version 1.5)."""

    def __init__(self, ci: int, width: int, stride: int):
        super().__init__()
        co = 4 * width
        self.reduce = convolution(ci, width, 1)
        self.spatial = convolution(width, width, 3, stride)
        self.expand = convolution(width, co, 1, activation="")
        changes = stride > 1 or ci != co
        self.shortcut = convolution(ci, co, 1, stride, activation="") if changes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, ci, h, w] to [n, 4 width, h / stride, w / stride]."""
        y = self.expand(self.spatial(self.reduce(x)))
        return torch.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet v1.5 (He et al. 2015; the stride as in torchvision): images to class scores."""

    def __init__(self, stages: tuple[tuple[int, int, int], ...] = RESNET50, classes: int = 1000):
        super().__init__()
        self.stem = convolution(3, 64, 7, 2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        blocks: list[nn.Module] = []
        channels = 64
        for count, width, stride in stages:
            for number in range(count):
                blocks.append(Bottleneck(channels, width, stride if number == 0 else 1))
                channels = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.classify = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, 3, h, w] to [n, classes]."""
        x = self.blocks(self.pool(self.stem(x)))
        return self.classify(x.mean((2, 3)))


class InvertedResidual(nn.Module):
    """1 x 1, depthwise 3 x 3 and 1 x 1, with a residual where the shapes allow it."""

    def __init__(self, ci: int, co: int, expansion: int, stride: int):
        super().__init__()
        width = ci * expansion
        wider = [] if expansion == 1 else [convolution(ci, width, 1, activation="relu6")]
        self.layers = nn.Sequential(
            *wider,
            convolution(width, width, 3, stride, width, "relu6"),
            convolution(width, co, 1, activation=""),
        )
        self.residual = stride == 1 and ci == co

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, ci, h, w] to [n, co, h / stride, w / stride]."""
        y = self.layers(x)
        return x + y if self.residual else y


class MobileNet(nn.Module):
    """MobileNetV2 (Sandler et al. 2018): images to class scores."""

    def __init__(
        self,
        stages: tuple[tuple[int, int, int, int], ...] = MOBILENET_V2,
        head: int = 1280,
        classes: int = 1000,
    ):
        super().__init__()
        layers: list[nn.Module] = [convolution(3, 32, 3, 2, activation="relu6")]
        channels = 32
        for expansion, width, count, stride in stages:
            for number in range(count):
                step = stride if number == 0 else 1
                layers.append(InvertedResidual(channels, width, expansion, step))
                channels = width
        self.layers = nn.Sequential(*layers, convolution(channels, head, 1, activation="relu6"))
        self.classify = nn.Linear(head, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, 3, h, w] to [n, classes]."""
        return self.classify(self.layers(x).mean((2, 3)))
