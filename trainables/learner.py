"""A network and its optimizer, ready to take steps, and kept warm from one trial to the next.

Whatever differs between trials of one structure is a tensor that `begin` overwrites in place: weights, momenta,
learning rate, weight decay, dropout, label smoothing; mixing weights come with each batch. So a later trial finds the
step compiled, the CUDA graph captured and the kernels chosen.

Shape suffixes: B batch, C channels or classes, H height, W width, K labels of a mixed image.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.parallel import DistributedDataParallel

from results.schema import UsageError
from trainables.backbones import check_backbone, parts
from trainables.backbones.layers import set_dropout
from trainables.config import TrainConfig
from trainables.datasets import SplitImages
from trainables.distillation import distilled_loss
from trainables.mixing import SoftTargets
from trainables.model import INITIALIZATION_SAMPLE, Classifier, evenly_spread, fresh_model, multiply_adds
from trainables.optim import MovingAverage, Optimization
from trainables.parallel import agree_on_norms, check_divisible, divided, synchronizes_norms
from trainables.precision import autocast, check_execution, resolved, weights_type, widened
from trainables.resident import TrainingImages, batch_size_of, memory_format

STRUCTURE = (
    "backbone",
    "optimizer",
    "momentum",
    "nesterov",
    "decay_norm_and_bias",
    "head_lr_factor",
    "norm_bias_lr_factor",
    "accumulation_steps",
    "precision",
    "compile",
    "cuda_graph",
    "channels_last",
    "gradient_compression",
    "sync_batch_norm",
)
WARMUP_STEPS = 3
NO_TEACHER = (
    "distill_weight={weight:g}, but there is no teacher to learn from; wanted python -m orchestrator.distill, or "
    "DistilledImages around the images"
)
MOST_LABELS = 4  # of RICAP
RECOMPILE_LIMIT = 32  # image sizes times stages of unfreezing

Step = Callable[..., None]


def structure(config: TrainConfig) -> tuple[object, ...]:
    """What a compiled or captured step has built in; trials that agree in it can share a learner."""
    switched = ("gradient_clip", "ema_decay", "unfreeze_epochs", "stem_epochs", "distill_weight")
    switches = (bool(getattr(config, name)) for name in switched)
    return (*(getattr(config, name) for name in STRUCTURE), *switches)


def check_trainable(config: TrainConfig, split: SplitImages, *, device: str, num_workers: int = 1) -> None:
    """Raise UsageError when a configuration cannot be trained on a dataset, on a device or by so many workers."""
    check_execution(config, device)
    check_backbone(config.backbone, image_size=split.image_size)
    if config.initial_image_size is not None:
        check_backbone(config.backbone, image_size=config.initial_image_size, built_for=split.image_size)
    if config.initial_image_size is not None and config.initial_image_size > split.image_size:
        raise UsageError(
            f"initial_image_size={config.initial_image_size} is more than the images' {split.image_size} pixels; "
            f"lower it, or give none"
        )
    batch = batch_size_of(config, split)
    check_divisible(config, batch_size=batch, num_workers=num_workers, device=device)
    if config.accumulation_steps > batch // 2:
        raise UsageError(
            f"accumulation_steps={config.accumulation_steps} leaves parts of a single image of the {batch} there are; "
            f"lower it"
        )


class Learner:
    """A network in training on the images' device."""

    def __init__(self, config: TrainConfig, data: TrainingImages) -> None:
        split, device = data.split, data.device
        check_trainable(config, split, device=device, num_workers=data.ranks.size)
        self.structure = structure(config)
        self.data = data
        self._ranks = data.ranks
        model = self._fresh(config).to(weights_type(config.precision))
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.multiply_adds = multiply_adds(model, channels=split.channels, image_size=split.image_size)
        if synchronizes_norms(config, device, self._ranks):
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model = model.to(device).to(memory_format=memory_format(config))
        self._network: nn.Module = self.model
        self.parts = parts(model.backbone)
        self.ema = MovingAverage(self.model, decay=config.ema_decay) if config.ema_decay else None
        self.optimization = Optimization(self.parts, config, device=device)
        scalars = torch.zeros(7, device=device, dtype=weights_type(config.precision)).unbind()
        self.label_smoothing, self.loss_sum, self.correct, self.attainable, self.norm_sum, *distillation = scalars
        self.distill_weight, self.distill_temperature = distillation
        self._config = config
        self._exchanged: list[bool] = []
        self._norms_synchronized = synchronizes_norms(config, device, self._ranks)
        self._trainable = [p.requires_grad for p in self.model.parameters()]
        self._precision = resolved(config.precision, device)
        self._accumulation_steps = config.accumulation_steps
        self._clip = bool(config.gradient_clip)
        self._is_student = bool(config.distill_weight)
        self._scaler = torch.amp.GradScaler(device) if self._precision == "float16" else None
        on_gpu = device == "cuda"
        compiled = on_gpu if config.compile is None else config.compile
        self._loss = _compiled(self._eager_loss) if compiled else self._eager_loss
        may_capture = on_gpu and not (config.unfreeze_epochs or config.stem_epochs) and not self._ranks.several
        captured = may_capture if config.cuda_graph is None else config.cuda_graph
        self._graphs: dict[torch.Size, CapturedStep] | None = {} if captured else None
        self._memory_pool = torch.cuda.graph_pool_handle() if captured else None  # shared: steps never overlap
        self._one_shape = compiled or captured
        self.begin(config, model=None)

    def _fresh(self, config: TrainConfig) -> Classifier:
        return fresh_model(config, self.data.split, self._initialization_sample)

    def _initialization_sample(self) -> Tensor:
        train = self.data.split.train
        sample_N = train[evenly_spread(len(train), INITIALIZATION_SAMPLE)]
        return torch.cat([batch.cpu() for batch in self.data.evaluation_batches(sample_N)])

    def fits(self, config: TrainConfig, data: TrainingImages) -> bool:
        """Whether another trial can go on with this learner."""
        return data is self.data and structure(config) == self.structure

    def begin(self, config: TrainConfig, *, model: Classifier | None) -> None:
        """Take on a trial of the same structure, its weights those of `model` (None: those there are)."""
        if model is not None:
            self.model.load_state_dict(model.state_dict())
        self._batch_size = batch_size_of(config, self.data.split)
        set_dropout(self.model, config.dropout)
        self.label_smoothing.fill_(config.label_smoothing)
        self.distill_weight.fill_(config.distill_weight)
        self.distill_temperature.fill_(config.distill_temperature)
        self.optimization.begin(config)
        self.freeze(0)
        if self.ema is not None:
            self.ema.begin(self.model, decay=config.ema_decay)
        if self._scaler is not None:
            self._scaler.load_state_dict(torch.amp.GradScaler(self.data.device).state_dict())

    def restart(self, config: TrainConfig) -> None:
        """Take on a trial of the same structure from its first step."""
        self.begin(config, model=self._fresh(config))

    def freeze(self, count: int) -> None:
        """Let the first `count` parts, from the input, not learn; all others do, as the backbone has it."""
        frozen = {p for part in self.parts[:count] for p in part.parameters()}
        for parameter, trainable in zip(self.model.parameters(), self._trainable, strict=True):
            parameter.requires_grad_(trainable and parameter not in frozen)
            parameter.grad = parameter.grad if parameter.requires_grad else None
        self._divide()

    def _divide(self) -> None:
        """Have several ranks exchange the gradients of what learns now."""
        learning = [p.requires_grad for p in self.model.parameters()]
        if self._ranks.several and learning != self._exchanged:
            self._network, self._exchanged = divided(self.model, self._config, self.data.device), learning

    @property
    def evaluated(self) -> nn.Module:
        """The model whose figures are reported: the moving average when there is one."""
        return self.model if self.ema is None else self.ema.module

    def begin_epoch(self) -> None:
        """Set the sums of the epoch's figures to zero, and the model to training."""
        for figure in (self.loss_sum, self.correct, self.attainable, self.norm_sum):
            figure.zero_()
        self.model.train()

    def step(self, images_BCHW: Tensor, targets: SoftTargets, *, lr: float) -> None:
        """One update from one batch; figures are summed on the device, and nothing waits for it."""
        self.optimization.set_learning_rate(lr)
        targets = _padded(targets) if self._one_shape else targets
        batch = (images_BCHW, targets.labels_BK, targets.weights_BK, *self._taught(targets))
        if self._graphs is None:
            self._step(*batch)
        else:
            if images_BCHW.shape not in self._graphs:
                self._graphs[images_BCHW.shape] = CapturedStep(self._step, self._memory_pool)
            self._graphs[images_BCHW.shape](*batch)
        if self.ema is not None:
            self.ema.update(self.model)

    def _taught(self, targets: SoftTargets) -> tuple[Tensor, ...]:
        """The teacher's log-probabilities where the configuration wants them."""
        if not self._is_student:
            return ()
        if targets.teacher_log_probs_BC is None:
            raise UsageError(NO_TEACHER.format(weight=float(self.distill_weight)))
        return (targets.teacher_log_probs_BC,)

    def _step(self, images_BCHW: Tensor, labels_BK: Tensor, weights_BK: Tensor, *taught: Tensor) -> None:
        self.optimization.zero_grad()
        whole = (images_BCHW, labels_BK, weights_BK, *taught)
        num_images = self._batch_size if self._ranks.several else len(images_BCHW)
        parts = list(zip(*(t.tensor_split(self._accumulation_steps) for t in whole), strict=True))
        for part, (images, *targets) in enumerate(parts, start=1):
            with self._exchanging(last=part == len(parts)):
                loss, correct = self._loss(images, *targets)
                loss = loss * (len(images) / num_images)
                scaled = loss if self._scaler is None else self._scaler.scale(loss)
                # Ranks' gradients are averaged, and their sum is that of the whole batch's mean.
                (scaled * self._ranks.size if self._ranks.several else scaled).backward()
            self.loss_sum += loss.detach()
            self.correct += correct
        self.attainable += weights_BK.amax(1).sum()
        self.norm_sum += self.optimization.step(clip=self._clip, scaler=self._scaler)
        if self._scaler is not None:
            self._scaler.update()

    def _exchanging(self, *, last: bool) -> AbstractContextManager[None]:
        """Where a part's gradients are computed; they are exchanged together with the last part's."""
        if last or not isinstance(self._network, DistributedDataParallel):
            return nullcontext()
        return self._network.no_sync()

    @contextmanager
    def unexchanged(self) -> Iterator[None]:
        """Steps without the exchange of gradients, for who times it: afterwards the ranks' weights differ."""
        network, self._network = self._network, self.model
        try:
            yield
        finally:
            self._network = network

    def finish_epoch(self) -> None:
        """Have all ranks agree on what each of them has measured alone: figures and the norms' statistics."""
        if self._ranks.several:
            pooled = self._ranks.summed(torch.stack([self.loss_sum, self.correct, self.attainable]))
            for figure, value in zip((self.loss_sum, self.correct, self.attainable), pooled, strict=True):
                figure.copy_(value)
            if not self._norms_synchronized:
                agree_on_norms([self.model] if self.ema is None else [self.model, self.ema.module], self._ranks)

    @property
    def figures(self) -> list[float]:
        """The sums of the epoch's figures so far: loss, right predictions, attainable ones, norm of the gradient."""
        return [float(figure) for figure in (self.loss_sum, self.correct, self.attainable, self.norm_sum)]

    def set_figures(self, figures: Sequence[float]) -> None:
        """Go on summing from here; what ranks have pooled counts once."""
        *pooled, norm_sum = figures
        for figure, value in zip((self.loss_sum, self.correct, self.attainable), pooled, strict=True):
            figure.fill_(value if self._ranks.is_first else 0.0)
        self.norm_sum.fill_(norm_sum)

    def _eager_loss(
        self, images_BCHW: Tensor, labels_BK: Tensor, weights_BK: Tensor, teacher_log_probs_BC: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        targets = SoftTargets(labels_BK, weights_BK)
        with autocast(self._precision, self.data.device):
            logits_BC = self._network(images_BCHW)
        logits_BC = widened(logits_BC)
        loss = targets.loss(logits_BC, label_smoothing=self.label_smoothing)
        if teacher_log_probs_BC is not None:
            weight, temperature = self.distill_weight, self.distill_temperature
            loss = distilled_loss(loss, logits_BC, teacher_log_probs_BC, weight=weight, temperature=temperature)
        return loss, targets.correct(logits_BC.detach())

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs; readable with `torch.load(weights_only=True)`."""
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimization.state_dict(),
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state of the same configuration, in place."""
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimization.load_state_dict(state["optimizer"])
        if self._scaler is not None:
            self._scaler.load_state_dict(state["scaler"])

    def evaluated_copy(self, weights: dict[str, Tensor]) -> nn.Module:
        """A copy of the evaluated model with other weights."""
        model = copy.deepcopy(self.evaluated)
        model.load_state_dict(weights)
        return model


def _padded(targets: SoftTargets) -> SoftTargets:
    """The same targets with as many labels as any mixing has, the added ones of weight 0."""
    missing = MOST_LABELS - targets.labels_BK.shape[1]
    return replace(
        targets,
        labels_BK=torch.cat([targets.labels_BK, targets.labels_BK[:, :1].expand(-1, missing)], 1),
        weights_BK=pad(targets.weights_BK, (0, missing)),
    )


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    compiled: Callable[..., Any] = torch.compile(function, dynamic=False)
    return compiled


class CapturedStep:
    """A step that runs a few times as it is, is then captured as a CUDA graph, and replayed from there on."""

    def __init__(self, step: Step, memory_pool: Any) -> None:
        self._step = step
        self._memory_pool = memory_pool
        self._stream = torch.cuda.Stream()
        self._runs = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()

    def __call__(self, *batch: Tensor) -> None:
        """Take one step with a batch, whose shape is always the same."""
        if self._graph is not None:
            for kept, new in zip(self._inputs, batch, strict=True):
                kept.copy_(new)
            self._graph.replay()
        elif self._runs < WARMUP_STEPS:
            self._run_aside(batch)
        else:
            self._capture(batch)
            self(*batch)
        self._runs += 1

    def _run_aside(self, batch: tuple[Tensor, ...]) -> None:
        """What is captured later must have run on a stream of its own before."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._step(*batch)
        torch.cuda.current_stream().wait_stream(self._stream)

    def _capture(self, batch: tuple[Tensor, ...]) -> None:
        self._inputs = tuple(tensor.clone() for tensor in batch)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile: a loader's pins memory.
        with torch.cuda.graph(self._graph, pool=self._memory_pool, capture_error_mode="thread_local"):
            self._step(*self._inputs)
