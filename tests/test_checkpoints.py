"""Resuming bit for bit: every family of optimizers, rule, scope and precision, from any step; and states that lack."""

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer, RMSprop

from lightning_hd import HypergradientDescent, HypergradientLR
from tests import reference
from tests.loader import Resumable
from tests.pairs import pairwise
from tests.test_callback import Reference, make_trainer, same
from tests.test_directions import CLASSES, REFUSED, SignDescent

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*"),
]

DTYPES = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "bf16-mixed": torch.float32,
    "16-mixed": torch.float32,
}
FAMILIES: dict[str, Callable[..., Optimizer]] = {
    **{name: cls for name, cls in CLASSES.items() if name not in REFUSED and name != "Muon"},
    "Muon": lambda groups, **settings: CLASSES["Muon"](matrices(groups), **settings),
    "heavy ball": lambda groups, **settings: SGD(groups, momentum=0.9, weight_decay=0.01, **settings),
    "Nesterov": lambda groups, **settings: SGD(groups, momentum=0.9, nesterov=True, **settings),
    "amsgrad": lambda groups, **settings: Adam(groups, amsgrad=True, weight_decay=0.1, **settings),
    "third party": SignDescent,
}
RULES = {"auto": None, "additive": 1e-5, "multiplicative": 0.1}
BATCHES, SKIPPED = 24, 5
AMID, AFTER = 2 * SKIPPED - 1, 2 * SKIPPED + 2
"""Batches to stop before: amid an accumulation, and right after the step that is skipped."""
DATA = reference.torch_batches()


def matrices(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups with what Muon takes of them."""
    return [{**group, "params": [p for p in group["params"] if p.ndim == 2]} for group in groups]


@dataclass
class Training:
    """Two batches to a step; under 16-mixed, one step finds an inf and is skipped."""

    family: str
    rule: Any | None
    scope: Any
    precision: str
    rates: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.network = reference.torch_network().to(DTYPES[self.precision])
        p = list(self.network.parameters())
        self.optimizer = FAMILIES[self.family]([{"params": p[:2], "lr": 0.01}, {"params": p[2:], "lr": 0.02}], lr=1.0)
        self.scaler = torch.amp.GradScaler("cpu", enabled=self.precision == "16-mixed", init_scale=2.0**10)
        self.hd = HypergradientLR(
            self.optimizer, self.rule or "auto", hypergrad_lr=RULES[self.rule or "auto"], scope=self.scope
        )
        if self.rule is None:
            self.hd.detach()

    def run(self, batches: range) -> None:
        dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self.precision)
        for i in batches:
            x, y = (tensor.to(DTYPES[self.precision]) for tensor in DATA[i])
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = reference.torch_loss(self.network, x, y)
            if self.precision == "16-mixed" and i // 2 == SKIPPED:
                loss = loss * math.inf
            self.scaler.scale(loss).backward()
            if i % 2:
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.network.zero_grad()
                self.rates.append(self.hd.lrs)

    def state(self) -> dict[str, Any]:
        """All of it, with the gradients of a step that is under way."""
        return {
            "network": self.network.state_dict(),
            "gradients": [p.grad for p in self.network.parameters()],
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "hd": self.hd.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        for p, gradient in zip(self.network.parameters(), state["gradients"], strict=True):
            p.grad = gradient
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.hd.load_state_dict(state["hd"])


def differences(a: Any, b: Any) -> int:
    """How many tensors and numbers of two states are not equal bit for bit."""
    if isinstance(a, dict):
        return int(a.keys() != b.keys()) + sum(differences(a[key], b[key]) for key in a.keys() & b.keys())
    if isinstance(a, (list, tuple)):
        return int(len(a) != len(b)) + sum(map(differences, a, b))
    if isinstance(a, Tensor):
        return int(a.dtype != b.dtype or not torch.equal(a, b))
    return int(a != b)


def resume(whole: Training, stop: int, path: Path) -> Training:
    """The same training from a checkpoint at a batch to the end."""
    first, resumed = (Training(whole.family, whole.rule, whole.scope, whole.precision) for _ in range(2))
    first.run(range(stop))
    torch.save(first.state(), path)
    resumed.load(torch.load(path, weights_only=True))
    resumed.run(range(stop, BATCHES))
    return resumed


@pytest.mark.parametrize(
    ("family", "precision", "rule", "place"),
    pairwise(FAMILIES, DTYPES, RULES, [("global", AMID), ("group", AFTER)]),
)
def test_resuming_is_exact(family: str, precision: str, rule: str, place: tuple[str, int], tmp_path: Path) -> None:
    """From a batch on, with a scope."""
    scope, stop = place
    if family in ("ASGD", "NAdam"):  # whose scalars torch casts to the parameters' dtype on loading
        plain = Training(family, None, "global", precision)
        plain.run(range(BATCHES))
        if differences(resume(plain, AMID, tmp_path / "state").state(), plain.state()):
            pytest.skip("torch alone does not resume it exactly")
    whole = Training(family, rule, scope, precision)
    whole.run(range(BATCHES))
    resumed = resume(whole, stop, tmp_path / "state")
    assert resumed.rates == whole.rates[stop // 2 :]
    assert differences(resumed.state(), whole.state()) == 0
    assert len({tuple(lrs) for lrs in whole.rates}) > 3, "the rate moved"
    if precision == "16-mixed":
        assert whole.rates[SKIPPED] == whole.rates[SKIPPED - 1]
        assert whole.hd.step_count == BATCHES // 2 - 1


# ---------------------------------------------------------------------- through a Trainer


class Accumulating(Reference):
    """Its checkpoints have the gradients of a step that is under way, which Lightning's have not."""

    def __init__(self, family: str, precision: str) -> None:
        super().__init__(lambda network: FAMILIES[family]([{"params": [*network.parameters()]}], lr=0.01))
        self.network.to(DTYPES[precision])
        self.precision = precision
        self.gradients: list[Tensor | None] = []

    def train_dataloader(self) -> Resumable:
        dtype = DTYPES[self.precision]
        return Resumable(lambda _: [(x.to(dtype), y.to(dtype)) for x, y in DATA[:BATCHES]])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["gradients"] = [p.grad for p in self.parameters()]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.gradients = checkpoint["gradients"]

    def on_train_start(self) -> None:
        for p, gradient in zip(self.parameters(), self.gradients, strict=False):
            p.grad = gradient


class Stop(Callback):
    """Saves after a batch, and stops there."""

    def __init__(self, batch: int, path: Path) -> None:
        self.batch = batch
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("family", "rule", "precision", "stop"),
    pairwise(["SGD", "AdamW", "RMSprop"], RULES, ["32-true", "64-true", "bf16-true", "16-true", "bf16-mixed"], [6, 7]),
)
def test_a_trainer_resumes_exactly(family: str, rule: Any, precision: Any, stop: int, tmp_path: Path) -> None:
    def fit(*callbacks: Callback, ckpt_path: Path | None = None) -> tuple[Accumulating, Trainer, list[float]]:
        module, hd = Accumulating(family, precision), HypergradientDescent(rule, hypergrad_lr=RULES[rule])
        trainer = make_trainer(tmp_path, hd, *callbacks, precision=precision, accumulate_grad_batches=2)
        trainer.fit(module, ckpt_path=ckpt_path)
        (lrs,) = hd.lrs.values()
        return module, trainer, lrs

    whole, trainer, expected = fit()
    with pytest.raises(SystemExit):
        fit(Stop(stop, tmp_path / "last.ckpt"))
    resumed, other, lrs = fit(ckpt_path=tmp_path / "last.ckpt")
    assert lrs == expected[(stop + 1) // 2 :]
    assert len(set(lrs)) > 3
    assert same(whole, resumed)
    assert differences(trainer.optimizers[0].state_dict(), other.optimizers[0].state_dict()) == 0


def test_a_checkpoint_of_a_training_without_the_callback_is_a_fresh_start_that_is_told(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=5)
    trainer.fit(Reference())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    hd = HypergradientDescent("multiplicative")
    with pytest.warns(UserWarning, match="checkpoint was written without it, so tuning the learning rate starts from"):
        make_trainer(tmp_path, hd, max_epochs=2, max_steps=8).fit(Reference(), ckpt_path=tmp_path / "last.ckpt")
    assert len(hd.lrs["lr-SGD"]) == 3
    assert hd.lrs["lr-SGD"][0] == 0.01


def test_a_damaged_state_is_named() -> None:
    damaged: Any
    for damaged in ([], {"optimizers": {}}, {"engines": []}, {"optimizers": [], "suggestion": 5}):
        with pytest.raises(ValueError, match="the checkpoint's state of HypergradientDescent is damaged"):
            HypergradientDescent().load_state_dict(damaged)


# ---------------------------------------------------------------------- tensors without their numbers, and otherwise


def halves(change: Callable[[dict[str, Any]], Any], rule: Any = "multiplicative") -> tuple[Training, Training]:
    """A training of twelve batches, and another one that loads what ``change`` leaves of its state."""
    first, second = (Training("RMSprop", rule, "global", "32-true") for _ in range(2))
    first.run(range(12))
    state = copy.deepcopy(first.state())
    change(state)
    second.network.load_state_dict(state["network"])
    second.optimizer.load_state_dict(state["optimizer"])
    if "hd" in state:
        second.hd.load_state_dict(state["hd"])
    return first, second


def lose_tensors(state: dict[str, Any]) -> None:
    for own in state["optimizer"]["state"].values():
        del own["hd_direction"]


def lose_numbers(state: dict[str, Any]) -> None:
    del state["hd"]


def lose_all(state: dict[str, Any]) -> None:
    lose_tensors(state)
    lose_numbers(state)


def test_tensors_of_another_run_are_not_mixed_in() -> None:
    _, second = halves(lose_numbers)
    _, fresh = halves(lose_all)
    with pytest.warns(RuntimeWarning, match="has been tuned before"):
        second.run(range(12, 20))
    fresh.run(range(12, 20))
    assert second.rates == fresh.rates
    assert differences(second.state(), fresh.state()) == 0


def lose_moves(state: dict[str, Any]) -> None:
    view = state["hd"]["view"]
    view["parameters"][0]["size"] += 1  # of another size
    del view["parameters"][1:]
    view["memory"] = view["memory"][:, : view["parameters"][0]["count"]]


@pytest.mark.parametrize(
    ("lose", "rule", "words"),
    [
        (lose_moves, "auto", "the memory of former steps starts anew"),
        (lose_tensors, "multiplicative", "lost the last direction"),
    ],
)
def test_what_is_lost_is_told_and_known_again_after_a_step(
    lose: Callable[[dict[str, Any]], Any], rule: Any, words: str
) -> None:
    first, second = halves(lose, rule)
    with pytest.warns(RuntimeWarning, match=words):
        second.run(range(12, 14))
    assert second.hd.lrs == first.hd.lrs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.run(range(14, 16))
    assert second.hd.lrs != first.hd.lrs


def test_a_module_of_other_shapes_is_refused_by_torch_or_told() -> None:
    first = Training("Adam", "auto", "global", "32-true")
    first.run(range(4))
    other = Adam(nn.Linear(3, 2).parameters())
    hd = HypergradientLR(other)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        other.load_state_dict(first.optimizer.state_dict())
    with pytest.raises(ValueError, match="2 parameter groups, the optimizer 1"):
        hd.load_state_dict(first.hd.state_dict())


@pytest.mark.parametrize("wrong", [math.inf, math.nan])
def test_a_state_after_a_first_gradient_that_is_not_finite_can_be_loaded(wrong: float) -> None:
    first, second = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizers = [RMSprop([w], lr=0.1, momentum=0.5) for w in (first, second)]
    hds = [HypergradientLR(optimizer) for optimizer in optimizers]
    first.grad = torch.tensor([1.0, wrong, 1.0])
    before = first.detach().clone()
    optimizers[0].step()
    first.data.copy_(before)
    hds[1].load_state_dict(hds[0].state_dict())
    assert hds[1].stats.nonfinite_steps == hds[0].stats.nonfinite_steps
    for w, optimizer, hd in zip((first, second), optimizers, hds, strict=True):
        w.grad = torch.ones(3)
        optimizer.step()
        assert math.isfinite(hd.lrs[0])


class Thawing(Reference):
    """Its first layer learns in a group of its own, from the end of the first epoch on."""

    def __init__(self, thawed: bool = False) -> None:
        super().__init__()
        self.thawed = thawed

    def configure_optimizers(self) -> Any:
        self.first, self.others = list(self.network[0].parameters()), list(self.network[1:].parameters())
        optimizer = SGD(self.others, lr=0.01, momentum=0.9)
        if self.thawed:
            optimizer.add_param_group({"params": self.first, "lr": 0.01})
        return optimizer

    def on_train_epoch_end(self) -> None:
        if not self.thawed:
            self.thawed = True
            optimizer: Any = self.optimizers()
            optimizer.add_param_group({"params": self.first, "lr": 0.01})


@pytest.mark.parametrize("rule", RULES)
def test_a_checkpoint_that_is_written_right_after_a_group_was_added_can_be_resumed(rule: Any, tmp_path: Path) -> None:
    saving, whole = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1), Thawing()
    settings: dict[str, Any] = {"max_epochs": 3, "limit_train_batches": 10}
    hd = HypergradientDescent(rule, cooldown=0.0)
    make_trainer(tmp_path, hd, saving, **settings).fit(whole)
    resumed = Thawing(thawed=True)
    again = HypergradientDescent(rule, cooldown=0.0)
    make_trainer(tmp_path, again, **settings).fit(resumed, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert same(whole, resumed)
    assert [lrs[-20:] for lrs in again.lrs.values()] == [lrs[-20:] for lrs in hd.lrs.values()]
