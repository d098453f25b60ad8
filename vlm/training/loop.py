"""The training loop: setup, train, save."""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.data.feature_cache import Together
from vlm.devices import pick_device, pick_precision
from vlm.errors import VlmError
from vlm.models.build import build_model, save_model_folder
from vlm.models.freezing import load_trained_state, named_trainable, trained_state
from vlm.models.sharded import load_optimizer_state, whole_optimizer_state
from vlm.models.starting import start_from
from vlm.recipe import Recipe
from vlm.training.checkpoints import Checkpoint, amend_checkpoint, newest_checkpoint, save_checkpoint
from vlm.training.compiling import compile_layers
from vlm.training.memory import activations_on_cpu, check_offload, checkpoint_layers, keep_freed_memory
from vlm.training.meter import Meter, matmul_peak, peak_memory
from vlm.training.optimiser import build_optimizer, clip_gradients, gradient_norm, schedule_factor, set_learning_rate
from vlm.training.progress import Reporter
from vlm.training.run_folder import RunFolder
from vlm.training.scoring import check_benchmarks, scores_of
from vlm.training.sharding import average_whole_gradients, gathered, shard_task
from vlm.training.signals import on_sigterm
from vlm.training.source import Placed, Prepared, build_source
from vlm.training.task import FirstPass, Task, add_reports

_START_CHUNK = 256  # samples together before the first step


@dataclass(frozen=True)
class TrainResult:
    """What a run came to: its folder, steps done, last logged metrics, whether it ran to the end."""

    folder: Path
    steps: int
    metrics: dict[str, Any]
    finished: bool


def train(recipe: Recipe, resume: bool = False, quiet: bool = False) -> TrainResult:
    """Train what the recipe says, or go on with its run where the newest checkpoint is.

    The result depends on the recipe alone: not on micro-batches, processes, or interruptions.
    Raises VlmError for what the user can mend.
    """
    with RunFolder(recipe.output).alone():
        return Trainer(recipe, resume, quiet).train()


class Trainer:
    """One run. `setup` happens on construction; `train` goes to the end; `save` writes a checkpoint."""

    def __init__(self, recipe: Recipe, resume: bool = False, quiet: bool = False) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs, gather_object

        self.recipe = recipe
        device = pick_device()
        self.precision = pick_precision(recipe.train.precision, device)
        if recipe.train.precision == "auto" and device.type == "mps":
            self.precision = "fp32"  # fp16 would need loss scaling, which MPS has not
        AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
        self.accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision={"fp32": "no"}.get(self.precision, self.precision),
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False),
                AutocastKwargs(cache_enabled=not recipe.train.gradient_checkpointing),  # see `checkpoint_layers`
            ],
            log_with=list(recipe.train.track) or None,
            project_dir=recipe.output,
        )
        self.device: torch.device = self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.report = Reporter(quiet or self.rank != 0)
        check_benchmarks(recipe.evaluation)
        self.folder = RunFolder(recipe.output)
        if self.rank == 0:
            self.folder.start(recipe, resume)
        self.accelerator.wait_for_everyone()
        if recipe.train.track:
            self.accelerator.init_trackers(self.folder.path.name)
        checkpoint = newest_checkpoint(self.folder.checkpoints) if resume else None

        self.model = build_model(recipe.model, recipe.trainable, self.device, self.precision, seed=recipe.train.seed)
        if recipe.init_from:
            self.report.say(start_from(self.model, recipe.init_from))
        if self.device.type == "cpu":
            keep_freed_memory()
        if recipe.train.cpu_offload:
            check_offload(self.device)
        if recipe.train.compile:
            compile_layers(self.model)
        if recipe.train.gradient_checkpointing:
            checkpoint_layers(self.model)
        with self.accelerator.main_process_first():  # then the others find its results in the cache
            self.source = build_source(self.model, recipe.data, recipe.train.seed, self.report.say)
        self.source.keep_features(Together(self.rank, self.world, lambda own: gather_object([own])))
        self.steps = recipe.train.steps or math.ceil(
            (recipe.train.epochs or 1) * self.source.num_samples / recipe.train.batch_size
        )
        if recipe.init_from is None and checkpoint is None:
            batches = (self._collate(self.source.prepare(samples)) for samples in self.source.every(_START_CHUNK))
            if said := self.model.start_on(batches):
                self.report.say(said)
        task = Task(self.model, recipe.objectives)
        if recipe.train.fsdp:
            shard_task(task, recipe, self.world, self.device, self.precision)
        self.optimizer = build_optimizer(self.model, recipe.optimizer)
        self.step = 0
        self.bad_steps = 0
        self.unlogged: list[dict[str, float]] = []  # losses since the last line of the log
        self.best: dict[str, Any] = {}  # score and step of the best evaluation so far
        self.scored = 0  # step of the last evaluation that came to its end
        if resume:
            self._resume(checkpoint)
        self.task: Any = task if recipe.train.fsdp else self.accelerator.prepare_model(task)
        self._spare: Any = None  # what a process computes in vain where shards need it to take part
        self.parameters = [p for _, p in named_trainable(self.model)]
        self.meter = Meter()
        self.stopping = False
        self.report.summary(self.model, self.folder.path, self.source.num_samples, self.steps, str(self.device))

    # ---- setup ----------------------------------------------------------------------------------------------

    def _resume(self, checkpoint: Checkpoint | None) -> None:
        if checkpoint is None:
            self.report.say(f"{self.folder.path} holds no checkpoint: starting from the beginning")
        else:
            load_trained_state(self.model, checkpoint.weights(), where=str(checkpoint.folder))
            load_optimizer_state(self.optimizer, checkpoint.optimizer())
            self.step, self.bad_steps = checkpoint.step, checkpoint.state.get("bad_steps", 0)
            self.unlogged, self.best = checkpoint.state.get("unlogged", []), checkpoint.state.get("best", {})
            self.scored = checkpoint.state.get("scored", 0)
            self.source.broken.update(checkpoint.state["broken"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
            self.report.say(f"resuming at step {self.step}")
        if self.rank == 0:
            self.folder.forget_metrics_after(self.step, self.scored)

    # ---- train ----------------------------------------------------------------------------------------------

    def train(self) -> TrainResult:
        """Go to the last step, or to the checkpoint that SIGTERM asks for."""
        self.model.train()
        metrics: dict[str, Any] = {}
        section = self.recipe.train
        with on_sigterm(self.stop), self.report.bar(self.step, self.steps):
            while self.step < self.steps and not self._should_stop():
                if self._evaluation_is_due():
                    with self.meter.paused():
                        self._evaluate()
                losses = self.train_step(self._samples(self.step), self._samples(self.step + 1))
                self.step += 1
                self.unlogged += [losses] if losses else []
                if self.step % section.log_every == 0 or self.step == self.steps:
                    metrics = self._log(self.unlogged)
                    self.unlogged = []
                with self.meter.paused():
                    if section.sample_every and (self.step % section.sample_every == 0 or self.step == 1):
                        self._show_samples()
                    last = self.step == self.steps
                    if last or self.step % section.checkpoint_every == 0 or self._evaluation_is_due():
                        self.save()
        finished = self.step >= self.steps
        if finished:
            self._finish()
        elif self.step:
            self.save()
            self.report.say(f"stopped at step {self.step} of {self.steps}; go on with --resume")
        return TrainResult(self.folder.path, self.step, metrics, finished)

    def _samples(self, step: int) -> list[Placed]:
        """The global batch of a step, none behind the last."""
        return self.source.batch(step, self.recipe.train.batch_size) if step < self.steps else []

    def train_step(self, samples: list[Placed], upcoming: Sequence[Placed] = ()) -> dict[str, float]:
        """One optimiser step on a global batch; returns its losses, or {} if the step was skipped.

        upcoming: the next batch, which workers prepare meanwhile.

        Each process takes every n-th sample and goes through them in micro-batches. All divide by the number of loss
        terms of the whole global batch, so that any split gives the same gradient.
        """
        section = self.recipe.train
        # Dropout depends on (seed, step, process) alone, so a resumed run draws what the first would have drawn.
        seed = section.seed * 1_000_003 + self.step
        torch.manual_seed(seed * 4096 + self.rank)
        mine = slice(self.rank, None, self.world)
        prepared = self.source.prepare(samples[mine], upcoming[mine])
        size = section.micro_batch_size or len(samples)
        batches: list[Any] = [self._collate(prepared[i : i + size]) for i in range(0, len(prepared), size)]
        counts: Tensor = self.accelerator.reduce(self._unwrapped.counts(batches).to(self.device, torch.float32))
        rounds = math.ceil(math.ceil(len(samples) / self.world) / size)  # of the process that has most
        if self._unwrapped.needs_pairs and not batches:
            batches = [self.model.empty_batch()]
        if section.fsdp and batches:
            self._spare = batches[-1]
        batches += [None] * (rounds - len(batches))
        first = self._first_pass(batches, counts, seed) if rounds > 1 else None

        set_learning_rate(self.optimizer, schedule_factor(self.recipe.schedule, self.step, self.steps))
        reports = []
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.task):
                idle = batch is None and section.fsdp and not self._unwrapped.needs_pairs
                # The backward pass comes after autocast, which till then keeps a copy of each weight that it cast.
                with self.accelerator.autocast(), activations_on_cpu(section.cpu_offload):
                    loss, parts = self.task(self._spare if idle else batch, counts, seed, first, number)
                if idle:
                    loss, parts = loss * 0.0, {}
                # DistributedDataParallel averages over processes; shares of one global mean must add up.
                self.accelerator.backward(loss * self.world)
            reports.append({"loss": loss.detach(), **parts})
        names = ["loss", *sorted({key for part in reports for key in part} - {"loss"})]
        totals = add_reports(reports)
        values = torch.stack([torch.as_tensor(totals[n], device=self.device, dtype=torch.float32) for n in names])
        if self.world > 1:
            values = self._summed(names, values)
        losses = dict(zip(names, values.tolist()))
        self._count(batches, len(samples))
        return losses if self._apply(losses, samples) else {}

    def _first_pass(self, batches: list[Any], counts: Tensor, seed: int) -> FirstPass | None:
        """What objectives that compare the whole batch need to know before its first micro-batch goes back."""
        if not self._unwrapped.needs_pairs:
            return None
        with self.accelerator.autocast():
            return self._unwrapped.first_pass([batch for batch in batches if batch is not None], counts, seed)

    def _summed(self, names: list[str], values: Tensor) -> Tensor:
        """Reports added over processes; a process without a batch reports only its loss."""
        known = ["loss", *self._unwrapped.report_names]
        row = torch.zeros(len(known), device=self.device)
        for name, value in zip(names, values):
            row[known.index(name)] = value
        total: Tensor = self.accelerator.reduce(row)
        names[:] = known
        return total

    def _apply(self, losses: dict[str, float], samples: list[Placed]) -> bool:
        """Clip and step; a loss or gradient that is not finite skips the step."""
        scaler = self.accelerator.scaler  # fp16 alone has one
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        if self.recipe.train.fsdp:
            average_whole_gradients(self.parameters)
        norm = gradient_norm(self.parameters)
        finite = math.isfinite(norm) and math.isfinite(losses["loss"])
        if self.recipe.train.fsdp:  # each process sees its share of the gradients, and all must do the same
            finite = not self.accelerator.reduce(torch.tensor(float(not finite), device=self.device)).item()
        if finite:
            if self.recipe.optimizer.clip_grad is not None:
                clip_gradients(self.parameters, self.recipe.optimizer.clip_grad, norm)
            self.optimizer.step() if scaler is None else scaler.step(self.optimizer)
            self.model.after_step()
            self.bad_steps = 0
        if scaler is not None:
            scaler.update(None if finite else scaler.get_scale() * scaler.get_backoff_factor())
        self.optimizer.zero_grad(set_to_none=True)
        # With a finite loss, an overflow in fp16 only says that the scale was too large.
        if not finite and (scaler is None or not math.isfinite(losses["loss"])):
            self._note_bad_step(losses["loss"], samples)
        return finite

    def _note_bad_step(self, loss: float, samples: list[Placed]) -> None:
        self.bad_steps += 1
        entry = {"step": self.step + 1, "loss": str(loss), "skipped": True, "samples": [s.sample.id for s in samples]}
        if self.rank == 0:
            self.folder.log(entry)
        self.report.say(f"step {self.step + 1} skipped: loss or gradient is not finite ({loss})")
        if self.bad_steps >= self.recipe.train.max_bad_steps:
            raise VlmError(
                f"{self.bad_steps} steps in a row had a loss or gradient that is not finite; the samples' ids are in "
                f"{self.folder.metrics}: lower optimizer.lr, or train.precision=fp32"
            )

    def _collate(self, prepared: list[Prepared]) -> Any:
        return self.source.collate(prepared).to(self.device)

    @property
    def _unwrapped(self) -> Task:
        return self.accelerator.unwrap_model(self.task)

    def _count(self, batches: list[Any], samples: int) -> None:
        real = [batch for batch in batches if batch is not None]
        tokens, labels = sum(b.num_tokens for b in real), sum(b.num_labels for b in real)
        operations = sum(self.model.operations(b) for b in real)
        self.meter.add(tokens * self.world, labels * self.world, samples, operations * self.world)

    # ---- log, sample, evaluate ------------------------------------------------------------------------------

    def _log(self, sums: list[dict[str, float]]) -> dict[str, Any]:
        rates = self.meter.rates()
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        peak = matmul_peak(self.device, dtype) * self.world
        metrics: dict[str, Any] = {"step": self.step}
        for name in sums[0] if sums else ():
            metrics[name] = sum(part[name] for part in sums) / len(sums)
        metrics |= {"lr": self.optimizer.param_groups[0]["lr"], **rates}
        metrics["memory_gb"] = round(peak_memory(self.device) / 1e9, 2)
        metrics["peak_share"] = round(self.meter.operations_per_second() / peak, 3)
        metrics["time"] = round(time.time(), 1)
        if self.rank == 0:
            self.folder.log(metrics)
            self.report.metrics(metrics, self.steps)
        if self.recipe.train.track:
            self.accelerator.log({k: v for k, v in metrics.items() if k not in ("step", "time")}, step=self.step)
        self.meter.reset()
        return metrics

    def _show_samples(self, count: int = 2) -> None:
        """Print what the model says to the first samples now: the quickest way to see that something is wrong."""
        self.model.eval()
        with gathered(self.task, self.device, self.precision):
            for sample in self.source.sources[0][:count] if self.rank == 0 else ():
                self.report.sample(sample.images, *self.model.say_sample(sample, max_new_tokens=24))
        self.model.train()

    def _evaluation_is_due(self) -> bool:
        """Whether the model as it is has to be scored; its checkpoint comes first, so that nothing is lost by it."""
        every = self.recipe.evaluation.every
        return bool(every and self.step and self.step % every == 0 and self.step > self.scored)

    def _evaluate(self) -> None:
        """Score the model as it is, and keep it if it is the best by the first benchmark."""
        self.model.eval()
        with gathered(self.task, self.device, self.precision):
            scores = list(scores_of(self.model, self.recipe.evaluation, self.folder.path))
        for number, (name, score) in enumerate(scores):  # behind it: what is kept comes from shards, which are fp32
            best = number == 0 and score > self.best.get("score", -math.inf)
            if best:
                self.best = {"benchmark": name, "score": score, "step": self.step}
                weights = trained_state(self.model)  # all processes together
            if self.rank == 0:
                self.folder.log({"step": self.step, f"eval/{name}": score})
                if best:
                    save_model_folder(self.model, self.recipe.trainable, self.folder.best, weights)
            self.report.say(f"step {self.step}: {name} {score:.1f}")
        self.scored = self.step
        if self.rank == 0:
            amend_checkpoint(self.folder.checkpoints, self._state())
        self.model.train()
        self.accelerator.wait_for_everyone()

    # ---- save -----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint from which the run goes on exactly."""
        weights, optimizer = trained_state(self.model), whole_optimizer_state(self.optimizer)  # all processes together
        keep = self.recipe.train.keep_checkpoints
        if self.rank == 0:
            save_checkpoint(self.folder.checkpoints, weights, optimizer, self._state(), keep)
        self.accelerator.wait_for_everyone()

    def _state(self) -> dict[str, Any]:
        """What a run goes on with beside weights and optimiser."""
        return {
            "step": self.step,
            "broken": self.source.broken,
            "scaler": {} if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
            "bad_steps": self.bad_steps,
            "unlogged": self.unlogged,
            "best": self.best,
            "scored": self.scored,
        }

    def _finish(self) -> None:
        self.model.eval()
        weights = trained_state(self.model)
        if self.rank == 0:
            save_model_folder(self.model, self.recipe.trainable, self.folder.model, weights)
        if self.recipe.evaluation.benchmarks and self.step > self.scored:
            self._evaluate()
        if self.best:
            self.report.say(f"best: {self.best['benchmark']} {self.best['score']:.1f} at step {self.best['step']}")
        if self.source.broken:
            self.report.say(f"{len(self.source.broken)} broken samples were skipped")
        if self.recipe.train.track:
            self.accelerator.end_training()
        self.report.say(f"done: {self.folder.path}")
        self.accelerator.wait_for_everyone()

    def stop(self) -> None:
        """End after this step, with a checkpoint."""
        self.stopping = True

    def _should_stop(self) -> bool:
        """Whether any process was asked to stop; all must agree on the step."""
        if self.world == 1:
            return self.stopping
        return bool(self.accelerator.reduce(torch.tensor(float(self.stopping), device=self.device)) > 0)
