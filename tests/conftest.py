"""One torch thread per test process: tiny models lose more to waking threads than they win."""

import torch

torch.set_num_threads(1)
