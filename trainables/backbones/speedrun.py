"""A net of the CIFAR-10 speedruns, for tiny budgets.

Its ideas and where they come from:
- a frozen first convolution that whitens the patches of the training images: David Page, "How to train your ResNet 8:
  bag of tricks" (2019); with 2x2 patches, and each eigenvector with its negative: airbench94 of Keller Jordan, "94% on
  CIFAR-10 in 3.29 seconds on a single GPU" (2024, arXiv 2404.00498), which builds on tysam-code's hlb-CIFAR10 (2023);
- the identity as the first filters of every later convolution: Jordan's "identity initialization" (nn.init.dirac_);
- GELU, stages of two convolutions with the pooling after the first, global max pooling: airbench94;
- logits scaled down by a constant: Page (1/8) and airbench94 (1/9), which also leaves out the classifier's bias.

Left out, because the engine decides it: their optimizers, flips and test-time augmentation, a larger learning rate for
the norms' biases with frozen norm scales, and the training of the whitening's bias for the first epochs only.
The widths are 64, 128, 256 (airbench94: 64, 256, 256), for the sake of training on a CPU: 130 to 210 images a second of
32x32 on a core of an AMD EPYC that was shared with other work.

The small logits ask for a large learning rate: airbench94's is 1.5 for SGD on a mean loss.

Shape suffixes: N images, C channels, H height, W width, P values of a patch, L patches of an image, M of all images.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainables.backbones.layers import IMAGENET_STEM_FROM, Dropout

PATCH = 2  # pixels, side of a whitened patch
WIDTHS = (64, 128, 256)
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


def _stage(inputs: int, outputs: int, *, pool: bool) -> nn.Sequential:
    return nn.Sequential(
        _identity_conv(inputs, outputs),
        nn.MaxPool2d(2) if pool else nn.Identity(),
        nn.BatchNorm2d(outputs),
        nn.GELU(),
        _identity_conv(outputs, outputs),
        nn.BatchNorm2d(outputs),
        nn.GELU(),
    )


def _stride(image_size: int) -> int:
    return 2 if image_size >= IMAGENET_STEM_FROM else 1


def _poolings(image_size: int) -> int:
    whitened_side = max(1, (image_size - PATCH) // _stride(image_size) + 1)
    return min(len(WIDTHS), whitened_side.bit_length() - 1)


def smallest_image(built_for: int) -> int:
    """Side in pixels of the smallest image that a net built for a size takes: 9 from 9 pixels on, 16 from 96 on."""
    return _stride(built_for) * (2 ** _poolings(built_for) - 1) + PATCH


def speedrun_cnn(*, num_classes: int, dropout: float, image_size: int, channels: int) -> nn.Module:
    """Whitening, three stages that halve the map while there is something to halve, global max pooling, classifier.

    The whitening has stride 1 below 96 pixels, else 2, and needs 2 pixels. Call `initialize_from_images` once on a
    fresh net.
    """
    whitened = WhitenedConv(channels, stride=_stride(image_size))
    layers: list[nn.Module] = [whitened, nn.GELU()]
    width = len(whitened.bias)
    for index, outputs in enumerate(WIDTHS):
        layers.append(_stage(width, outputs, pool=index < _poolings(image_size)))
        width = outputs
    classifier = nn.Linear(width, num_classes, bias=False)
    return nn.Sequential(*layers, GlobalMax(), Dropout(dropout), classifier, Scale(LOGIT_SCALE))
