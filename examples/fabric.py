"""Train on scikit-learn's digits with Lightning Fabric, at constant rates and with HypergradientLR.

python examples/fabric.py
python examples/fabric.py --devices 2   # in two processes, which take the same rates
"""

import argparse
from statistics import median

import torch
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_hd import HypergradientLR


def train(fabric: Fabric, lr: float, epochs: int, tuned: bool) -> tuple[float, float, list[float]]:
    """Train once; returns the validation accuracy, the validation loss, and the learning rate of every step."""
    fabric.seed_everything(0, verbose=False)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    train_set, val_set = random_split(data, [0.75, 0.25])
    loader = fabric.setup_dataloaders(DataLoader(train_set, batch_size=64 // fabric.world_size, shuffle=True))
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model, optimizer = fabric.setup(network, torch.optim.Adam(network.parameters(), lr=lr))
    hd = HypergradientLR(optimizer, total_steps=epochs * len(loader)) if tuned else None
    lrs = []
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            fabric.backward(loss)
            if hd:
                hd.observe(loss)
            optimizer.step()
            lrs.append(optimizer.param_groups[0]["lr"])
    with torch.no_grad():
        x, y = fabric.to_device(val_set[:])
        logits = model(x)
    accuracy = (logits.argmax(1) == y).float().mean()
    return accuracy.item(), nn.functional.cross_entropy(logits, y).item(), lrs


def main() -> None:
    """All runs, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--devices", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--accelerator", default="cpu", help="default: %(default)s")
    arguments = parser.parse_args()
    fabric = Fabric(accelerator=arguments.accelerator, devices=arguments.devices)
    fabric.launch()

    fabric.print(f"{'':16}{'configured':>12}{'val accuracy':>14}{'val loss':>10}{'median lr':>11}{'last lr':>10}")
    for lr, tuned in ((1e-5, False), (1e-4, False), (1e-3, False), (1e-2, False), (1e-5, True)):
        accuracy, loss, lrs = train(fabric, lr, arguments.epochs, tuned)
        name = "HypergradientLR" if tuned else "constant"
        fabric.print(f"{name:16}{lr:12.0e}{accuracy:14.3f}{loss:10.3f}{median(lrs):11.1e}{lrs[-1]:10.1e}")


if __name__ == "__main__":
    main()
