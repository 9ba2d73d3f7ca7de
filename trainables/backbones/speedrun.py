"""Nets of the CIFAR speedruns in three sizes, for tiny budgets.

Their ideas and where they come from:
- a frozen first convolution that whitens the patches of the training images: David Page, "How to train your ResNet 8:
  bag of tricks" (2019); with 2x2 patches, and each eigenvector with its negative: airbench94 of Keller Jordan, "94% on
  CIFAR-10 in 3.29 seconds on a single GPU" (2024, arXiv 2404.00498), which builds on tysam-code's hlb-CIFAR10 (2023);
- the identity as the first filters of every later convolution: Jordan's "identity initialization" (nn.init.dirac_);
- GELU, stages of two convolutions with the pooling after the first, global max pooling: airbench94;
- in the large net a third convolution in each stage, and a shortcut around it and the second: airbench96, of the same
  paper;
- logits scaled down by a constant: Page (1/8) and airbench94 (1/9), which also leaves out the classifier's bias.

The medium and the large net do not pool in the last stage. On CPUs that multiply matrices of bfloat16 in tiles, the
gradient of a filter costs several times as much a multiply-add on maps of 3x3 as on maps of 7x7.

The optimizer, the rate of the norms' biases and the epochs in which the whitening's bias learns are the
configuration's: see `optimizer`, `norm_bias_lr_factor` and `stem_bias_epochs` in TrainConfig.

The small logits ask for a large learning rate: airbench94's is 1.5 for SGD on a mean loss.

Shape suffixes: N images, C channels, H height, W width, P values of a patch, L patches of an image, M of all images.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainables.backbones.layers import IMAGENET_STEM_FROM, Dropout

PATCH = 2  # pixels, side of a whitened patch
LOGIT_SCALE = 1 / 9
VARIANCE_EPSILON = 5e-4  # airbench94's; keeps directions without variance finite
IMAGES_AT_ONCE = 64


class WhitenedConv(nn.Module):
    """A 2x2 convolution whose outputs are uncorrelated and of unit variance on the images given to `whiten`.

    The weight is a buffer: saved, never trained. Until `whiten` it is the pixels of a patch and their negatives. The
    bias is trained.
    """

    weight: Tensor

    def __init__(self, channels: int, *, stride: int) -> None:
        super().__init__()
        self.stride = stride
        pixels = torch.eye(channels * PATCH**2).view(-1, channels, PATCH, PATCH)
        self.register_buffer("weight", torch.cat([pixels, -pixels]))
        self.bias = nn.Parameter(torch.zeros(len(self.weight)))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, C, S, S] -> [N, 8C, (S - 2) // stride + 1, the same]; the last 4C maps are minus the first."""
        return functional.conv2d(x_NCHW, self.weight, self.bias, self.stride)

    @torch.no_grad()
    def whiten(self, images_NCHW: Tensor) -> None:
        """Set the weight from the patches' covariance, and the bias so that the outputs have mean 0.

        A direction of variance v is divided by sqrt(v + 5e-4). Deterministic: in float64, the largest entry of an
        eigenvector is positive.
        """
        mean_P, covariance_PP = patch_moments(images_NCHW, stride=self.stride)
        variances_P, directions_PP = torch.linalg.eigh(covariance_PP)
        filters_PP = directions_PP.T  # a row is a direction
        largest_P1 = filters_PP.gather(1, filters_PP.abs().argmax(1, keepdim=True))
        filters_PP = filters_PP * largest_P1.sign() / (variances_P.clamp(min=0) + VARIANCE_EPSILON).sqrt()[:, None]
        biases_P = -filters_PP @ mean_P
        self.weight.copy_(torch.cat([filters_PP, -filters_PP]).view(self.weight.shape))
        self.bias.copy_(torch.cat([biases_P, -biases_P]))


def patch_moments(images_NCHW: Tensor, *, stride: int) -> tuple[Tensor, Tensor]:
    """Mean [P] and covariance [P, P] of all patches of the images, P = 4C values each; float64 on the CPU."""
    values = images_NCHW.shape[1] * PATCH**2
    sum_P = images_NCHW.new_zeros(values, dtype=torch.float64)
    products_PP = images_NCHW.new_zeros(values, values, dtype=torch.float64)
    count = 0
    for some_NCHW in images_NCHW.split(IMAGES_AT_ONCE):
        patches_NPL = functional.unfold(some_NCHW.double(), PATCH, stride=stride)
        patches_PM = patches_NPL.transpose(0, 1).flatten(1)
        sum_P += patches_PM.sum(1)
        products_PP += patches_PM @ patches_PM.T
        count += patches_PM.shape[1]
    mean_P = sum_P.cpu() / count
    return mean_P, products_PP.cpu() / count - mean_P.outer(mean_P)


class GlobalMax(nn.Module):
    """The largest value of each map; unlike AdaptiveMaxPool2d's, its gradient is deterministic on a GPU."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, C, S, S] -> [N, C]."""
        return x_NCHW.amax((2, 3))


class Scale(nn.Module):
    """Multiplication by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return x * self.factor


def _identity_conv(inputs: int, outputs: int) -> nn.Conv2d:
    """A 3x3 convolution whose first `inputs` filters hand their input on."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    with torch.no_grad():
        nn.init.dirac_(convolution.weight[:inputs])
    return convolution


class Stage(nn.Module):
    """A convolution that widens the map and, with `pool`, halves it; then one or two more at that size.

    With a third convolution the second and the third are a residual branch (He et al. 2016).
    """

    def __init__(self, inputs: int, outputs: int, *, convolutions: int, pool: bool) -> None:
        super().__init__()
        self.widening = nn.Sequential(
            _identity_conv(inputs, outputs),
            nn.MaxPool2d(2) if pool else nn.Identity(),
            nn.BatchNorm2d(outputs),
            nn.GELU(),
        )
        layers: list[nn.Module] = []
        for _ in range(convolutions - 1):
            layers += [_identity_conv(outputs, outputs), nn.BatchNorm2d(outputs), nn.GELU()]
        self.keeping = nn.Sequential(*layers[:-1])
        self.shortcut = convolutions > 2

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """[N, inputs, S, S] -> [N, outputs, S // 2 or S, the same]."""
        x_NCHW = self.widening(x_NCHW)
        kept_NCHW = self.keeping(x_NCHW)
        return functional.gelu(kept_NCHW + x_NCHW if self.shortcut else kept_NCHW)


@dataclass(frozen=True, kw_only=True)
class Size:
    """Channels of the three stages, convolutions in each, and how many stages halve the map, from the first on."""

    widths: tuple[int, int, int]
    convolutions: int = 2
    poolings: int = 3


SMALL = Size(widths=(64, 128, 256))
MEDIUM = Size(widths=(64, 192, 256), poolings=2)
LARGE = Size(widths=(64, 192, 384), convolutions=3, poolings=2)


def _stride(image_size: int) -> int:
    return 2 if image_size >= IMAGENET_STEM_FROM else 1


def _poolings(size: Size, image_size: int) -> int:
    whitened_side = max(1, (image_size - PATCH) // _stride(image_size) + 1)
    return min(size.poolings, whitened_side.bit_length() - 1)


def smallest_image(built_for: int, size: Size = SMALL) -> int:
    """Return the side in pixels of the smallest image that a net built for an image size takes.

    Of the small net 9 from 9 pixels on, 16 from 96 on; of the others 5 from 5 pixels on, 8 from 96 on.
    """
    return _stride(built_for) * (2 ** _poolings(size, built_for) - 1) + PATCH


smallest_image_medium = partial(smallest_image, size=MEDIUM)
smallest_image_large = partial(smallest_image, size=LARGE)


def _net(size: Size, *, num_classes: int, dropout: float, image_size: int, channels: int) -> nn.Module:
    """Return whitening, the stages, global max pooling, classifier.

    The whitening has stride 1 below 96 pixels, else 2, and needs 2 pixels. Call `initialize_from_images` once on a
    fresh net.
    """
    whitened = WhitenedConv(channels, stride=_stride(image_size))
    layers: list[nn.Module] = [whitened, nn.GELU()]
    width = len(whitened.bias)
    for index, outputs in enumerate(size.widths):
        pool = index < _poolings(size, image_size)
        layers.append(Stage(width, outputs, convolutions=size.convolutions, pool=pool))
        width = outputs
    classifier = nn.Linear(width, num_classes, bias=False)
    return nn.Sequential(*layers, GlobalMax(), Dropout(dropout), classifier, Scale(LOGIT_SCALE))


def speedrun_cnn(*, num_classes: int, dropout: float, image_size: int, channels: int) -> nn.Module:
    """Return the small net: 65 million multiply-adds at 32 pixels."""
    return _net(SMALL, num_classes=num_classes, dropout=dropout, image_size=image_size, channels=channels)


def speedrun_cnn_medium(*, num_classes: int, dropout: float, image_size: int, channels: int) -> nn.Module:
    """Return the medium net: 114 million multiply-adds at 32 pixels."""
    return _net(MEDIUM, num_classes=num_classes, dropout=dropout, image_size=image_size, channels=channels)


def speedrun_cnn_large(*, num_classes: int, dropout: float, image_size: int, channels: int) -> nn.Module:
    """Return the large net: 250 million multiply-adds at 32 pixels."""
    return _net(LARGE, num_classes=num_classes, dropout=dropout, image_size=image_size, channels=channels)
