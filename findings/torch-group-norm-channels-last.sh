#!/bin/sh
# torch's GroupNorm on a CPU loses digits for tensors in channels_last: the error grows with the size of the image and
# with mean / deviation. Contiguous tensors keep 1e-6.
exec "${PYTHON:-python3}" - <<'PYTHON'
import platform

import torch
from torch.nn.functional import group_norm

print(f"torch {torch.__version__}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}")
torch.manual_seed(0)
for side in (64, 256, 1024):
    x = torch.randn(1, 32, side, side) + 0.5
    truth = group_norm(x.double(), 8)
    for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        error = (group_norm(x.contiguous(memory_format=layout), 8) - truth).abs().max().item()
        print(f"{side:5}x{side:<5} {name:14} greatest error {error:.1e}")
PYTHON
