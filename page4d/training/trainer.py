"""The training loop: one optimiser step per iteration, clipped gradients, exact resumption, an error for every failure."""

from __future__ import annotations

import csv
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from ..config import Page4DConfig, preset
from ..data.sample import Sample
from ..errors import ConfigError, InputError, UserError
from ..execution.across import Across, divided
from ..execution.attention_plan import AttentionPlan
from ..execution.ranks import Ranks
from ..files import AtomicFiles, check_writable
from ..model import Page4D
from ..model.checkpoint import save_pretrained, stored_config
from ..model.opening import own_device
from ..prediction import Prediction
from .batches import Batches, loader
from .config import LossConfig, RunConfig, flatten
from .init_from_scratch import start_from_scratch
from .losses import total_loss
from .matching import Matching
from .parameters import choose_trainable, make_optimizers, mask_schedule, set_learning_rates

TRACKS = 64  # tracked points per sequence, if tracks or matches are trained
STATE, WEIGHTS, LOG = "state.pt", "model.safetensors", "log.csv"
MAY_CHANGE_ON_RESUME = ("out", "log_every", "save_every", "checkpoint_activations", "data.workers")  # no effect on results
Tensors = tuple[Tensor, ...] | list[Tensor]


class TrainingError(UserError):
    """The run cannot continue: a loss or gradient is not finite, or the model has no head for a loss."""


def check_fits(weights: str, name: str) -> Page4DConfig:
    """The preset `name`, with the attention plans and chunks of the weights. ConfigError if the file's configuration differs otherwise.

    Keys and shapes alone would not reveal every difference.
    """
    stored = stored_config(weights)
    if stored is None:
        return preset(name)
    # not compared: a run sets the first two, weights replace the third, the file may lack the two heads, and the last two shape no weights
    free = ("mask_strength", "image_size", "layer_scale", "mask_hidden", "track", "plans", "chunk")
    before, now = ({**vars(config), **dict.fromkeys(free)} for config in (stored, preset(name)))
    changed = [key for key in now if before[key] != now[key]]
    if changed:
        raise ConfigError(
            f"weights: {weights} does not match the preset {name!r} ({', '.join(changed)} differ): set model to the preset of these weights"
        )
    return preset(name).replace(plans=stored.plans, chunk=stored.chunk)


def averaged(model: Page4D, decay: float) -> AveragedModel:
    """The running mean of a model's weights: a plain mean at first, then an exponential mean with this decay per step."""

    def update(mean: Tensors, current: Tensors, count: Tensor | int) -> None:
        torch._foreach_lerp_(mean, current, max(1 - decay, 1 / (int(count) + 1)))

    return AveragedModel(model, multi_avg_fn=update)


def gathered(prediction: Prediction, across: Across) -> Prediction:
    """The prediction of all frames, on all ranks that share the sequence. Differentiable."""
    whole: dict[str, Any] = {}
    for name, value in prediction.tensors().items():
        if name in ("images", "query_points", "attention_deviation"):
            continue
        if name.endswith("_list"):  # (iterations, B, S, ...)
            whole[name] = across.gather(value.flatten(0, 1), "training").unflatten(0, value.shape[:2])
        else:
            whole[name] = across.gather(value, "training")
    return replace(prediction, **whole)


class Objective(nn.Module):
    """Maps images and ground truth to losses. This is the module that `DistributedDataParallel` wraps.

    The ranks of `group` share each sequence. All of them are given all of it, run the model on their own frames, and compute the same loss
    of all frames. The mean of their gradients is that of one process.
    """

    def __init__(self, model: Page4D, weights: LossConfig, attention: AttentionPlan | None = None, group: dist.ProcessGroup | None = None):
        super().__init__()
        self.model, self.weights, self.attention, self.group = model, weights, attention, group
        heads = {"camera": model.camera_head, "depth": model.depth_head, "points": model.point_head, "track": model.track_head,
                 "mask": model.aggregator.spatial_mask_head}  # fmt: skip
        for name, head in heads.items():
            if getattr(weights, name) and head is None:
                raise TrainingError(f"loss.{name} is {getattr(weights, name)}, but the model has no {name} head: set loss.{name} to 0")
        self.matching = Matching(model) if weights.match else None

    def forward(self, batch: Sample, mask_strength: float) -> dict[str, Tensor]:
        """The losses of a normalised batch (B, S, ...), as fp32 scalars by name; "loss" is the weighted sum."""
        outputs = [name for name in ("camera", "depth", "points", "mask") if getattr(self.weights, name)]
        queries = batch.tracks[:, 0] if self.weights.track and batch.tracks is not None else None
        options = {"outputs": outputs, "mask_strength": mask_strength, "attention": self.attention}
        if self.group is None:
            prediction = self.model(batch.images, queries, **options)
        else:
            across = divided(self.group, batch.images.device, batch.images.shape[1], self.model.config.num_heads)
            prediction = gathered(self.model(batch.images[:, across.own], queries, **options, group=self.group), across)
        with torch.autocast(batch.images.device.type, enabled=False):
            losses = total_loss(prediction, batch, self.weights)
            if self.matching is not None:
                match = self.matching(batch)
                losses |= {"loss": losses["loss"] + self.weights.match * match, "match": match}
            return losses


class Trainer:
    """A run in the folder `config.out`, which gets log.csv, state.pt (to resume) and model.safetensors (to use).

    Under `torchrun` every process trains on its own batches, and gradients are averaged. With `context` processes for each sequence, these
    share a batch.

    Raises:
        InputError: the folder cannot be written, already holds a run without `resume`, or holds none that `resume` could continue.
        ConfigError: the initial weights do not match the model.
        TrainingError: a loss has a weight, but the model has no head for it.
    """

    def __init__(self, config: RunConfig, *, resume: bool = False, device: torch.device | str | None = None):
        self.config, self.out = config, Path(config.out)
        self.rank, self.ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        name = own_device(None if device is None else str(device))
        self.device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.index is not None and self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.ranks > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.context = self._context()
        self.replica, self.replicas = self.rank // config.context, self.ranks // config.context  # of the data
        self._check_writable()
        state_file = self.out / STATE
        if state_file.exists() and not resume:
            raise InputError(f"{self.out} already holds a run: continue it with --resume, or choose another folder with out=FOLDER")
        if resume and not state_file.exists():
            raise InputError(f"there is nothing to resume in {self.out}: {STATE} is missing")
        state = self._load_state(state_file) if resume else None

        torch.manual_seed(config.seed)
        if state is not None:
            self.model = Page4D(Page4DConfig.from_json(state["model_config"]))
        elif config.weights:
            start = check_fits(config.weights, config.model)
            self.model = Page4D.from_pretrained(config.weights, config=start, device="cpu", dtype=torch.float32).train()
        else:
            self.model = Page4D(preset(config.model))
            start_from_scratch(self.model)
        self.attention = AttentionPlan.of(config.attention, self.model.config)
        exact = AttentionPlan.of(None, self.model.config)
        if state is not None and state.get("attention", exact.to_json()) != self.attention.to_json():
            raise InputError(f"{state_file} belongs to a run with another attention plan: resume with the same one")
        objective = Objective(self.model, config.loss, self.attention, self.context).to(self.device)
        self.trained = choose_trainable(self.model, config.trainable)
        self.model.aggregator.checkpoint_activations = config.checkpoint_activations
        extra = objective.matching.named_parameters() if objective.matching is not None else ()
        self.optimizers = make_optimizers([*self.model.named_parameters(), *extra], config.optimizer)
        self.average = averaged(self.model, config.average) if config.average else None
        self.step = 0
        if state is not None:
            self.model.load_state_dict(state["model"])
            if objective.matching is not None:
                objective.matching.load_state_dict(state["matching"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step = state["step"]
        self.matching = objective.matching
        wrapped = DistributedDataParallel(objective, find_unused_parameters=True) if self.ranks > 1 else objective
        self.objective: nn.Module = wrapped

    def _context(self) -> dist.ProcessGroup | None:
        """The processes that share this one's sequences. None: it has them for itself."""
        size = self.config.context
        if self.ranks % size:
            raise InputError(
                f"context: {size} processes share a sequence, and {self.ranks} are not a multiple: start {size}, or {2 * size} and so on"
            )
        if size == 1:
            return None
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, self.ranks, size)]  # all must make all of them
        return groups[self.rank // size]

    def _check_writable(self) -> None:
        """Only rank 0 tests the folder and tells the others. Concurrent tests would remove each other's folders."""
        problem: list[str | None] = [None]
        if self.rank == 0:
            try:
                check_writable(self.out)
            except InputError as error:
                problem = [str(error)]
        if self.ranks > 1:
            dist.broadcast_object_list(problem)
        if problem[0] is not None:
            raise InputError(problem[0])

    def _load_state(self, path: Path) -> dict[str, Any]:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can raise anything
            raise InputError(f"{path} cannot be read ({type(error).__name__}): restore it, or start again in another folder") from None
        keys = {"model", "average", "matching", "optimizers", "step", "config", "model_config", "ranks"}
        if not isinstance(state, dict) or not keys <= set(state):
            raise InputError(f"{path} is not the state of a run: restore it, or start again in another folder")
        before, now = flatten(RunConfig().to_dict()) | flatten(state["config"]), flatten(self.config.to_dict())  # older runs lack some keys
        changed = [key for key in now if key not in MAY_CHANGE_ON_RESUME and before.get(key) != now[key]]
        if changed:
            raise InputError(f"{path} belongs to another configuration ({', '.join(changed)} differ): resume with the same one")
        ranks = state["ranks"]
        if ranks != self.ranks:
            raise InputError(f"{path} belongs to a run of {ranks} processes, and this one has {self.ranks}: resume with {ranks} processes")
        return state

    def mask_strength(self, step: int) -> float:
        """The strength of the dynamics mask in this step."""
        mask, steps = self.config.mask, self.config.steps
        return mask_schedule(step, mask.hold_start * steps, mask.hold_end * steps, mask.strength)

    def train(self, max_step: int | None = None) -> dict[str, float]:
        """Train to the end, or to step `max_step`, with a progress bar. Returns what the last step logged; {} without a step.

        Raises:
            TrainingError: a loss or gradient is not finite.
        """
        config = self.config
        end = config.steps if max_step is None else min(max_step, config.steps)
        if self.rank == 0:
            self._trim_log()
        tracks = TRACKS if config.loss.track or config.loss.match else 0
        batches = Batches(config.data, self.step * config.accumulation, self.replica, self.replicas, tracks)
        stream = loader(batches, config.data.workers)
        values: dict[str, float] = {}
        bar = tqdm(total=end, initial=self.step, desc="training", unit="step", disable=True if self.rank > 0 else None)
        started, images = time.perf_counter(), 0
        while self.step < end:
            with nullcontext() if self.context is None else Ranks.of(self.context, self.device).guard():
                values, count = self._optimizer_step(stream)
            images += count
            self.step += 1
            bar.update()
            bar.set_postfix(loss=f"{values['loss']:.3f}")
            if self.step % config.log_every == 0 or self.step == end:
                seconds = time.perf_counter() - started
                self._log(values | {"images_per_second": images / seconds})
                started, images = time.perf_counter(), 0
            if self.step % config.save_every == 0 or self.step == end:
                self.save()
        bar.close()
        return values

    def _optimizer_step(self, stream) -> tuple[dict[str, float], int]:
        """One optimiser step over the micro-batches. Returns the losses averaged over them, and the number of images of all ranks."""
        config, images = self.config, 0
        totals: dict[str, float] = {}
        strength = self.mask_strength(self.step)
        set_learning_rates(self.optimizers, self.step / config.steps, config.optimizer.floor)
        for micro in range(config.accumulation):
            batch = next(stream).to(self.device)
            images += batch.images.shape[0] * batch.images.shape[1] * self.replicas
            last = micro == config.accumulation - 1
            sync = nullcontext() if last or self.ranks == 1 else self.objective.no_sync()  # type: ignore[operator]
            with sync:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    losses = self.objective(batch, strength)
                (losses["loss"] / config.accumulation).backward()
            for name, value in losses.items():
                totals[name] = totals.get(name, 0.0) + float(value.detach()) / config.accumulation
        if not math.isfinite(totals["loss"]):
            raise TrainingError(f"the loss at step {self.step} is not finite ({totals}): lower the learning rate or check the data")
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        norm = float(nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], config.optimizer.clip))
        if not math.isfinite(norm):
            raise TrainingError(f"the gradient's norm is {norm} at step {self.step}: lower the learning rate or check the data")
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.model)
        return totals | {"gradient_norm": norm, "lr": max(group["lr"] for group in groups), "mask_strength": strength}, images

    def close(self) -> None:
        """Leave the process group. Do not call it after an error: it would wait for the other processes."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _trim_log(self) -> None:
        """Drop log rows beyond this step. They belong to a run that got further before it stopped, or to another run."""
        path = self.out / LOG
        if not path.exists():
            return
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if (row.get("step") or "").isdecimal() and int(row["step"]) <= self.step]
        if not rows:
            path.unlink()
            return
        with AtomicFiles() as files, open(files.add(path), "w", newline="") as file:
            writer = csv.DictWriter(file, list(reader.fieldnames or ()), extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    def _log(self, values: dict[str, float]) -> None:
        if self.rank > 0:
            return
        path = self.out / LOG
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {"step": self.step, **{name: f"{value:.6g}" for name, value in values.items()}}
        if not sys.stderr.isatty():  # there is no progress bar
            print(", ".join(f"{name} {value}" for name, value in row.items()), file=sys.stderr)
        new = not path.exists()
        with open(path, "a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)

    def save(self) -> None:
        """Write state.pt (to resume from) and model.safetensors (to use). Only rank 0 writes.

        The saved model has the averaged weights (if enabled), the last step's mask strength, this run's image size (unless the initial
        weights had no fixed size), and the attention plan, if its name is balanced or fast.
        """
        if self.rank > 0:
            return
        strength = self.mask_strength(max(self.step - 1, 0))
        fixed = self.config.weights is None or self.model.config.image_size is not None
        plans, own = self.model.config.plans, self.attention.name
        if own in vars(plans):  # the weights are made for it
            plans = replace(plans, **{own: self.attention.layers})
        size = self.config.data.size if fixed else None
        self.model.config = self.model.config.replace(mask_strength=strength, image_size=size, plans=plans)
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average is not None else {},
            "matching": self.matching.state_dict() if self.matching is not None else {},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "ranks": self.ranks,
            "config": self.config.to_dict(),
            "attention": self.attention.to_json(),
            "model_config": self.model.config.to_json(),
        }
        with AtomicFiles() as files:
            torch.save(state, files.add(self.out / STATE))
        kept = self.average.module if self.average is not None else self.model
        assert isinstance(kept, Page4D)
        kept.config = self.model.config
        save_pretrained(kept, self.out / WEIGHTS)
