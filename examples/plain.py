"""Train on scikit-learn's digits in a plain PyTorch loop, at constant rates and with HypergradientLR.

python examples/plain.py
"""

import argparse
from statistics import median

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_hd import HypergradientLR


def train(lr: float, epochs: int, tuned: bool) -> tuple[float, float, list[float]]:
    """Train once; returns the validation accuracy, the validation loss, and the learning rate of every step."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    train_set, val_set = random_split(data, [0.75, 0.25])
    loader = DataLoader(train_set, batch_size=64, shuffle=True)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9)
    hd = HypergradientLR(optimizer, total_steps=epochs * len(loader)) if tuned else None
    lrs = []
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(x), y)
            loss.backward()
            if hd:
                hd.observe(loss)
            optimizer.step()
            lrs.append(optimizer.param_groups[0]["lr"])
    with torch.no_grad():
        x, y = val_set[:]
        logits = network(x)
    accuracy = (logits.argmax(1) == y).float().mean()
    return accuracy.item(), nn.functional.cross_entropy(logits, y).item(), lrs


def main() -> None:
    """All runs, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40, help="default: %(default)s")
    epochs = parser.parse_args().epochs

    print(f"{'':16}{'configured':>12}{'val accuracy':>14}{'val loss':>10}{'median lr':>11}{'last lr':>10}")
    for lr, tuned in ((1e-4, False), (1e-3, False), (1e-2, False), (1e-1, False), (1e-4, True)):
        accuracy, loss, lrs = train(lr, epochs, tuned)
        name = "HypergradientLR" if tuned else "constant"
        print(f"{name:16}{lr:12.0e}{accuracy:14.3f}{loss:10.3f}{median(lrs):11.1e}{lrs[-1]:10.1e}")


if __name__ == "__main__":
    main()
