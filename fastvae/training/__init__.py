"""Training: losses, one step, a loop that resumes exactly, and crops of photographs.

photographs  crops by (seed, step)
losses       reconstruction, edges and KL
loop         the step and the loop: EMA, schedule, checkpoints, resume
baselines    baselines for a comparison of reconstructions
"""

from fastvae.training.loop import Phase, TrainingPlan, train, training_step
from fastvae.training.losses import edge_loss, vae_loss
from fastvae.training.photographs import CropSource

__all__ = ["CropSource", "Phase", "TrainingPlan", "edge_loss", "train", "training_step", "vae_loss"]
