"""Optimizers whose settings are tensors, and the moving average of the weights.

What differs between trials of a search must not be a constant of a compiled or captured step: learning rate, weight
decay and the gradient's largest norm are tensors that a new trial overwrites in place, as are momenta.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trainables.config import TrainConfig
from trainables.precision import weights_type

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
ADAM_BETAS = (0.9, 0.999)
ADAM_RMS = 0.2
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.LayerNorm)


Kind = TypeVar("Kind", bound=torch.optim.Optimizer)


def never_compiled(kind: type[Kind]) -> type[Kind]:
    """Return a kind of optimizer without torch's guards against being compiled, for steps taken under `no_grad`.

    The guards import the compiler when the optimizer is made: 3 s of a CPU in every worker. `step` no longer switches
    gradients off.
    """
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in ("add_param_group", "zero_grad", "step")}
    return type(kind.__name__, (kind,), {"__doc__": kind.__doc__, "__module__": __name__, **methods})


SGD = never_compiled(torch.optim.SGD)
AdamW = never_compiled(torch.optim.AdamW)


@never_compiled
class Muon(torch.optim.Optimizer):
    """Momentum whose update of a matrix is made orthogonal (Jordan et al. 2024, "Muon").

    Filters are matrices of [outputs, inputs x height x width]. Updates are scaled to the size that AdamW's have (Liu
    et al. 2025, "Muon is scalable for LLM training"), so that both share a learning rate. Decays nothing itself.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float | Tensor,
        momentum: float,
        nesterov: bool,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`dtype`: the number type in which updates are made orthogonal."""
        super().__init__(groups, {"lr": lr, "momentum": momentum, "nesterov": nesterov})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is ever given
        """Update the parameters that have a gradient; those of one shape together."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, **{k: group[k] for k in ("lr", "momentum", "nesterov")})

    def _update(self, parameters: list[nn.Parameter], *, lr: Any, momentum: float, nesterov: bool) -> None:
        grads = [p.grad for p in parameters if p.grad is not None]
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        updates = torch._foreach_lerp(grads, buffers, momentum) if nesterov else buffers
        matrices_LRC = orthogonalized(torch.stack([update.flatten(1) for update in updates]), dtype=self._dtype)
        scale = ADAM_RMS * max(matrices_LRC.shape[1:]) ** 0.5
        for parameter, matrix_RC in zip(parameters, matrices_LRC * (lr * scale), strict=True):
            parameter.sub_(matrix_RC.reshape(parameter.shape))


def orthogonalized(matrices_LRC: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return, roughly, each matrix's nearest (semi-)orthogonal one: singular values of 0.7 to 1.2 (Jordan et al. 2024).

    A quintic Newton-Schulz iteration, computed in `dtype`.
    """
    a, b, c = NEWTON_SCHULZ
    work = matrices_LRC.to(dtype)
    tall = work.shape[1] > work.shape[2]
    x = work.mT if tall else work
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices_LRC.dtype)


class Optimization:
    """The optimizer of a network cut into parts, the last of which is its classifier.

    Weight decay applies to filters and matrices, and with `decay_norm_and_bias` to everything.
    """

    def __init__(self, parts: Sequence[nn.Module], config: TrainConfig, *, device: str) -> None:
        self._tensors = device == "cuda"
        self._decoupled = config.optimizer != "sgd"
        fused = device in ("cpu", "cuda")
        *body, head = parts
        head_groups = _groups([head], factor=config.head_lr_factor, config=config)
        body_groups = _groups(body, factor=1.0, config=config)
        # Nesterov without momentum is refused by torch.
        momentum, nesterov = config.momentum, config.nesterov and config.momentum > 0
        self.optimizers: list[torch.optim.Optimizer]
        if config.optimizer == "sgd":
            self.optimizers = [
                SGD([*body_groups, *head_groups], lr=0.0, momentum=momentum, nesterov=nesterov, fused=fused)
            ]
        else:
            of_muon = [g["matrices"] and config.optimizer == "muon" for g in body_groups]
            matrices = [g for g, it_is in zip(body_groups, of_muon, strict=True) if it_is]
            others = [g for g, it_is in zip(body_groups, of_muon, strict=True) if not it_is] + head_groups
            self.optimizers = [
                AdamW(others, lr=0.0, betas=ADAM_BETAS, weight_decay=0.0, fused=fused, capturable=self._tensors)
            ]
            if matrices:
                low = device == "cuda" or config.precision == "bfloat16"
                dtype = torch.bfloat16 if low else weights_type(config.precision)
                self.optimizers.append(Muon(matrices, lr=0.0, momentum=momentum, nesterov=nesterov, dtype=dtype))
        self.weight_decay, self.gradient_clip = torch.zeros(2, device=device)
        for group in self._all_groups():
            group["lr"] = torch.zeros((), device=device) if self._tensors else 0.0
        self._create_state()

    def _create_state(self) -> None:
        """Make every momentum now, as zeros: a parameter may join later, and a captured step wants fixed places."""
        for optimizer in self.optimizers:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                names: tuple[str, ...] = (
                    ("exp_avg", "exp_avg_sq") if isinstance(optimizer, torch.optim.AdamW) else ("momentum_buffer",)
                )
                if isinstance(optimizer, torch.optim.SGD) and not optimizer.defaults["momentum"]:
                    names = ()
                state = {name: torch.zeros_like(parameter) for name in names}
                if "exp_avg" in state:
                    state["step"] = torch.zeros((), device=parameter.device if self._tensors else "cpu")
                optimizer.state[parameter] = state

    def begin(self, config: TrainConfig) -> None:
        """Forget everything and take on another configuration of the same structure, in place."""
        for state in self._states():
            for tensor in state.values():
                tensor.zero_()
        self.weight_decay.fill_(config.weight_decay)
        self.gradient_clip.fill_(config.gradient_clip)

    def set_learning_rate(self, lr: float) -> None:
        """Use `lr` from the next step on, times each group's factor."""
        for group in self._all_groups():
            if self._tensors:
                group["lr"].fill_(lr * group["factor"])
            else:
                group["lr"] = lr * group["factor"]

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def step(self, *, clip: bool, scaler: torch.amp.GradScaler | None = None) -> Tensor:
        """Update the parameters from their gradients, clipped if asked for. Returns the gradient's norm before that."""
        if scaler is not None:
            for optimizer in self.optimizers:
                scaler.unscale_(optimizer)
        grads = [p.grad for group in self._all_groups() for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if clip:
            torch._foreach_mul_(grads, (self.gradient_clip / (norm + 1e-6)).clamp(max=1.0))
        taken = torch.ones_like(norm)
        if scaler is not None:  # a step whose gradients overflow is not taken
            taken = norm.isfinite().float()
            norm = torch.where(taken.bool(), norm, 0.0)
        self._decay(self.weight_decay * taken)
        for optimizer in self.optimizers:
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
        return norm

    def _decay(self, weight_decay: Tensor) -> None:
        """Weight decay: added to SGD's gradients, taken off the weights otherwise (Loshchilov & Hutter 2019)."""
        for group in self._all_groups():
            decayed = [p for p in group["params"] if p.grad is not None] if group["decayed"] else []
            if decayed and self._decoupled:
                torch._foreach_mul_(decayed, 1 - group["lr"] * weight_decay)
            elif decayed:
                torch._foreach_add_([p.grad for p in decayed], torch._foreach_mul(decayed, weight_decay))

    def state_dict(self) -> list[dict[str, Tensor]]:
        """The momenta, a dictionary a parameter."""
        return [dict(state) for state in self._states()]

    def load_state_dict(self, saved: list[dict[str, Tensor]]) -> None:
        """Go on from saved momenta, in place."""
        for state, loaded in zip(self._states(), saved, strict=True):
            for name, tensor in state.items():
                tensor.copy_(loaded[name])

    def _all_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def _states(self) -> list[dict[str, Tensor]]:
        return [o.state[p] for o in self.optimizers for group in o.param_groups for p in group["params"]]


def _groups(modules: Sequence[nn.Module], *, factor: float, config: TrainConfig) -> list[dict[str, Any]]:
    """Return the filters and matrices, the vectors, and the biases of norms where these have a rate of their own."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    of_norms = _norm_biases(modules) if config.norm_bias_lr_factor != 1 else set()
    vectors = [p for p in parameters if p.ndim <= 1]
    vector = {"matrices": False, "decayed": config.decay_norm_and_bias}
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "matrices": True, "decayed": True, "factor": factor},
        {"params": [p for p in vectors if p not in of_norms], "factor": factor, **vector},
        {
            "params": [p for p in vectors if p in of_norms],
            "factor": factor * config.norm_bias_lr_factor,
            **vector,
        },
    ]
    return [group for group in groups if group["params"]]


def _norm_biases(modules: Sequence[nn.Module]) -> set[nn.Parameter]:
    norms = (m for module in modules for m in module.modules() if isinstance(m, NORMS))
    return {norm.bias for norm in norms if norm.bias is not None}


class MovingAverage:
    """An exponential moving average of a model's weights and buffers; `update` after each step.

    The decay starts low and rises to `decay`, as min(decay, (1 + n) / (10 + n)) after n updates, so that short
    trainings are not averages of their initialization; the first update copies. The count stays on the host:
    torch's AveragedModel keeps it on the device, where reading it would stop every step.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False)
        self._decay = decay
        self._updates = 0

    def begin(self, model: nn.Module, *, decay: float) -> None:
        """Start anew from a model, with another decay."""
        # What an earlier trial left may be NaN, which no weight of zero takes away.
        self.module.load_state_dict(model.state_dict())
        self._decay = decay
        self._updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's present weights and buffers into account."""
        n = self._updates
        weight = 1 - min(self._decay, (1 + n) / (10 + n)) if n else 1.0
        pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([average for average, _ in floating], [new for _, new in floating], weight)
        for average, new in pairs:
            if not average.is_floating_point():
                average.copy_(new)
        self._updates += 1

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs."""
        return {"module": self.module.state_dict(), "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.module.load_state_dict(state["module"])
        self._updates = state["updates"]


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
