#!/bin/sh
# torch 2.13.0, x86 CPU (MKL): the last bits of a fp32 linear layer of one row depend on the address of its weight.
# Seen: a model read by safetensors 0.8.0 gives other bits than a copy of it. Its weights lie in the mapped file, at any
#   multiple of 4 bytes, and addresses that are multiples of 16 give the bits of memory that torch has allocated.
# Expected: the same bits for the same values, shapes and strides.
# Fails if the bits are equal.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 safetensors==0.8.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder/weights.safetensors" <<'PYTHON'
import sys

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear

torch.manual_seed(0)
torch.set_num_threads(1)
save_file({"bias": torch.randn(3), "weight": torch.randn(64, 64)}, sys.argv[1])
weight, x = load_file(sys.argv[1])["weight"], torch.randn(1, 64)
print(f"torch {torch.__version__}, one row, weight {weight.data_ptr() % 16} bytes after a multiple of 16:", end=" ")
print(f"{(linear(x, weight) - linear(x, weight.clone())).abs().max():.1e} from its copy")
assert weight.data_ptr() % 16 and not torch.equal(linear(x, weight), linear(x, weight.clone()))
PYTHON
