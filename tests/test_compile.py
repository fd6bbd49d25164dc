"""torch.compile of the module, through the Trainer, and of the optimizer's step: the rates are those without it."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, RMSprop

from lightning_hd import HypergradientDescent, HypergradientLR
from tests import reference
from tests.pairs import pairwise
from tests.test_callback import Reference, make_trainer, same
from tests.test_hypergradient import BETAS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*Dynamo does not know how to trace.*_getframe.*"),
]

STEPS, WARM = 12, 3
BATCHES = reference.torch_batches()[:STEPS]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """Also: torch keeps step counts, and in a compiled step the bias corrections, in the default dtype."""
    torch.set_default_dtype(torch.float64)
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    torch.set_default_dtype(torch.float32)


# ---------------------------------------------------------------------- the module, through a Trainer


class Quiet(Reference):
    """Logs nothing: torch cannot compile Lightning's ``log``."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return reference.torch_loss(self.network, *batch)


def fit(path: Path, cls: Any, rule: Any, compiled: Callable[[Quiet], Any]) -> tuple[list[float], Quiet]:
    module = Quiet(lambda network: cls(network.parameters(), lr=0.01))
    hd = HypergradientDescent(rule, hypergrad_lr=BETAS[rule])
    make_trainer(path, hd, limit_train_batches=STEPS).fit(compiled(module))
    assert hd.engines[0].step_count == STEPS
    (lrs,) = hd.lrs.values()
    return lrs, module


def compiled_submodule(backend: str) -> Callable[[Quiet], Quiet]:
    def compiled(module: Quiet) -> Quiet:
        module.network = torch.compile(module.network, backend=backend)  # type: ignore[assignment]
        return module

    return compiled


@pytest.mark.parametrize(
    ("trained", "backend", "submodule"),
    pairwise([(SGD, "auto"), (Adam, "additive"), (Adam, "multiplicative")], ["eager", "aot_eager"], [False, True]),
)
def test_a_compiled_module_makes_the_same_rates(
    trained: tuple[Any, str], backend: str, submodule: bool, tmp_path: Path
) -> None:
    compiled = compiled_submodule(backend) if submodule else lambda module: torch.compile(module, backend=backend)
    expected, plain = fit(tmp_path, *trained, lambda module: module)
    lrs, module = fit(tmp_path, *trained, compiled)
    assert lrs == expected
    assert len(set(lrs)) > STEPS // 2
    assert same(module, plain)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the default backend needs a C++ compiler")
def test_the_default_backend(tmp_path: Path) -> None:
    expected, _ = fit(tmp_path, SGD, "auto", lambda module: module)
    lrs, _ = fit(tmp_path, SGD, "auto", compiled_submodule("inductor"))
    np.testing.assert_allclose(lrs, expected, rtol=1e-9)


# ---------------------------------------------------------------------- the optimizer's step


FAMILIES: list[tuple[Any, dict[str, Any]]] = [
    (SGD, {"foreach": False}),
    (SGD, {"momentum": 0.9, "foreach": False}),
    (AdamW, {"weight_decay": 0.1, "foreach": False}),  # a subclass of Adam
    (RMSprop, {"foreach": False}),
]


def train(network: nn.Module, hd: HypergradientLR, step: Callable[[], Any], warm: int) -> list[float]:
    lrs = []
    for i, (x, y) in enumerate(BATCHES):
        network.zero_grad()
        reference.torch_loss(network, x, y).backward()
        with torch.compiler.set_stance("default" if i < warm else "fail_on_recompile"):
            step()
        lrs += hd.lrs
    return lrs


def tuned(cls: Any, settings: dict[str, Any], rule: Any, lr: Any) -> tuple[nn.Module, HypergradientLR]:
    network = reference.torch_network()
    return network, HypergradientLR(cls(network.parameters(), lr=lr, **settings), rule, hypergrad_lr=BETAS[rule])


@pytest.mark.parametrize(
    ("family", "rule", "way"),
    pairwise(FAMILIES, BETAS, [("a function that steps", "eager"), ("the step", "aot_eager")]),
)
def test_a_compiled_step_makes_the_same_rates_and_is_compiled_once(
    family: tuple[Any, dict[str, Any]], rule: str, way: tuple[str, str]
) -> None:
    network, hd = tuned(*family, rule, torch.tensor(0.01))
    expected = train(network, hd, hd._optimizer.step, STEPS)

    lr = torch.tensor(0.01)
    other, hd = tuned(*family, rule, lr)
    optimizer = hd._optimizer
    what, backend = way
    step = optimizer.step if what == "the step" else lambda: optimizer.step()
    lrs = train(other, hd, torch.compile(step, backend=backend), WARM)
    np.testing.assert_allclose(lrs, expected, rtol=1e-9)
    for p, q in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    assert hd.step_count == STEPS
    assert len(set(lrs)) > STEPS // 2
    assert optimizer.param_groups[0]["lr"] is lr
    assert float(lr) == lrs[-1]


@pytest.mark.parametrize("rule", BETAS)
def test_a_compiled_step_under_a_rate_that_is_a_number(rule: Any) -> None:
    network, hd = tuned(Adam, {}, rule, 0.01)
    expected = train(network, hd, hd._optimizer.step, STEPS)
    other, hd = tuned(Adam, {}, rule, 0.01)
    lrs = train(other, hd, torch.compile(hd._optimizer.step, backend="eager"), WARM)
    np.testing.assert_allclose(lrs, expected, rtol=1e-9)
    assert isinstance(hd._optimizer.param_groups[0]["lr"], float)
