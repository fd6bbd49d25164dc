"""Train a small transformer to predict the next character of Python's source code: that of the standard library.

python examples/transformer.py
"""

import argparse
import logging
import sysconfig
import warnings
from pathlib import Path
from statistics import median

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hd import HypergradientDescent

CHARACTERS, CONTEXT, WIDTH = 128, 32, 64


class Transformer(LightningModule):
    """The logits of the next character, at every place."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.embedding = nn.Embedding(CHARACTERS, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CHARACTERS)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, windows: Tensor) -> Tensor:
        """Cross entropy of the characters that follow, in nats per character."""
        x, y = windows[:, :-1], windows[:, 1:]
        logits = self.head(self.layers(self.embedding(x) + self.position, mask=self.mask, is_causal=True))
        return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """The same of a batch."""
        loss: Tensor = self(*batch)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, which is usual for transformers."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def main() -> None:
    """All runs, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="default: %(default)s")
    steps = parser.parse_args().steps
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")

    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]
    text = "".join(module.read_text(encoding="ascii", errors="ignore") for module in modules)
    windows = torch.tensor(list(text.encode())).unfold(0, CONTEXT + 1, 1)
    train, val = windows[:-40_000], windows[-40_000 + CONTEXT :: CONTEXT]
    print(f"{'':22}{'configured':>12}{'val loss':>10}{'median lr':>11}{'last lr':>10}")
    for lr, hd in ((1e-3, None), (1e-2, None), (1e-3, HypergradientDescent())):
        seed_everything(0, verbose=False)
        module = Transformer(lr)
        Trainer(
            max_steps=steps,
            accelerator="cpu",
            callbacks=[hd] if hd else [],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        ).fit(module, DataLoader(TensorDataset(train), batch_size=24, shuffle=True))
        with torch.no_grad():
            loss = module(val)
        name, lrs = ("HypergradientDescent", hd.lrs["lr-AdamW"]) if hd else ("constant", [lr])
        print(f"{name:22}{lr:12.0e}{loss:10.3f}{median(lrs):11.1e}{lrs[-1]:10.1e}")


if __name__ == "__main__":
    main()
