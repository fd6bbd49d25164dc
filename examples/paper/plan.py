"""Which runs there are: those with the paper's settings, and those of the grid over α₀ and β."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from paper.data import Images
from paper.settings import ALPHA_0, BASES, EXPERIMENTS, RULES, Name, Rule, Run


@dataclass(frozen=True)
class Size:
    """How much is computed.

    Args:
        epochs: By experiment.
        images: How many to train with, and at most to validate with, by experiment; all where it is not named.
        width: What the number of channels of the VGG is multiplied with.
        grid_epochs: After how many epochs a run of the grid is given up.
        alphas: α₀ of the grid.
        factors: β of the grid over the paper's.
    """

    epochs: Mapping[Name, int]
    images: Mapping[Name, int]
    width: float
    grid_epochs: int
    alphas: Sequence[float]
    factors: Sequence[float]


ALPHAS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
FACTORS = (0.01, 0.1, 1, 10)
PAPER = Size({name: experiment.epochs for name, experiment in EXPERIMENTS.items()}, {}, 1.0, 10, ALPHAS, FACTORS)
SMALL = Size({"logreg": 10, "mlp": 10, "vgg": 8}, {"vgg": 6_400}, 1 / 8, 4, ALPHAS, FACTORS)
QUICK = Size(
    {"logreg": 6, "mlp": 3, "vgg": 2},
    {"logreg": 6_400, "mlp": 2_560, "vgg": 1_280},
    1 / 16,
    *(6, (1e-5, 1e-3, 1e-1), (1,)),
)


def paper_runs(name: Name, size: Size, images: Images, seed: int = 0) -> list[Run]:
    """One run for each optimizer: without the callback, with the paper's rule, and with the rule auto."""
    count, width = _count(name, size, images), size.width if name == "vgg" else 1.0
    betas = EXPERIMENTS[name].betas
    return [
        Run(
            *(name, base, rule, ALPHA_0, betas[base] if rule == "additive" else 0.0),
            *(size.epochs[name], images.source, count, width),
            seed=seed,
        )
        for base in BASES
        for rule in RULES
    ]


def grid_runs(size: Size, images: Images, threshold: float, seed: int = 0) -> list[Run]:
    """Logistic regression up to a training loss: at all α₀ without -HD and with all β, and once with the rule auto."""
    parts: Sequence[tuple[Rule, Sequence[float], Sequence[float]]] = (
        ("none", size.alphas, [0.0]),
        ("additive", size.alphas, size.factors),
        ("auto", [ALPHA_0], [0.0]),
    )
    betas, count = EXPERIMENTS["logreg"].betas, _count("logreg", size, images)
    return [
        Run(
            *("logreg", base, rule, alpha_0, factor * betas[base], size.grid_epochs, images.source, count),
            threshold=threshold,
            seed=seed,
        )
        for base in BASES
        for rule, alphas, factors in parts
        for factor in factors
        for alpha_0 in alphas
    ]


def _count(name: Name, size: Size, images: Images) -> int:
    return min(size.images.get(name, len(images.train[0])), len(images.train[0]))
