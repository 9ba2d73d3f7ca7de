"""An ensemble as a thing to use: its members' weights kept beside its description, loaded and asked.

    from orchestrator.serving import load_ensemble

    ensemble = load_ensemble("results/runs/digits/ensembles/e0001")
    probs_NC = ensemble.predict(["scan.png", "another.png"])

Shape suffixes: M members, N examples, B batch, C channels or classes, H height, W width.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from orchestrator.combination import COMBINERS, Combined
from orchestrator.description import FILE_NAME, Description, Member, read_description
from orchestrator.pooling import POOLS, pooled_log_probs
from results.objects import is_remote
from results.schema import DataWarning, FloatArray, IntArray, UsageError
from results.store import Experiment
from trainables.backbones import check_backbone
from trainables.evaluation import for_evaluation, predict_batches, viewed_logits
from trainables.image_files import EncodedImage, decode_squares
from trainables.model import unfilled_model
from trainables.precision import autocast
from trainables.process import computes_bfloat16
from trainables.resident import evaluation_batch_size, memory_format, shared_tensor
from trainables.validation import Probabilities, log_softmax

PIXEL_TYPES = ("uint8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")
Images = Sequence[str | Path | bytes] | np.ndarray[Any, Any] | Tensor


def digest(folder: Path) -> str:
    """Of an ensemble's description and its members' weights: equal for copies, different after any change."""
    hashed = hashlib.sha256((folder / FILE_NAME).read_bytes())
    for member in read_description(folder).members:
        hashed.update(hashlib.sha256(_weights_path(folder, member).read_bytes()).digest())
    return hashed.hexdigest()[:16]


def load_ensemble(path: str | Path, *, device: str = "cpu") -> Ensemble:
    """The ensemble in a folder, or at a URI in an object store, on a device.

    Raises UsageError, naming the file, for a description or weights that are missing or damaged, and for an ensemble
    some of whose members' weights had been removed before it was made.
    """
    try:
        torch.zeros(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device={device!r} cannot be used here ({str(error).splitlines()[0]}); give cpu") from error
    folder = _fetched(path) if isinstance(path, str) and is_remote(path) else Path(path)
    folder = folder.parent if folder.name == FILE_NAME else folder
    description = read_description(folder)
    for member in description.members:
        check_backbone(member.backbone, image_size=description.image_size)
    _check_kept(folder, description)
    networks = tuple(_network(folder, description, member, device=device) for member in description.members)
    return Ensemble(description, networks, torch.device(device).type)


def _fetched(uri: str) -> Path:
    """The copy of an ensemble in an object store, at .../NAME/ensembles/ID."""
    place, mark, options = uri.partition("?")
    results_dir, _, within = place.rstrip("/").removesuffix(f"/{FILE_NAME}").rpartition("/ensembles/")
    results_dir, _, name = results_dir.rpartition("/")
    if not name or not within:
        raise UsageError(f"{uri!r} is no ensemble; wanted s3://BUCKET/PREFIX/NAME/ensembles/ID")
    return Experiment.open(f"{results_dir}{mark}{options}", name).whole_ensemble(within)


def _check_kept(folder: Path, description: Description) -> None:
    lacking = [member.name for member in description.members if not member.weights_file]
    if lacking:
        raise UsageError(
            f"ensemble {folder} was scored but cannot be used: the weights of {', '.join(lacking)} were removed before "
            f"it was made; search with a larger --keep-checkpoints, or choose among trials that have theirs: "
            f"python -m orchestrator.ensemble --candidates \"checkpoint != ''\""
        )


def _weights_path(folder: Path, member: Member) -> Path:
    path = folder / member.weights_file
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"{folder / FILE_NAME} names {member.weights_file!r}, which lies outside of its folder")
    return path


def _network(folder: Path, description: Description, member: Member, *, device: str) -> nn.Module:
    """A member's network in evaluation mode."""
    path = _weights_path(folder, member)
    remedy = "copy the ensemble's whole folder, or make it anew with python -m orchestrator.ensemble"
    try:
        weights = load_file(path)
        model = unfilled_model(
            member.train_config().having({"backbone": member.backbone}),
            num_classes=len(description.class_names),
            image_size=description.image_size,
            channels=description.channels,
        )
        model.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UsageError(f"{path} cannot be read ({str(error).splitlines()[0]}); {remedy}") from error
    model.requires_grad_(False)
    return for_evaluation(model.to(device).to(memory_format=memory_format(member.train_config())), device)


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Members' networks on a device, and what makes one prediction of theirs. Made by `load_ensemble`."""

    description: Description
    networks: tuple[nn.Module, ...]
    device: str

    @property
    def members(self) -> tuple[Member, ...]:
        """Which trials they are."""
        return self.description.members

    @property
    def weights(self) -> FloatArray:
        """[M], or [M, C] where each class has its own."""
        return self.description.weights

    @property
    def combiner(self) -> str:
        """The name of the rule by which members are combined."""
        return self.description.combiner

    @property
    def temperature(self) -> float | None:
        """By which the combined log-probabilities are divided; None where there are none."""
        return self.description.temperature

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in the order of probabilities' columns."""
        return self.description.class_names

    def predict(self, images: Images) -> Probabilities:
        """Calibrated probabilities [N, C] in float64.

        `images`: an array or tensor [N, channels, H, W] of values in 0 to 255 and of the ensemble's size; or paths or
        bytes of image files, of which the centre square is scaled to it, as the dataset's loader does.
        On the machine where the members were trained they equal what was stored for the same images, in the same order.
        Raises UsageError for images of another kind, and where the combiner gives no probabilities.
        """
        self._check_has_probabilities("predict_classes gives the classes that it ranks first")
        log_probs_NC = self._combined(images).log_probs_NC
        assert log_probs_NC is not None
        return np.exp(log_probs_NC)

    def predict_classes(self, images: Images) -> IntArray:
        """The class [N] of each image, as a column of `class_names`. See `predict` for what may be given."""
        return np.asarray(self._combined(images).scores_NC.argmax(1), dtype=np.int64)

    def _check_has_probabilities(self, fix: str) -> None:
        if self.temperature is None:
            others = ", ".join(name for name in COMBINERS if name in POOLS)
            raise UsageError(
                f"combiner {self.combiner!r} gives no probabilities; {fix}, and ensembles made with one of {others} "
                f"have probabilities"
            )

    def _combined(self, images: Images) -> Combined:
        logits_MNC = np.concatenate([self._logits(batch) for batch in self._batches(images)], axis=1)
        return self.description.combination.combine(log_softmax(logits_MNC))

    def _logits(self, images_BCHW: Tensor) -> FloatArray:
        """The members' float16 logits [M, B, C]."""
        return np.stack(
            [
                predict_batches(network, [images_BCHW], device=self.device, views=member.views, precision=precision)
                for network, member, precision in self._asked
            ]
        )

    @cached_property
    def _asked(self) -> list[tuple[nn.Module, Member, str]]:
        """Each network with the member that it is and the precision it was trained in.

        On a CPU without instructions for bfloat16 such members compute in float32: the other would take long.
        """
        of_members = [(n, m, m.train_config().precision) for n, m in zip(self.networks, self.members, strict=True)]
        if self.device != "cpu" or computes_bfloat16():
            return of_members
        return [(n, m, "float32" if precision == "bfloat16" else precision) for n, m, precision in of_members]

    def _batches(self, images: Images) -> ImageBatches:
        shape = (self.description.channels, self.description.image_size)
        if isinstance(images, (str, bytes, Path)):
            raise UsageError("a single image was given; wanted a list of them, such as predict([image])")
        if not isinstance(images, (np.ndarray, Tensor, Sequence)):
            raise UsageError(f"images of type {type(images).__name__}; wanted a list of image files, or one array")
        if len(images) == 0:
            raise UsageError("no images were given; wanted one or more")
        if isinstance(images, (np.ndarray, Tensor)):
            return ImageBatches(_checked(images, *shape), *shape, self.device)
        return ImageBatches([_encoded(image, place) for place, image in enumerate(images)], *shape, self.device)

    def check_can_teach(self) -> None:
        """Raise UsageError when the combiner gives no probabilities to learn from."""
        self._check_has_probabilities("a student learns from probabilities")

    @property
    def num_bytes(self) -> int:
        """What the networks take of the device's memory."""
        tensors = [t for network in self.networks for t in (*network.parameters(), *network.buffers())]
        return sum(t.numel() * t.element_size() for t in tensors)

    @torch.no_grad()
    def log_probabilities(self, images_BCHW: Tensor) -> Tensor:
        """Calibrated log-probabilities [B, C] in float32 of float images in 0 to 255, all on the ensemble's device."""
        log_probs = []
        for network, member, precision in self._asked:
            with autocast(precision, self.device):
                log_probs.append(viewed_logits(network, images_BCHW, views=member.views).log_softmax(-1))
        return pooled_log_probs(self.description.combination, torch.stack(log_probs))


@dataclass(frozen=True, eq=False)
class ImageBatches:
    """Float images [B, C, H, W] in 0 to 255 on a device, in batches of the size that predictions were stored with.

    Files are decoded as they are gone through, so that no more than a batch of them is in memory.
    """

    images: Tensor | list[EncodedImage]
    channels: int
    image_size: int
    device: str

    def __iter__(self) -> Iterator[Tensor]:
        size = evaluation_batch_size(self.image_size)
        for start in range(0, len(self.images), size):
            part = self.images[start : start + size]
            pixels = part if isinstance(part, Tensor) else torch.from_numpy(self._decoded(part))
            yield pixels.to(self.device).float()

    def _decoded(self, images: Sequence[EncodedImage]) -> np.ndarray[Any, Any]:
        return decode_squares(
            images, image_size=self.image_size, channels=self.channels, explained=_say_what_cannot_be_read
        )


def _checked(images: np.ndarray[Any, Any] | Tensor, channels: int, size: int) -> Tensor:
    wanted = f"wanted [N, {channels}, {size}, {size}] with values in 0 to 255"
    if str(images.dtype).removeprefix("torch.") not in PIXEL_TYPES:
        raise UsageError(f"images of type {images.dtype}; {wanted}, of type uint8 or float32")
    images_NCHW = images.detach() if isinstance(images, Tensor) else shared_tensor(np.ascontiguousarray(images))
    if images_NCHW.ndim != 4 or tuple(images_NCHW.shape[1:]) != (channels, size, size):
        raise UsageError(
            f"images of shape {list(images_NCHW.shape)}; {wanted}: put the channels before height and width and scale "
            f"the images, or give image files"
        )
    low, high = (float(end) for end in images_NCHW.aminmax())
    if not (low >= 0 and high <= 255):
        raise UsageError(f"images with values from {low:g} to {high:g}; {wanted}: do not normalize them")
    if images_NCHW.is_floating_point() and high <= 1 and low < high:
        warnings.warn(
            f"images with values from {low:g} to {high:g}, all but black; {wanted}", DataWarning, stacklevel=2
        )
    return images_NCHW


def _encoded(image: object, place: int) -> EncodedImage:
    if isinstance(image, bytes):
        return EncodedImage(image, f"image {place}", 0)
    if isinstance(image, (str, Path)):
        return EncodedImage(Path(image), str(image), 0)
    raise UsageError(f"image {place} is a {type(image).__name__}; wanted paths or bytes of image files, or one array")


def _say_what_cannot_be_read(image: EncodedImage, why: str) -> str:
    return f"{image.name} cannot be read as an image ({why}); leave it out or mend it"
