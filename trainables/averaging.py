"""Weights averaged over snapshots of one training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from trainables.config import TrainConfig
from trainables.draws import DROPOUT, generator
from trainables.precision import autocast, seeded
from trainables.resident import TrainingImages

Weights = dict[str, Tensor]


def mean(ingredients: Iterable[Weights]) -> Weights:
    """The equal mean of one or more weights, summed in float64; what is not floating (counts) is the last one's."""
    count = 0
    sums: Weights = {}
    last: Weights = {}
    for last in ingredients:
        count += 1
        sums = {name: sums.get(name, 0.0) + t.double() for name, t in last.items() if t.is_floating_point()}
    return {name: (sums[name] / count).to(t.dtype) if name in sums else t for name, t in last.items()}


def renew_batch_norms(model: nn.Module, data: TrainingImages, config: TrainConfig) -> None:
    """Give a model the batch-norm statistics of its own weights, in place (Izmailov et al. 2018, section 3.2).

    They are means over the batches of the last epoch, augmented as it was. Without batch norms nothing changes.
    """
    epoch = config.max_epochs
    batches = data.batches(config, epoch=epoch, image_size=data.split.image_size)
    seed = int(generator(config, epoch=epoch, stream=DROPOUT).integers(2**62))
    with seeded(seed, data.device), autocast(config.precision, data.device):
        update_bn((images_BCHW for images_BCHW, _ in batches), model)


@dataclass(frozen=True)
class Soup:
    """Ingredients whose mean was found better than each alone, in the order of the training, and that mean."""

    members: tuple[int, ...]
    weights: Weights


def greedy_soup(
    members: Sequence[int],
    figures: Sequence[float],
    *,
    average: Callable[[tuple[int, ...]], Weights],
    figure_of: Callable[[Weights], float],
) -> Soup | None:
    """A greedy "model soup" (Wortsman et al. 2022, recipe 1) of one training's snapshots; None when it is one of them.

    From the best member on, each is added if the mean's figure (higher is better) does not get worse, so the figure is
    never below the best member's. Of members with equal figures the earlier comes first.
    """
    ranked = sorted(zip(figures, members, strict=True), key=lambda pair: (-pair[0], pair[1]))
    (best, first), *others = ranked
    soup = Soup((first,), {})
    for _, member in others:
        candidate = tuple(sorted((*soup.members, member)))
        weights = average(candidate)
        figure = figure_of(weights)
        if figure >= best:
            soup, best = Soup(candidate, weights), figure
    return soup if len(soup.members) > 1 else None
