"""What a model predicts, plainly or averaged over views of each image.

Shape suffixes: V views, N examples, C classes (channels, of images), H height, W width.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, pad
from torch.nn.utils.fusion import fuse_conv_bn_eval

from results.schema import PREDICTIONS, IntArray, Predictions
from trainables.datasets import SplitImages
from trainables.precision import autocast
from trainables.resident import TrainingImages

FLOAT16_MAX = 65504.0
P = TypeVar("P", bound=Predictions)
Views = Callable[[Tensor], list[Tensor]]


def _shifted(images_NCHW: Tensor, by: int) -> Tensor:
    """Moved by a pixel or more down and to the right (up and to the left if negative), the border reflected."""
    size, reach = images_NCHW.shape[-1], abs(by)
    padded = pad(images_NCHW, (reach,) * 4, mode="reflect")
    return padded[:, :, reach - by :, reach - by :][:, :, :size, :size]


def _flip_shift(images_NCHW: Tensor) -> list[Tensor]:
    """The image and its mirror image, each also moved by a pixel either way (Jordan 2024)."""
    mirrored = [images_NCHW, images_NCHW.flip(-1)]
    return [*mirrored, *(_shifted(images, by) for images in mirrored for by in (1, -1))]


VIEWS: dict[str, Views] = {
    "none": lambda images_NCHW: [images_NCHW],
    "flip": lambda images_NCHW: [images_NCHW, images_NCHW.flip(-1)],
    "flip_shift": _flip_shift,
}


def predict(
    model: nn.Module, data: TrainingImages, indices_N: IntArray, *, views: str = "none", precision: str = "auto"
) -> npt.NDArray[np.float16]:
    """Float16 logits [N, C] of images of a dataset, as `predict_batches` gives them; ranks divide the images."""
    network = for_evaluation(model, data.device)
    divided = data.ranks.several and len(indices_N) >= data.ranks.size
    share = data.ranks.share(len(indices_N)) if divided else range(len(indices_N))
    batches = data.evaluation_batches(indices_N[share.start : share.stop])
    logits_NC = predict_batches(network, batches, device=data.device, views=views, precision=precision)
    return data.ranks.gathered(logits_NC) if divided else logits_NC


def for_evaluation(model: nn.Module, device: str) -> nn.Module:
    """The model in evaluation mode; on a CPU a copy with batch norms folded into convolutions."""
    model.eval()
    return folded(model) if device == "cpu" else model


@torch.inference_mode()
def predict_batches(
    network: nn.Module, batches: Iterable[Tensor], *, device: str, views: str = "none", precision: str = "auto"
) -> npt.NDArray[np.float16]:
    """Float16 logits [N, C] of one or more batches of float images [B, C, H, W] in 0 to 255, on the network's device.

    `network` comes from `for_evaluation`.
    """
    with autocast(precision, device):
        logits = [viewed_logits(network, images_NCHW, views=views) for images_NCHW in batches]
    return _float16(logits)


def _float16(logits: Iterable[Tensor]) -> npt.NDArray[np.float16]:
    """Batches' logits as one array, within the range of the type."""
    out_NC = torch.cat(list(logits)).clamp_(-FLOAT16_MAX, FLOAT16_MAX)
    result: npt.NDArray[np.float16] = out_NC.cpu().numpy().astype(np.float16)
    return result


def viewed_logits(network: nn.Module, images_NCHW: Tensor, *, views: str) -> Tensor:
    """Float32 logits [N, C]; with several `views` the logarithm of the views' mean probabilities."""
    return _averaged(_logits_of_views(network, images_NCHW, views=views))


def _logits_of_views(network: nn.Module, images_NCHW: Tensor, *, views: str) -> list[Tensor]:
    """Float32 logits [N, C] of each view; the first one is the image as it is."""
    return [network(view.contiguous(memory_format=torch.channels_last)).float() for view in VIEWS[views](images_NCHW)]


def _averaged(logits_VNC: list[Tensor]) -> Tensor:
    return logits_VNC[0] if len(logits_VNC) == 1 else _log_mean_probability(torch.stack(logits_VNC))


def folded(model: nn.Module) -> nn.Module:
    """A copy of a model in evaluation mode whose batch norms are part of the convolutions right before them.

    Only within plain `nn.Sequential`s, where the order of children is that of the computation; others stay. It saves
    small nets on a CPU a pass over their activations.
    """
    copied = copy.deepcopy(model)
    for sequence in copied.modules():
        if type(sequence).forward is nn.Sequential.forward:
            names = list(sequence._modules)
            for name, following in itertools.pairwise(names):
                convolution, norm = sequence._modules[name], sequence._modules[following]
                if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    sequence._modules[name] = fuse_conv_bn_eval(convolution, norm)
                    sequence._modules[following] = nn.Identity()
    return copied


def _log_mean_probability(logits_VNC: Tensor) -> Tensor:
    return log_softmax(logits_VNC, -1).logsumexp(0) - float(np.log(len(logits_VNC)))


@torch.inference_mode()
def _predict_with_views(
    model: nn.Module, data: TrainingImages, indices_N: IntArray, *, views: str, precision: str
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]:
    network = for_evaluation(model, data.device)
    plain, averaged = [], []
    with autocast(precision, data.device):
        for images_NCHW in data.evaluation_batches(indices_N):
            logits_VNC = _logits_of_views(network, images_NCHW, views=views)
            plain.append(logits_VNC[0])
            averaged.append(_averaged(logits_VNC))
    return _float16(plain), _float16(averaged)


def predictions(
    model: nn.Module, data: TrainingImages, of: type[P], *, views: str = "none", precision: str = "auto"
) -> P:
    """A model's predictions for the split that `of` stands for."""
    indices_N = _indices(data.split, of)
    return _labelled(predict(model, data, indices_N, views=views, precision=precision), data.split, of)


def predictions_with_views(
    model: nn.Module, data: TrainingImages, of: type[P], *, views: str, precision: str = "auto"
) -> tuple[P, P]:
    """A model's predictions for the images as they are, and averaged over `views`, from one pass over the views.

    Each equals to the bit what `predictions` makes of it. One process predicts all images: ranks do not divide them.
    """
    logits = _predict_with_views(model, data, _indices(data.split, of), views=views, precision=precision)
    plain, averaged = (_labelled(logits_NC, data.split, of) for logits_NC in logits)
    return plain, averaged


def predicted_splits(split: SplitImages) -> list[type[Predictions]]:
    """The splits that are predicted for storing: all but train that have examples. The only place that lists them."""
    return [cls for name, cls in PREDICTIONS.items() if split.sizes()[name]]


def _indices(split: SplitImages, of: type[Predictions]) -> IntArray:
    name = next(name for name, cls in PREDICTIONS.items() if cls is of)
    indices_N: IntArray = getattr(split, name)
    return indices_N


def _labelled(logits_NC: npt.NDArray[np.float16], split: SplitImages, of: type[P]) -> P:
    indices_N = _indices(split, of)
    return of(logits_NC=logits_NC, labels_N=split.labels_N[indices_N], example_ids_N=indices_N)
