"""One thread for each process: the models are small, and tests start processes side by side."""

import torch

torch.set_num_threads(1)
