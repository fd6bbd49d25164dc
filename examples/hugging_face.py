"""Train a vision transformer on scikit-learn's digits with Hugging Face's Trainer, without and with HypergradientLR.

python examples/hugging_face.py

It needs ``pip install transformers accelerate``, and downloads nothing: the transformer starts from random parameters.
The Trainer lets rates fall linearly to 0, and HypergradientLR tunes by which factor they are larger ("last scale").
"""

import argparse
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.models.vit import ViTConfig, ViTForImageClassification

from lightning_hd import HypergradientLR


class Hypergradient(TrainerCallback):  # type: ignore[misc]  # mypy sees it without transformers
    """Tunes the optimizer that the Trainer has made, and reports to it the loss of each step."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, optimizer: Any, **others: Any
    ) -> None:
        """Attach to both."""
        inner = optimizer.optimizer  # inside of accelerate's wrapper
        self.hd = HypergradientLR(inner, total_steps=state.max_steps, scheduled=True)  # by the Trainer itself
        self.losses: list[torch.Tensor] = []
        self.hook = model.register_forward_hook(self.keep, with_kwargs=True)

    def keep(self, model: nn.Module, positional: Any, named: dict[str, Any], output: Any) -> None:
        """Keep the loss that the model returns, unless it is being evaluated."""
        if model.training:
            self.losses.append(output.loss.detach())
            self.are_parts = named.get("num_items_in_batch") is not None

    def on_pre_optimizer_step(self, *_: Any, **others: Any) -> None:
        """Report the loss of all accumulated batches: if the model knows their size, each returns its part of it."""
        losses = torch.stack(self.losses)
        self.hd.observe(losses.sum() if self.are_parts else losses.mean())
        self.losses.clear()

    def on_train_end(self, *_: Any, **others: Any) -> None:
        """Leave both as they were."""
        self.hook.remove()
        self.hd.detach()


def main() -> None:
    """All runs, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="default: %(default)s")
    epochs = parser.parse_args().epochs

    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16
    train_x, val_x, train_y, val_y = train_test_split(images, labels, random_state=0)
    train = [{"pixel_values": x, "labels": y} for x, y in zip(train_x, train_y, strict=True)]
    shape = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}

    print(f"{'':16}{'configured':>12}{'val accuracy':>14}{'val loss':>10}{'last scale':>12}")
    for lr, callback in ((5e-5, None), (5e-4, None), (5e-3, None), (5e-5, Hypergradient())):
        set_seed(0)
        model = ViTForImageClassification(ViTConfig(**shape, **size))
        arguments = TrainingArguments(
            output_dir="runs/hugging_face",
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            learning_rate=lr,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=train, callbacks=[callback] if callback else [])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        with torch.no_grad():
            output = model.eval()(pixel_values=val_x, labels=val_y)
        accuracy = (output.logits.argmax(1) == val_y).float().mean()
        name, scale = ("HypergradientLR", callback.hd.scales[0]) if callback else ("without", 1.0)
        print(f"{name:16}{lr:12.0e}{accuracy:14.3f}{output.loss:10.3f}{scale:12.1f}")


if __name__ == "__main__":
    main()
