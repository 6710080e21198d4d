#!/bin/sh
# torch 2.13.0, CPU: GroupNorm of a tensor in channels_last loses digits, the more the larger the image.
# Seen, largest error of x = randn(1, 32, S, S) + 0.5 in 8 groups against float64:
#   S 64: contiguous 5.3e-07, channels_last 1.2e-06;  S 1024: contiguous 6.3e-07, channels_last 6.8e-04.
# Expected: the same error in both memory formats, since the values are the same.
# Fails if the error in channels_last at S 1024 is no longer 50 times that of contiguous memory.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.nn.functional import group_norm

torch.manual_seed(0)
errors = {}
for side in (64, 1024):
    x = torch.randn(1, 32, side, side) + 0.5
    truth = group_norm(x.double(), 8)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = group_norm(x.contiguous(memory_format=layout), 8)
        errors[side, layout] = (y - truth).abs().max().item()
        print(f"torch {torch.__version__}, {side}x{side}, {layout}: largest error {errors[side, layout]:.1e}")
assert errors[1024, torch.contiguous_format] < 1e-5
assert errors[1024, torch.channels_last] > 50 * errors[1024, torch.contiguous_format]
PYTHON
