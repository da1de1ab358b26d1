"""What a run needs, told from its configuration: memory, operations, what processes send, what fits."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from toast.config import ToastConfig
from toast.planning.empty_models import CLASSES
from toast.planning.sharding import SHARDINGS, Held, Sharding
from toast.planning.stepping import EmptyRun, Step, precision_of
from toast.planning.weight_sizes import Weights, weigh
from toast.training.allocations import Timeline
from toast.training.memory import optimizer_memory
from toast.training.method_config import MethodConfig
from toast.training.preparing import Stage
from toast.training.run_config import RunConfig
from toast.training.run_folder import ADAPTER_CONFIG


@dataclass(frozen=True)
class StepRow:
    """A step of one process in one way, at the configured batch.

    Args:
        way: `computed`, `checkpointed`, `stored`, or the last two together.
        form: Form of the feedback; empty where there is none.
        kept: Bytes kept for backward, by part.
        peak: Most bytes at a time, beside weights, gradients and optimiser.
        flops: Operations of a micro-batch.
        of_lora: Those of a step of LoRA; None where its step is not known.
        of_forward: Those of a plain forward pass; likewise.
    """

    way: str
    form: str
    kept: dict[str, float]
    peak: float
    flops: float
    of_lora: float | None
    of_forward: float | None


@dataclass(frozen=True)
class ProcessRow:
    """What one process holds, in bytes.

    Args:
        base: `as configured`, `8-bit` or `4-bit`.
        sharding: Name of the way, of `toast.planning.sharding.SHARDINGS`.
        frozen: Frozen weights.
        trained: Trained weights.
        gradients: Gradients when all are there.
        optimizer: Its states.
        buffers: What is gathered for a moment, or waits to be sent.
        activations: Most bytes of all else.
        peak: Most bytes at a time. Less than the sum where gradients come when activations are gone.
        largest: Samples of the largest micro-batch of a process that fits; None if nothing grows with it.
        sent: Bytes that a process sends in a step.
    """

    base: str
    sharding: str
    frozen: float
    trained: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    peak: float
    largest: int | None
    sent: float


@dataclass(frozen=True)
class Generation:
    """What a prompt as long as a training row needs.

    Args:
        tokens: Its length.
        cache: Bytes of the keys and values of both passes.
        plain_cache: Without steering.
        peak: Most bytes at a time beside the weights, the cache included.
    """

    tokens: int
    cache: float
    plain_cache: float
    peak: float


@dataclass
class Plan:
    """A run as it was planned. Bytes and operations are those of one process.

    Args:
        model: Name of the model.
        method: The method.
        stage: `pretune` or `tune`.
        precision: What is computed in.
        processes: Their number.
        memory: Bytes of one accelerator.
        micro_batch: Samples of a process in a micro-batch.
        micro_batches: Micro-batches of a step.
        frozen: Parameters that are frozen.
        groups: Parameters that are trained, by group.
        steps: The step in its ways.
        ways: What a process holds, by base and sharding, the step being as configured.
        generation: Language models: what generating needs.
        remarks: What was assumed or left out.
    """

    model: str
    method: str
    stage: Stage
    precision: str
    processes: int
    memory: float
    micro_batch: int
    micro_batches: int
    frozen: int
    groups: dict[str, int]
    steps: list[StepRow] = field(default_factory=list)
    ways: list[ProcessRow] = field(default_factory=list)
    generation: Generation | None = None
    remarks: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold."""
        return asdict(self)


def plan(
    config: RunConfig,
    stage: Stage | None = None,
    processes: int = 1,
    memory: float = 80e9,
    classes: int | None = None,
) -> Plan:
    """Plans a run from its configuration; neither weights nor data are read.

    A step is run on tensors without memory, forward and backward, so what it keeps is what the code keeps.

    Args:
        config: The run's configuration.
        stage: `pretune` or `tune`; None is the configuration's, or `tune`.
        processes: How many processes share the work.
        memory: Bytes of each one's accelerator.
        classes: Vision: classes of the data; None takes 1,000, and says so.

    Raises:
        ValueError: If the model is not to be had, the method does not fit it, or the batch cannot be split.
    """
    return _Planner(config, stage or config.stage or "tune", processes, memory, classes).plan()


class _Planner:
    def __init__(
        self, config: RunConfig, stage: Stage, processes: int, memory: float, classes: int | None
    ) -> None:
        if config.stage not in (None, stage):
            raise ValueError(f"stage: this configuration is for {config.stage}; asked for is {stage}.")
        if config.heads and config.task == "language":
            raise ValueError("heads: text classifiers are not planned; needs a configuration without heads.")
        config = config.model_copy(update={"heads": {}})  # several linear heads are one with all outputs
        parts = processes * config.micro_batches
        if config.batch_size % parts:
            raise ValueError(
                f"batch_size: needs a multiple of processes × micro_batches ({processes} × "
                f"{config.micro_batches}); got {config.batch_size}."
            )
        self.remarks: list[str] = []
        self.config = self._without_start(config)
        self.stage, self.processes, self.memory, self.classes = stage, processes, memory, classes or CLASSES
        self.samples = config.batch_size // parts
        if config.task == "vision" and classes is None and "num_classes" not in config.model.options:
            self.remarks.append(
                f"the head is planned for {CLASSES:,} classes; --classes says how many there are"
            )
        self.run = EmptyRun(self.config, stage, self.classes)
        self.optimizer = optimizer_memory(self.run.trained, config.optimizer)
        self.low = 4 if precision_of(config) == "no" else 2

    def plan(self) -> Plan:
        config, model = self.config, self.run.method.model
        live = dict(model.named_parameters())
        groups = {
            name: sum(live[each].numel() for each in held) for name, held in self.run.method.groups.items()
        }
        frozen = sum(p.numel() for p in live.values() if not p.requires_grad)
        planned = Plan(
            str(config.model.name or config.model.library), config.method.name, self.stage,
            precision_of(config), self.processes, self.memory, self.samples, config.micro_batches, frozen,
            groups, remarks=self.remarks,
        )  # fmt: skip
        if config.task == "language" and config.method.is_toast:
            prompt = self.run.prefill()  # before activation checkpointing is on
            planned.generation = Generation(
                config.data.block, prompt.cache, prompt.plain_cache, prompt.timeline.peak(1)
            )
        lora, forward = self._compared()
        own = config.checkpointing, config.first_pass.mode == "cached" and config.method.is_toast
        ways = {own, (False, False), (True, False)}
        if config.method.is_toast and self.stage == "tune":
            ways.add((False, True))
        form = self.run.form(self.samples)
        for way in sorted(ways):  # what checkpoints comes last: it stays on
            step = self._step(way, form, needed=way == own)
            if step is None:
                continue
            planned.steps.append(self._step_row(way, form, step, lora, forward))
            if way == own:
                planned.ways = self._process_rows(way, form, step)
        return planned

    def _step(self, way: tuple[bool, bool], form: str, needed: bool) -> Step | None:
        try:
            return self.run.step(form, *way)
        except ValueError as error:
            if needed or not way[0]:
                raise
            self.remarks.append(str(error))
            return None

    def _step_row(
        self, way: tuple[bool, bool], form: str, step: Step, lora: float | None, forward: float | None
    ) -> StepRow:
        flops = _at(step.flops, self.samples)
        name = {
            (False, False): "computed", (True, False): "checkpointed", (False, True): "stored",
            (True, True): "stored, checkpointed",
        }[way]  # fmt: skip
        kept = {part: _at(size, self.samples) for part, size in step.kept.items()}
        return StepRow(
            name, form, kept, step.timeline.peak(self.samples, share=0.0), flops,
            None if lora is None else flops / lora, None if forward is None else flops / forward,
        )  # fmt: skip

    def _process_rows(self, way: tuple[bool, bool], form: str, step: Step) -> list[ProcessRow]:
        """Returns a row for each base and sharding that go together."""
        steps = {form: step}
        for other in ("per_token", "composed"):  # of larger or smaller batches, and of a quantised base
            if form and self.run.composes_from is not None and other not in steps:
                steps[other] = self.run.step(other, *way)
        found, refused = [], False
        for bits in (None, 8, 4) if self.config.model.library == "transformers" else (None,):
            weights = weigh(self.run.method.model, self.run.places, step.gathers, self.low, bits)
            for name, sharding in SHARDINGS.items():
                split = sharding.splits_weights and self.processes > 1
                needed = "per_token" if form and (bits or split) else None
                if needed not in (None, *steps):
                    refused = True
                elif bits is None or bits in sharding.bits:
                    found.append(self._process_row(name, sharding, weights, bits, steps, needed, form))
        if refused:
            self.remarks.append(f"quantised and split bases do without feedback_form={form}; left out")
        return found

    def _process_row(
        self,
        name: str,
        sharding: Sharding,
        weights: Weights,
        bits: int | None,
        steps: dict[str, Step],
        needed: str | None,
        form: str,
    ) -> ProcessRow:
        split = self.processes, self.config.micro_batches
        held = sharding.holds(weights, self.optimizer.states, self.optimizer.momentary, *split)
        fitting = _Fitting(held, weights, self.config.micro_batches > 1)
        own = steps[needed or form].timeline
        composes = None if needed else self.run.composes_from
        return ProcessRow(
            base="as configured" if bits is None else f"{bits}-bit",
            sharding=name,
            frozen=held.frozen,
            trained=held.trained,
            gradients=held.gradients,
            optimizer=held.optimizer,
            buffers=held.buffers,
            activations=own.peak(self.samples, share=0.0) + weights.dequantised,
            peak=fitting.peak(own, self.samples),
            largest=fitting.largest(steps, needed or form, composes, self.memory),
            sent=sharding.sends(weights, *split),
        )

    def _compared(self) -> tuple[float | None, float | None]:
        """Returns the operations of a step of LoRA and of a plain forward pass."""
        method = MethodConfig(name="lora", head=self.config.method.head)
        config = self.config.model_copy(update={"method": method})
        try:
            run = EmptyRun(config, "tune", self.classes)
        except ValueError as error:
            self.remarks.append(f"not compared with LoRA: {error}")
            return None, None
        return _at(run.step().flops, self.samples), _at(run.plain_flops(), self.samples)

    def _without_start(self, config: RunConfig) -> RunConfig:
        """Returns a configuration that starts from nothing, with the settings that a start would bring."""
        method = config.method
        if method.start is None:
            return config
        options, start = dict(method.options), method.start
        at = next((p for p in (start, start / "adapter") if (p / ADAPTER_CONFIG).is_file()), None)
        if not start.exists():
            self.remarks.append(f"{start} does not exist yet; planned as from nothing, with the same sizes")
        elif at is not None and method.is_toast:
            saved = ToastConfig.from_pretrained(str(at))
            own = ("select_features", "select_from", "value_bias")
            for name in (*own, "steer_from", "lora_rank") if saved.is_lite else own:
                options.setdefault(name, getattr(saved, name))
        changed = method.model_copy(update={"start": None, "options": options})
        return config.model_copy(update={"method": changed})


@dataclass(frozen=True)
class _Fitting:
    """What fits beside what a process holds.

    Args:
        held: What it holds.
        weights: The model's weights.
        accumulates: Whether gradients of earlier micro-batches are there.
    """

    held: Held
    weights: Weights
    accumulates: bool

    def peak(self, timeline: Timeline, samples: int) -> float:
        """Returns the most bytes at a time, the optimiser's step included."""
        during = timeline.peak(samples, self._share, self._all) + self.weights.dequantised
        return self.held.always + max(during, self.held.gradients + self.held.step)

    def largest(
        self, steps: dict[str, Step], form: str, composes_from: int | None, memory: float
    ) -> int | None:
        """Returns the largest micro-batch; the feedback has another form from some size on."""
        room = memory - self.held.always
        if room < self.held.gradients + self.held.step:
            return 0
        room -= self.weights.dequantised
        most = {
            name: step.timeline.most_samples(room, self._share, self._all) for name, step in steps.items()
        }
        if composes_from is None:
            return most[form]
        composed, per_token = most["composed"], most["per_token"]
        if composed is None or per_token is None:
            return None
        return composed if composed >= composes_from else min(per_token, composes_from - 1)

    @property
    def _share(self) -> float:
        return self.held.gradients / self.weights.trained

    @property
    def _all(self) -> float | None:
        return self.held.gradients if self.accumulates else None


def _at(size: tuple[float, float], samples: int) -> float:
    return size[0] + samples * size[1]
