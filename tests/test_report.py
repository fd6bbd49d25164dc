"""What is said at the start and at the end of a training."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR

from lightning_hd import Additive, Auto, Context, HypergradientDescent, Observation, Rule, Stats
from lightning_hd.reporting.recorder import Recorder
from lightning_hd.reporting.summary import announce, remarks, rows
from tests.test_callback import Reference, make_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "HypergradientDescent" in record.getMessage()]


@pytest.mark.parametrize("summary", [True, False])
def test_one_line_at_the_start_and_a_table_at_the_end(
    summary: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def configure(network: Any) -> Any:
        first, *others = network.parameters()
        return Adam([{"params": [first], "lr": 0.01}, {"params": others, "lr": 0.02, "name": "head"}])

    hd = HypergradientDescent(probe=50, summary=summary)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        make_trainer(tmp_path, hd, logger=False, max_epochs=2).fit(Reference(configure))
    lines = [line for line in said(caplog) if "no logger" not in line]
    if not summary:
        assert lines == []
        return
    start, end = lines
    assert start == "HypergradientDescent tunes Adam (looks at 49 of 75 numbers) with the rule 'auto'."
    (head,) = (line for line in end.splitlines() if "configured" in line)
    assert " ".join(head.split()) == "group configured first median highest last backoffs not finite tuning s tuning %"
    for name, configured in (("Adam/pg1", "0.01"), ("Adam/head", "0.02")):
        (line,) = (line for line in end.splitlines() if name in line)
        lrs = hd.lrs[f"lr-{name}"]
        stats = hd.engines[0].stats
        expected = [name, configured, *(f"{lr:.2g}" for lr in (lrs[0], median(lrs), max(lrs), lrs[-1]))]
        cells = line.split()
        assert cells[:-1] == [*expected, str(stats.backoffs[0]), "0", f"{stats.seconds:.1f}"]
        assert 0 < float(cells[-1]) < 100
    assert 0 < hd.engines[0].stats.seconds < 60


class Engine:
    """Stands for the engine of an optimizer with some groups, each with a scope of its own."""

    def __init__(self, groups: int = 1, **stats: Any) -> None:
        self.optimizer = SGD([{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(groups)], lr=0.1)
        self.optimizer.register_step_post_hook(self._count)
        self.step_count, self.tunes, self.paused, self.scheduled = 0, True, False, False
        self.lrs, self.scales = [0.1] * groups, [1.0] * groups
        self.last = [Observation(0.0, 1.0, 1.0)] * groups
        self.stats = replace(Stats((0,) * groups, 0, 1.0, (1, 1), (0.0, math.inf), 1.0, 0), **stats)

    def _count(self, *_: Any) -> None:
        self.step_count += self.tunes


def remarks_on(
    engine: Engine, steps: int = 300, cosines: Sequence[float] = (0.1, -0.1), rule: Any = "auto"
) -> list[str]:
    """What is remarked after so many steps, with these cosines in turn."""
    recorder = Recorder(engine, engine.optimizer, "SGD", "group", [0.1])  # type: ignore[arg-type]
    for step in range(steps):
        engine.last = [Observation(-cosines[step % len(cosines)], 1.0, 1.0)] * len(engine.lrs)
        engine.optimizer.step()
    return remarks([recorder], rule)


def announced(caplog: pytest.LogCaptureFixture, rule: Any, max_lr: float | None, *steps: int) -> list[str]:
    """What is said of optimizers that have taken so many steps."""
    recorders = []
    for i, count in enumerate(steps):
        engine = Engine(coordinates=(2**18, 10**6) if count else (0, 0))
        recorders.append(Recorder(engine, engine.optimizer, f"SGD-{i}", "global", [0.1]))  # type: ignore[arg-type]
        for _ in range(count):
            engine.optimizer.step()
    caplog.clear()
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        announce(recorders, rule, max_lr)
    return said(caplog)


def test_an_optimizer_that_steps_later_is_announced_without_numbers(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = announced(caplog, "additive", None, 1, 0)
    looks = "looks at 262,144 of 1,000,000 numbers"
    assert line == f"HypergradientDescent tunes SGD-0 ({looks}), SGD-1 with the rule 'additive'."


def test_several_optimizers_without_a_limit_get_a_hint(caplog: pytest.LogCaptureFixture) -> None:
    for rule, max_lr, steps, hints in (
        ("auto", None, (1, 1), True),
        (Auto(start="configured"), None, (1, 1), True),
        ("auto", 0.1, (1, 1), False),
        ("auto", None, (1,), False),
        ("additive", None, (1, 1), False),
        (Additive(1e-3), None, (1, 1), False),
    ):
        _, *others = announced(caplog, rule, max_lr, *steps)
        assert ["Then set max_lr= to a rate that is known to work" in line for line in others] == [True] * hints


def test_a_run_in_which_nothing_is_wrong_has_no_remark() -> None:
    assert remarks_on(Engine()) == remarks_on(Engine(2)) == []
    assert remarks_on(Engine(), steps=0) == []


WAY = "For many short fits, pass warm_start=True, so that each begins with what the last one has learned."


def test_a_short_run_is_told_what_to_do() -> None:
    for steps, told in ((99, True), (100, False)):
        few = f"SGD: {steps} steps may be too few for the rate to reach its range. Below 100, tune it by hand. {WAY}"
        assert remarks_on(Engine(), steps) == [few] * told
        assert remarks_on(Engine(), steps, rule=Auto(start="configured")) == [few] * told
        assert remarks_on(Engine(), steps, rule="additive") == [], "it does not climb from a short first step"

    engine = Engine()
    engine.step_count = 90  # of former fits
    assert remarks_on(engine, 10) == []


def test_the_loss_is_asked_for_where_the_rule_uses_it() -> None:
    (remark,) = remarks_on(Engine(loss=None))
    assert remark.startswith("SGD: no loss was reported")
    assert "callback.engines[0]" in remark
    assert remarks_on(Engine(loss=None), rule="additive") == []


def test_a_rate_at_a_clamp_is_reported() -> None:
    for argument, limits in (("min_lr", (0.1, math.inf)), ("max_lr", (0.0, 0.1))):
        held = [f"SGD/pg{i}: the rate was held by {argument}=0.1 in most steps." for i in (1, 2)]
        assert remarks_on(Engine(2, limits=limits)) == held
    assert remarks_on(Engine(limits=(0.0, 0.2))) == []


def test_cosines_of_one_sign_are_reported() -> None:
    for sign, words in ((1, "positive in 96% of the steps, so the rate was always too small"), (-1, "negative in 96%")):
        (remark,) = remarks_on(Engine(), cosines=[0.1 * sign] * 24 + [-0.1 * sign])
        assert remark.startswith(f"SGD: the cosine was {words}")
    assert "always too large" in remark
    assert remarks_on(Engine(), cosines=[0.1] * 18 + [-0.1]) == []


def test_a_rate_that_still_rises_at_the_end_is_reported() -> None:
    too_small = ["SGD: the rate was still too small at the end, so the run was too short."]
    assert remarks_on(Engine(), cosines=(0.7, 0.7, 0.7, -0.7)) == too_small  # 0.35 in the mean
    assert remarks_on(Engine(), cosines=(0.5, 0.5, 0.5, -0.5)) == []
    assert remarks_on(Engine(), cosines=[0.7] * 150 + [0.1, -0.1] * 75) == []


def test_backoffs_are_reported_for_each_scope() -> None:
    (remark,) = remarks_on(Engine(2, backoffs=(30, 31)))
    assert remark.startswith("SGD/pg2: the rule backed off in 31 of 300 steps. Look for unusual batches, or pass")


def test_steps_that_were_not_tuned_are_reported() -> None:
    for untuned in (15, 16):
        engine = Engine()
        recorder = Recorder(engine, engine.optimizer, "SGD", "global", [0.1])  # type: ignore[arg-type]
        for step in range(300 + untuned):
            engine.tunes = step >= untuned
            engine.last = [Observation(0.1 * (-1) ** step, 1.0, 1.0)]
            engine.optimizer.step()
        assert remarks([recorder], "auto") == ["SGD: 16 steps of the optimizer were not tuned."] * (untuned == 16)


def test_steps_that_were_not_finite_are_reported() -> None:
    assert remarks_on(Engine(nonfinite_steps=1)) == ["SGD: numbers were not finite in 1 of 300 steps."]


def test_remarks_on_a_training(tmp_path: Path) -> None:
    def fit(hd: HypergradientDescent, **arguments: Any) -> list[str]:
        settings = {"max_epochs": 2, **arguments}
        make_trainer(tmp_path, hd, **settings).fit(Reference(lambda network: SGD(network.parameters(), lr=1e-4)))
        assert len(rows(hd._recorders, 1.0)) == 1
        return remarks(hd._recorders, hd.rule)

    assert fit(HypergradientDescent()) == []
    assert fit(HypergradientDescent(), limit_train_batches=20) == [
        f"SGD: 40 steps may be too few for the rate to reach its range. Below 100, tune it by hand. {WAY}"
    ]
    held = fit(HypergradientDescent("multiplicative", max_lr=2e-4))
    assert held[0] == "SGD: the rate was held by max_lr=0.0002 in most steps."
    assert "SGD: the cosine was positive in " in fit(HypergradientDescent("additive", hypergrad_lr=0.0))[0]


class Unfreeze(BaseFinetuning):
    """Adds the rest of the network, as a group with a rate of its own, in the second epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.network[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.network[0], optimizer, lr=0.005)


def test_the_table_shows_the_rates_that_were_configured(tmp_path: Path) -> None:
    def configure(network: Any) -> Any:
        return SGD([p for p in network.parameters() if p.requires_grad], lr=0.001)

    def fit(epochs: int, **arguments: Any) -> list[str]:
        """The configured rate of each group, as the table shows it."""
        hd = HypergradientDescent()
        trainer = make_trainer(tmp_path, hd, Unfreeze(), max_epochs=epochs, limit_train_batches=30)
        trainer.fit(Reference(configure), **arguments)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        assert hd.lrs["lr-SGD"][-1] != pytest.approx(0.001, rel=0.1)
        return [row[1] for row in rows(hd._recorders, 1.0)]

    assert fit(2) == ["0.001", "0.005"]
    assert fit(3, ckpt_path=tmp_path / "last.ckpt")[0] == "0.001"


def test_a_remark_says_where_the_scale_undoes_the_schedule(tmp_path: Path) -> None:
    def configure(network: Any) -> Any:
        optimizer = SGD(network.parameters(), lr=1e-4)
        scheduler = ExponentialLR(optimizer, 0.98)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    class Undo(Rule):
        """Keeps the effective rate as it is."""

        def update(self, lr: float, seen: Observation, context: Context) -> float:
            return lr / 0.98

    class Leave(Undo):
        def update(self, lr: float, seen: Observation, context: Context) -> float:
            return lr

    for rule, fights in ((Undo(), True), (Leave(), False)):
        hd = HypergradientDescent(rule)
        make_trainer(tmp_path, hd, limit_train_batches=150).fit(Reference(configure))
        told = [remark for remark in remarks(hd._recorders, rule) if "undid most of what the scheduler did" in remark]
        assert len(told) == fights


def test_steps_without_a_gradient_are_no_sign_of_a_large_rate(tmp_path: Path) -> None:
    class Settled(Reference):
        """Has nothing to learn after its 20th batch."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * (batch_idx < 20)

    hd = HypergradientDescent()
    make_trainer(tmp_path, hd).fit(Settled())
    assert not [remark for remark in remarks(hd._recorders, hd.rule) if "cosine" in remark]
