r"""Train on scikit-learn's digits on several processes, and compare the learning rates that they took bit for bit.

python examples/ddp.py                          # two processes on CPU, or all GPUs where there are any
python examples/ddp.py --strategy fully_shard   # parameters sharded over them
torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-id 1 --rdzv-endpoint HOST:29500 \
    --max-restarts 3 examples/ddp.py --processes 1 --nodes 2   # on each of two nodes
"""

import argparse
import gc
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_hd import HypergradientDescent


class Classifier(LightningModule):
    """A network of one hidden layer."""

    def __init__(self, sharded: bool) -> None:
        super().__init__()
        self.sharded = sharded
        self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.accuracy = MulticlassAccuracy(10, average="micro")  # over the digits of all processes

    def configure_model(self) -> None:
        """Shard the parameters, where that is asked for."""
        if self.sharded and self.device_mesh is not None:
            fully_shard(self.network, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy and accuracy."""
        x, y = batch
        logits = self.network(x)
        loss = nn.functional.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("train_loss", loss, prog_bar=True)
        self.log("train_accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam; any other optimizer does as well."""
        return torch.optim.Adam(self.parameters(), lr=1e-6)


def train(strategy_name: str, processes: int, nodes: int, epochs: int, folder: Path) -> list[float]:
    """The learning rate of every step that this process took."""
    seed_everything(0, verbose=False)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    strategy: Strategy = DDPStrategy()
    if strategy_name == "fully_shard":
        strategy = ModelParallelStrategy(data_parallel_size=nodes * processes, tensor_parallel_size=1)
    hd = HypergradientDescent()
    trainer = Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=processes,
        num_nodes=nodes,
        strategy=strategy,
        max_epochs=epochs,
        callbacks=[hd],
        logger=TensorBoardLogger(folder, name="ddp"),
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Classifier(strategy_name == "fully_shard"), DataLoader(data, batch_size=64, shuffle=True))
    return hd.lrs["lr-Adam"]


def main() -> None:
    """Train, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", choices=("ddp", "fully_shard"), default="ddp")
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count() or 2, help="on each node")
    parser.add_argument("--nodes", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="folder of the event files (default: runs)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")

    own = train(*(getattr(arguments, name) for name in ("strategy", "processes", "nodes", "epochs", "folder")))
    everyone: list[list[float]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    if dist.get_rank() == 0:
        every = max(1, len(own) // 8)
        print(f"learning rates of {len(own)} steps, each {every}th: {', '.join(f'{lr:.2e}' for lr in own[::every])}")
        print(
            f"{len(everyone)} processes, {'equal bit for bit' if everyone == [own] * len(everyone) else 'THEY DIFFER'}"
        )
        print(f"The curve: tensorboard --logdir {arguments.folder / 'ddp'}")
    dist.barrier()
    gc.collect()  # what is left of the model holds process groups, whose threads must not outlive the interpreter
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
