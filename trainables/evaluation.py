"""What a model predicts. Shape suffixes: N examples, C classes, H height, W width."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

EVALUATION_BATCH = 500
FLOAT16_MAX = 65504.0


@torch.inference_mode()
def predict(model: nn.Module, images_NCHW: Tensor, indices_N: Tensor) -> npt.NDArray[np.float16]:
    """Float16 logits [N, C] of uint8 images, in evaluation mode. bfloat16 arithmetic on a GPU."""
    model.eval()
    device = images_NCHW.device.type
    logits = []
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        for chunk in indices_N.split(EVALUATION_BATCH):
            batch = images_NCHW[chunk].float().contiguous(memory_format=torch.channels_last)
            logits.append(model(batch).float())
    out_NC = torch.cat(logits).clamp_(-FLOAT16_MAX, FLOAT16_MAX)
    result: npt.NDArray[np.float16] = out_NC.cpu().numpy().astype(np.float16)
    return result
