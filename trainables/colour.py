"""Colour operations on batches of uint8 images, each image with its own level; as torchvision's operators.

An operation takes images [S, H, W, C] and levels [S] (float32; see `policies.Operations`) and returns new images.
Grey images (C = 1) have no saturation and no hue: these operations are the identity there.

Shape suffixes: S images, H height, W width, C channels, P pixels (H x W), V the 256 values of a pixel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)


def _column(level_S: Tensor) -> Tensor:
    return level_S[:, None, None, None].float()


def _to_bytes(values: Tensor) -> Tensor:
    """Cut off at 0 and 255 and truncated; changes its argument."""
    return values.clamp_(0, 255).to(torch.uint8)


def _planes(images_SHWC: Tensor) -> Tensor:
    """A float32 copy [S, C, H, W], each channel in one piece."""
    return images_SHWC.float().permute(0, 3, 1, 2).contiguous()


def _blend(images_SHWC: Tensor, reference: Tensor, factor_S: Tensor) -> Tensor:
    """factor x image + (1 - factor) x reference."""
    blended = images_SHWC.float().mul_(_column(factor_S))
    return _to_bytes(blended.add_(_column(1 - factor_S) * reference))


def _grey(images_SHWC: Tensor) -> Tensor:
    """Truncated luma [S, H, W, 1], float32."""
    if images_SHWC.shape[-1] == 1:
        return images_SHWC.float()
    red, green, blue = images_SHWC.unbind(-1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).floor_()[..., None]


def brightness(images_SHWC: Tensor, factor_S: Tensor) -> Tensor:
    """Multiply."""
    return _to_bytes(images_SHWC.float().mul_(_column(factor_S)))


def saturation(images_SHWC: Tensor, factor_S: Tensor) -> Tensor:
    """Blend with the grey image."""
    if images_SHWC.shape[-1] == 1:
        return images_SHWC
    return _blend(images_SHWC, _grey(images_SHWC), factor_S)


def contrast(images_SHWC: Tensor, factor_S: Tensor) -> Tensor:
    """Blend with the mean of the grey image."""
    return _blend(images_SHWC, _grey(images_SHWC).mean((1, 2, 3), keepdim=True), factor_S)


def sharpness(images_SHWC: Tensor, factor_S: Tensor) -> Tensor:
    """Blend with the image smoothed by [[1, 1, 1], [1, 5, 1], [1, 1, 1]] / 13; the outermost pixels stay."""
    images = images_SHWC.float()
    rows = images[:, :-2] + images[:, 1:-1] + images[:, 2:]
    inner = images[:, 1:-1, 1:-1]
    inner.mul_(4).add_(rows[:, :, :-2]).add_(rows[:, :, 1:-1]).add_(rows[:, :, 2:]).div_(13).round_()
    return _blend(images_SHWC, images, factor_S)


def posterize(images_SHWC: Tensor, bits_S: Tensor) -> Tensor:
    """Keep the highest bits of each value."""
    return images_SHWC & (256 - 2 ** (8 - bits_S)).to(torch.uint8)[:, None, None, None]


def solarize(images_SHWC: Tensor, threshold_S: Tensor) -> Tensor:
    """Invert the values that are not below the threshold."""
    bright = images_SHWC >= threshold_S.ceil().to(torch.uint8)[:, None, None, None]
    return images_SHWC ^ (bright.to(torch.uint8) * 255)


def invert(images_SHWC: Tensor, level_S: Tensor) -> Tensor:
    """255 minus the value."""
    return 255 - images_SHWC


def autocontrast(images_SHWC: Tensor, level_S: Tensor) -> Tensor:
    """Stretch each channel's values to 0 to 255; a channel of one value stays."""
    planes_SCHW = _planes(images_SHWC)
    low, high = planes_SCHW.amin((2, 3), keepdim=True), planes_SCHW.amax((2, 3), keepdim=True)
    flat = low == high
    scale = torch.where(flat, 1.0, 255 / (high - low))
    return _to_bytes(planes_SCHW.sub_(low.masked_fill_(flat, 0)).mul_(scale).permute(0, 2, 3, 1).contiguous())


def equalize(images_SHWC: Tensor, level_S: Tensor) -> Tensor:
    """Spread each channel's values so that every value is about as frequent, as in PIL's ImageOps."""
    num_images, height, width, channels = images_SHWC.shape
    num_pixels = height * width
    channel_SC = torch.arange(num_images * channels, device=images_SHWC.device).view(num_images, 1, 1, channels)
    index = images_SHWC + channel_SC * 256
    counts = torch.zeros(num_images * channels * 256, device=index.device)
    counts.scatter_add_(0, index.view(-1), torch.ones((), device=index.device).expand(index.numel()))
    upto_CV = counts.view(-1, 256).cumsum(1)
    # All pixels but those of the brightest value are spread over 255 steps.
    step_C1 = torch.where(upto_CV < num_pixels, upto_CV, 0).amax(1, keepdim=True).div_(255).floor_()
    table_CV = torch.arange(256.0, device=index.device).repeat(len(upto_CV), 1)
    half_C1 = (step_C1 / 2).floor_()
    spread_CV = ((upto_CV[:, :-1] + half_C1) / step_C1).floor_().clamp_(0, 255)
    spread_CV = torch.cat([torch.zeros_like(step_C1), spread_CV], 1)
    table_CV = torch.where(step_C1 > 0, spread_CV, table_CV).to(torch.uint8)
    return table_CV.view(-1).index_select(0, index.view(-1)).view(images_SHWC.shape)


def hue(images_SHWC: Tensor, turns_S: Tensor) -> Tensor:
    """Turn the hue (of hue, saturation, value) by so many turns of the colour circle."""
    if images_SHWC.shape[-1] == 1:
        return images_SHWC
    planes_S3HW = _planes(images_SHWC)
    red, green, blue = planes_S3HW.unbind(1)
    value = planes_S3HW.amax(1)
    chroma = value - planes_S3HW.amin(1)
    per_chroma = chroma.clamp(min=1).reciprocal_()
    from_red, from_green = value == red, value == green
    # In sixths of the circle; of several brightest channels the first counts.
    sixths = (red - green).mul_(per_chroma).add_(4)
    sixths = torch.where(from_green, (blue - red).mul_(per_chroma).add_(2), sixths)
    sixths = torch.where(from_red, (green - blue).mul_(per_chroma), sixths)
    sixths += 6 * turns_S[:, None, None].float()
    for channel, offset in enumerate((5, 3, 1)):
        # A channel lacks the more of the chroma, the further its own hue is.
        distance = sixths + offset
        distance -= (distance / 6).floor_().mul_(6)  # remainder_ is several times as slow
        lack = torch.minimum(distance, 4 - distance).clamp_(0, 1)
        torch.sub(value, lack.mul_(chroma), out=planes_S3HW[:, channel])
    # torchvision scales by 1 / 255 before and by 255.999 afterwards.
    return _to_bytes(planes_S3HW.mul_(255.999 / 255).permute(0, 2, 3, 1).contiguous())


COLOUR_OPERATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Brightness": brightness,
    "Color": saturation,
    "Contrast": contrast,
    "Sharpness": sharpness,
    "Posterize": posterize,
    "Solarize": solarize,
    "AutoContrast": autocontrast,
    "Equalize": equalize,
    "Invert": invert,
    "Hue": hue,
}
