"""Without a GPU, Triton's kernels are interpreted; it looks for that once, when something first imports it."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
