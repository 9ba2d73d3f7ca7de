"""Where an image's pixels come from: windows and mirror images exactly, everything else by one interpolation.

Maps go from places in the new image to places in the old one, as 3x3 matrices or their two upper rows, in coordinates
(x, y) that run from -1 to 1 between the outer edges of the image.

Shape suffixes: B batch, S the images concerned, N images, H height, W width, C channels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample, pad

from trainables.config import TrainConfig
from trainables.draws import Array, places, rectangles
from trainables.policies import GEOMETRIC, ID, Operations


def windows(padded_BHWC: Tensor, start_B2: Tensor, *, size: int) -> Tensor:
    """The [B, size, size, C] windows of contiguous images that begin at (row, column) `start_B2`."""
    num_images, height, width, channels = padded_BHWC.shape
    # Each row of a window lies in one piece: rows are chosen among all overlapping pieces of that length.
    num_pieces = padded_BHWC.numel() - size * channels + 1
    pieces = padded_BHWC.view(-1).as_strided((num_pieces, size * channels), (1, 1))
    rows = torch.arange(size, device=start_B2.device) * (width * channels)
    images = torch.arange(num_images, device=start_B2.device) * (height * width * channels)
    first_B = images + start_B2[:, 0] * (width * channels) + start_B2[:, 1] * channels
    return pieces.index_select(0, (first_B[:, None] + rows).view(-1)).view(num_images, size, size, channels)


def padded(images_BHWC: Tensor, *, padding: int, fill: str) -> Tensor:
    """Images with a border: `black`, or `reflect`, which mirrors them at their outermost pixels again and again."""
    if fill == "black":
        return pad(images_BHWC, (0, 0, padding, padding, padding, padding))
    size = images_BHWC.shape[1]
    place = torch.arange(-padding, size + padding, device=images_BHWC.device)
    period = max(2 * size - 2, 1)
    place = torch.minimum(place.remainder(period), (-place).remainder(period))
    # Of the columns only those of the border: single pixels are slow to choose.
    left, right = (images_BHWC.index_select(2, border) for border in (place[:padding], place[-padding:]))
    return torch.cat([left, images_BHWC, right], 2).index_select(1, place)


def put(images_BHWC: Tensor, index_S: Tensor, changed_SHWC: Tensor) -> None:
    """Replace some of a batch's uint8 images, in place."""
    rows, changed = images_BHWC.view(len(images_BHWC), -1), changed_SHWC.reshape(len(index_S), -1)
    if rows.shape[1] % 8 == 0:
        rows, changed = rows.view(torch.int64), changed.view(torch.int64)  # eight at a time
    rows.index_copy_(0, index_S, changed)


def resample(images_SHWC: Tensor, map_S23: Tensor, box_S4: Tensor | None = None) -> Tensor:
    """New uint8 images whose pixels are found in the old ones by `map_S23`, bilinearly; black outside.

    With `box_S4` (left, top, width, height in pixels, inside the image) the map leads into that part of the image
    stretched to full size, and nothing outside it is seen, as if it had been cut out before.
    """
    size = images_SHWC.shape[1]
    map_S23 = map_S23.float()
    if box_S4 is not None:
        start_S2, side_S2 = box_S4.float().split(2, 1)
        zoom_S2, centre_S2 = side_S2 / size, (2 * start_S2 + side_S2) / size - 1
        map_S23 = map_S23 * zoom_S2[:, :, None]
        map_S23[:, :, 2] += centre_S2
    # Not affine_grid: its product may be computed in TF32, whose places are off by a fraction of a pixel.
    centres_W = torch.arange(1 - size, size, 2, device=images_SHWC.device) / size
    by_x, by_y, shift = map_S23[..., None].unbind(2)
    place_S2HW = (by_x * centres_W)[:, :, None, :] + (by_y * centres_W + shift)[..., None]
    pixels = images_SHWC.float().permute(0, 3, 1, 2).contiguous()
    if box_S4 is None:
        sampled = grid_sample(pixels, place_S2HW.permute(0, 2, 3, 1), align_corners=False)
    else:
        reach_S2 = zoom_S2 - 1 / size  # from the middle of the box to the centre of its outermost pixels
        low, high = ((centre_S2 + sign * reach_S2)[..., None, None] for sign in (-1, 1))
        inside = place_S2HW.clamp(min=low, max=high)
        sampled = grid_sample(pixels, inside.permute(0, 2, 3, 1), align_corners=False)
        # Where the map leads out of the box the new image is black, with a transition of one of its pixels.
        beyond_S2HW = inside.sub_(place_S2HW).abs_().mul_((size / 2 / zoom_S2)[..., None, None])
        seen_S2HW = beyond_S2HW.neg_().add_((0.5 + 0.5 / zoom_S2)[..., None, None]).clamp_(0, 1)
        sampled *= seen_S2HW.prod(1, keepdim=True)
    # On a CPU, torch moves floats faster than bytes.
    return sampled.round_().permute(0, 2, 3, 1).contiguous().to(torch.uint8)


def policy_maps(operations: Operations, *, image_size: int) -> tuple[Array, Array]:
    """The product [N, 3, 3] of each image's geometric operations, and which images have one."""
    num_images, slots = operations.operation_NS.shape
    maps = np.tile(np.eye(3), (num_images, 1, 1))
    for slot in range(slots):
        operation, level = operations.operation_NS[:, slot], operations.level_NS[:, slot]
        step = np.tile(np.eye(3), (num_images, 1, 1))
        # Shears keep the upper left corner where it is, as torchvision's policies have them.
        step[:, 0, 1] = step[:, 0, 2] = np.where(operation == ID["ShearX"], level, 0)
        step[:, 1, 0] = step[:, 1, 2] = np.where(operation == ID["ShearY"], level, 0)
        step[:, 0, 2] -= np.where(operation == ID["TranslateX"], 2 * level / image_size, 0)
        step[:, 1, 2] -= np.where(operation == ID["TranslateY"], 2 * level / image_size, 0)
        step[:, :2, :2] = np.where((operation == ID["Rotate"])[:, None, None], _rotation(level), step[:, :2, :2])
        maps = maps @ step
    moved_NS: Array = np.reshape(np.isin(operations.operation_NS, [ID[name] for name in GEOMETRIC]), (-1, slots))
    return maps, moved_NS.max(axis=1)


def _rotation(degrees_N: Array) -> Array:
    """Where the pixels of an image come from that was turned counter-clockwise (y points down): [N, 2, 2]."""
    cosine, sine = np.cos(np.radians(degrees_N)), np.sin(np.radians(degrees_N))
    rotation: Array = np.stack([np.stack([cosine, -sine], -1), np.stack([sine, cosine], -1)], -2)
    return rotation


def draw_affine(rng: np.random.Generator, config: TrainConfig, *, num_images: int) -> tuple[Array, Array]:
    """Maps [N, 3, 3] of random turn, shift, size and horizontal shear about the centre, and which images get one."""
    turn, shift_x, shift_y, growth, shear = rng.uniform(-1, 1, size=(5, num_images))
    applies = rng.random(num_images) < config.affine_probability
    tangent = np.tan(np.radians(shear * config.affine_shear_degrees))
    shears = np.tile(np.eye(2), (num_images, 1, 1))
    shears[:, 0, 1] = tangent
    maps = np.tile(np.eye(3), (num_images, 1, 1))
    size = 1 + growth * config.affine_scale
    maps[:, :2, :2] = shears @ _rotation(turn * config.affine_degrees) / size[:, None, None]
    shift = 2 * config.affine_translate * np.stack([shift_x, shift_y], -1)
    maps[:, :2, 2] = -(maps[:, :2, :2] @ shift[:, :, None])[:, :, 0]
    return maps, applies


def draw_boxes(
    rng: np.random.Generator, config: TrainConfig, *, num_images: int, image_size: int
) -> tuple[Array, Array]:
    """Boxes [N, 4] of RandomResizedCrop (left, top, width, height), and which images are cropped so."""
    ratios = (config.resized_crop_min_ratio, config.resized_crop_max_ratio)
    height, width, found = rectangles(
        rng,
        num_images=num_images,
        image_size=image_size,
        largest_side=image_size,
        areas=(config.resized_crop_min_area, config.resized_crop_max_area),
        ratios=ratios,
    )
    left, top = (places(rng, side, image_size=image_size) for side in (width, height))
    # Where none was found: the largest box in the middle whose ratio is allowed.
    widest, highest = min(1.0, ratios[1]), min(1.0, 1 / ratios[0])
    middle_width, middle_height = max(1, round(image_size * widest)), max(1, round(image_size * highest))
    middle = ((image_size - middle_width) // 2, (image_size - middle_height) // 2, middle_width, middle_height)
    boxes = np.where(found[:, None], np.stack([left, top, width, height], -1), middle)
    return boxes, rng.random(num_images) < config.resized_crop_probability


def fill_rectangles(images_BHWC: Tensor, index_S: Tensor, rectangle_S4: Tensor, *, side: int, fill_C: Tensor) -> None:
    """Fill rectangles (top, left, bottom, right) of the images `index_S`, in place; none is longer than `side`."""
    size = images_BHWC.shape[1]
    steps = torch.arange(side, device=index_S.device)
    rectangle_S4 = rectangle_S4.long()
    # Places beyond a rectangle's end are its last ones again, so that all have the same number.
    rows_SK = torch.minimum(rectangle_S4[:, 0, None] + steps, rectangle_S4[:, 2, None] - 1)
    columns_SK = torch.minimum(rectangle_S4[:, 1, None] + steps, rectangle_S4[:, 3, None] - 1)
    pixels_SKK = ((index_S[:, None] * size + rows_SK) * size)[:, :, None] + columns_SK[:, None, :]
    images_BHWC.view(-1, images_BHWC.shape[-1])[pixels_SKK.view(-1)] = fill_C


def draw_cutout(
    rng: np.random.Generator, config: TrainConfig, *, num_images: int, image_size: int
) -> tuple[Array, Array]:
    """Squares [N, 4] around random pixels, cut off at the borders, and which images get one."""
    size = min(config.cutout_size, image_size // 2)
    start = rng.integers(0, image_size, size=(num_images, 2)) - size // 2
    squares = np.concatenate([start, start + size], -1).clip(0, image_size)
    return squares, rng.random(num_images) < config.cutout_probability


def draw_erasing(
    rng: np.random.Generator, config: TrainConfig, *, num_images: int, image_size: int
) -> tuple[Array, Array]:
    """Rectangles [N, 4] of 2 to 33% of the area, ratios from 0.3 to 1 / 0.3, and which images get one."""
    height, width, found = rectangles(
        rng,
        num_images=num_images,
        image_size=image_size,
        largest_side=image_size - 1,
        areas=(0.02, 0.33),
        ratios=(0.3, 1 / 0.3),
    )
    top, left = (places(rng, side, image_size=image_size) for side in (height, width))
    applies = found & (rng.random(num_images) < config.erasing_probability)
    return np.stack([top, left, top + height, left + width], -1), applies


def erasing_side(image_size: int) -> int:
    """No side of a rectangle to erase is longer."""
    return min(image_size - 1, math.ceil(image_size * math.sqrt(0.33 / 0.3)))
