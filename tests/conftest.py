"""One thread for each process: the models are small, and tests start processes side by side. They also end at once."""

import os
from pathlib import Path

import torch

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

_STARTUP = str(Path(__file__).parent / "startup")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_STARTUP, os.environ.get("PYTHONPATH"))))
