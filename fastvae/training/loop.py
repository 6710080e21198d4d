"""Training step and loop: EMA weights, a schedule, checkpoints, exact resume, a progress bar."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from fastvae.latents.pixels import normalized
from fastvae.system.atomic_files import replace_atomically
from fastvae.training.losses import vae_loss

if TYPE_CHECKING:
    from fastvae.models import AutoencoderKL

CHECKPOINT = "training.pt"


class BatchSource(Protocol):
    """Source of training images, uint8 [B, 3, crop, crop], which depend on the arguments alone."""

    def batch(self, step: int, *, batch_size: int, crop: int, seed: int) -> Tensor: ...


@dataclass(frozen=True)
class Phase:
    """Part of a run with one crop size: ``steps`` batches of ``batch_size`` squares of ``crop`` pixels.

    Raises ValueError for a number below 1.
    """

    steps: int
    batch_size: int
    crop: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} of a phase must be at least 1, got {value}")


@dataclass(frozen=True)
class TrainingPlan:
    """Phases, losses and optimiser of a run, which resumes only with the plan that it began with.

    Raises ValueError for a seed outside [0, 2^31).
    """

    phases: tuple[Phase, ...]
    learning_rate: float = 1e-3
    warmup: int = 200
    kl_weight: float = 1e-6
    edge_weight: float = 0.0
    ema_decay: float = 0.999
    gradient_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "phases", tuple(self.phases))
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be from 0 to 2^31 - 1, got {self.seed}")

    @property
    def steps(self) -> int:
        """Number of steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    def phase_at(self, step: int) -> Phase:
        """Return the phase of ``step`` (from 0). Raises ValueError for a step after the last."""
        for phase in self.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        raise ValueError(f"the plan has {self.steps} steps, there is no step {step + self.steps}")

    def learning_rate_at(self, step: int) -> float:
        """Return the rate: a linear rise over ``warmup`` steps, then half a cosine to zero at the last step."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup)))


def training_step(
    vae: AutoencoderKL, optimizer: torch.optim.Optimizer, images: Tensor, plan: TrainingPlan, step: int
) -> float:
    """Take one optimiser step on images [B, C, H, W] in [-1, 1], and return the loss before it.

    The forward pass runs under bf16 autocast; the latents are drawn from the posterior with a generator seeded by
    (plan.seed, step). Raises FloatingPointError if the loss is not finite.
    """
    generator = torch.Generator(images.device).manual_seed(plan.seed << 32 | step)
    for group in optimizer.param_groups:
        group["lr"] = plan.learning_rate_at(step)
    with torch.autocast(images.device.type, torch.bfloat16):
        posterior = vae.encode(images).latent_dist  # type: ignore[union-attr]
        reconstruction = vae.decode(posterior.sample(generator)).sample  # type: ignore[union-attr]
    loss = vae_loss(images, reconstruction, posterior, plan.kl_weight, plan.edge_weight)
    if not math.isfinite(value := loss.item()):
        raise FloatingPointError(f"the loss at step {step} is {value}")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(vae.parameters(), plan.gradient_norm)
    optimizer.step()
    return value


def train(
    vae: AutoencoderKL,
    source: BatchSource,
    plan: TrainingPlan,
    directory: str | Path,
    *,
    checkpoint_every: int = 500,
    progress: bool = True,
) -> AutoencoderKL:
    """Train ``vae`` in place by ``plan``, and return a copy with the averaged (EMA) weights.

    directory: holds the run's state; a run that was stopped resumes from it, to the same bits on the same machine.
    checkpoint_every: in steps. Raises ValueError if the state is damaged or belongs to another plan or model, and for
    checkpoint_every below 1; FloatingPointError as training_step does.
    """
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be at least 1, got {checkpoint_every}")
    path = Path(directory) / CHECKPOINT
    path.parent.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=plan.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    average = copy.deepcopy(vae).requires_grad_(False)
    first = _resume(path, plan, vae, average, optimizer) if path.exists() else 0
    smooth = None
    with tqdm(total=plan.steps, initial=first, disable=not progress, unit="step") as bar:
        for step in range(first, plan.steps):
            phase = plan.phase_at(step)
            batch = source.batch(step, batch_size=phase.batch_size, crop=phase.crop, seed=plan.seed)
            images = normalized(batch).to(vae.device, memory_format=torch.channels_last)
            loss = training_step(vae, optimizer, images, plan, step)
            _update_average(average, vae, min(plan.ema_decay, (step + 1) / (step + 10)))
            smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
            bar.update()
            bar.set_postfix(loss=f"{smooth:.5f}", refresh=False)
            if (step + 1) % checkpoint_every == 0 or step + 1 == plan.steps:
                _save(path, plan, step + 1, vae, average, optimizer)
    return average.eval()


@torch.no_grad()
def _update_average(average: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    for averaged, current in zip(average.parameters(), model.parameters(), strict=True):
        averaged.lerp_(current, 1 - decay)


def _save(path: Path, plan: TrainingPlan, step: int, vae: Any, average: Any, optimizer: Any) -> None:
    state = {
        "plan": asdict(plan),
        "config": dict(vae.config),
        "step": step,
        "model": vae.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    replace_atomically(path, lambda temporary: torch.save(state, temporary))


def _resume(path: Path, plan: TrainingPlan, vae: Any, average: Any, optimizer: Any) -> int:
    try:
        state = torch.load(path, weights_only=True, map_location=vae.device)
    except (RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged: remove it to begin anew ({error})") from error
    if state["config"] != dict(vae.config):
        raise ValueError(f"{path} belongs to a run with a model of another config: take another directory")
    if state["plan"] != asdict(plan):
        differing = [key for key, value in asdict(plan).items() if state["plan"].get(key) != value]
        raise ValueError(f"{path} belongs to a run with another plan; these differ: {', '.join(differing)}")
    vae.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
