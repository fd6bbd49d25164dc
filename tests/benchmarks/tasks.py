"""The learning problems by name."""

import functools
from pathlib import Path

import torch

from tests.benchmarks import changing, digits, fashion, functions, tables, text, transfer
from tests.benchmarks.problems import Problem, Task
from tests.benchmarks.quadratic import Quadratic, sampler


def quadratic(seed: int, data: Path) -> Problem:
    network = Quadratic(sampler(seed))
    return Problem(network, network)


TASKS = {
    "digits-16": Task("digits, batch 16", 800, functools.partial(digits.classify, size=16)),
    "digits-128": Task("digits, batch 128", 800, functools.partial(digits.classify, size=128)),
    "digits-full": Task("digits, full batch", 400, functools.partial(digits.classify, size=None)),
    "fashion-mlp": Task(
        "Fashion-MNIST, MLP",
        900,
        functools.partial(fashion.classifier, widths=(784, 256, 256, 10)),
        fashion.FASHION_FILES,
    ),
    "fashion-cnn": Task("Fashion-MNIST, CNN", 700, fashion.fashion_cnn, fashion.FASHION_FILES),
    "fashion-large": Task("Fashion-MNIST, 1.2 M", 250, fashion.fashion_large, fashion.FASHION_FILES),
    "text": Task("source code, transformer", 400, text.language_model),
    "post-norm": Task(
        "transformer, norms last", 400, functools.partial(text.language_model, post=True), optimizers=("SGD", "Adam")
    ),
    "words": Task("source code, word vectors", 600, text.word_vectors),
    "tanh": Task("regression, deep tanh", 1000, functions.tanh_regression),
    "picture": Task("a picture, sines", 400, functions.picture),
    "equation": Task("a differential equation", 600, functions.equation),
    "logistic": Task("logistic regression, full batch", 300, digits.logistic),
    "compress": Task("auto-encoder", 800, digits.compress),
    "diffusion": Task("diffusion", 700, digits.diffuse),
    "adapters": Task("low-rank adapters", 600, functools.partial(transfer.adapters, dropout=0.1)),
    "adapters-dropout": Task("adapters, dropout 0.5", 600, functools.partial(transfer.adapters, dropout=0.5)),
    "fine-tuning": Task("fine-tuning", 300, transfer.fine_tuning),
    "decay-0.3": Task(
        "weight decay 0.3", 1000, functools.partial(digits.classify, size=64), optimizers=("Adam",), decay=0.3
    ),
    "decay-1": Task(
        "weight decay 1", 1000, functools.partial(digits.classify, size=64), optimizers=("Adam",), decay=1.0
    ),
    "clipped": Task("clipped weights", 800, functools.partial(digits.constrained, project=digits.clip)),
    "unit-rows": Task("weights of norm 1", 800, functools.partial(digits.constrained, project=digits.normalize_rows)),
    "quadratic": Task("noisy quadratic", 2000, quadratic),
    "noisy-labels": Task("noisy labels", 1500, changing.noisy_labels, fashion.FASHION_FILES),
    "changed-labels": Task("changed labels", changing.LENGTH, changing.changed_labels, fashion.FASHION_FILES),
    "annealed": Task("VAE, annealed", changing.LENGTH, changing.annealed),
    "gan": Task("GAN", 1500, changing.adversaries, optimizers=("Adam",)),
    "graph": Task("graph network", 400, tables.graph),
    "table": Task("table with embeddings", 1000, tables.table),
    "long-mlp": Task(
        "MLP, 8,000 steps",
        8000,
        functools.partial(fashion.classifier, widths=(784, 64, 10)),
        fashion.FASHION_FILES,
        optimizers=("Nesterov", "Adam"),
    ),
    "long-logistic": Task(
        "logistic regression, 8,000 steps",
        8000,
        functools.partial(fashion.classifier, widths=(784, 10)),
        fashion.FASHION_FILES,
        optimizers=("Nesterov", "Adam"),
    ),
}


def build(name: str, seed: int, data: Path) -> Problem:
    """The task with that name, initialised by the seed."""
    torch.manual_seed(seed)
    return TASKS[name].build(seed, data)
