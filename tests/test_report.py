"""What is said at the start and at the end of a training."""

import logging
from pathlib import Path
from typing import Any

import pytest
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR

from lightning_hd import HypergradientDescent, Observation, Rule
from lightning_hd.reporting.summary import remarks, rows
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

    hd = HypergradientDescent(probe=100, summary=summary)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        make_trainer(tmp_path, hd, logger=False).fit(Reference(configure))
    lines = [line for line in said(caplog) if "no logger" not in line]
    if not summary:
        assert lines == []
        return
    start, end = lines
    looked, count = hd.engines[0].stats.coordinates
    assert f"tunes Adam (looks at {looked} of {count} numbers) with the rule 'auto'" in start or looked == count
    for name in ("Adam/pg1", "Adam/head"):
        (line,) = (line for line in end.splitlines() if name in line)
        lrs = hd.lrs[f"lr-{name}"]
        for number in (lrs[0], sorted(lrs)[100], max(lrs), lrs[-1]):
            assert f"{number:.2g}"[:3] in line
    assert 0 < hd.engines[0].stats.seconds < 60


def test_remarks_name_what_seems_wrong(tmp_path: Path) -> None:
    def fit(hd: HypergradientDescent, **arguments: Any) -> list[str]:
        make_trainer(tmp_path, hd, **arguments).fit(Reference(lambda network: SGD(network.parameters(), lr=1e-4)))
        assert len(rows(hd._recorders, 1.0)) == 1
        return remarks(hd._recorders)

    assert fit(HypergradientDescent()) == []
    assert fit(HypergradientDescent(), limit_train_batches=20) == [
        "SGD: 20 steps may be too few for the rate to reach its range."
    ]
    held = fit(HypergradientDescent("multiplicative", max_lr=2e-4))
    assert held[0] == "SGD: the rate was held by max_lr=0.0002 in most steps."
    assert "SGD: the cosine was positive in " in fit(HypergradientDescent("additive", hypergrad_lr=0.0))[0]


def test_a_remark_says_where_the_scale_undoes_the_schedule(tmp_path: Path) -> None:
    def configure(network: Any) -> Any:
        optimizer = SGD(network.parameters(), lr=1e-4)
        scheduler = ExponentialLR(optimizer, 0.98)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    class Undo(Rule):
        """Keeps the effective rate as it is."""

        def update(self, lr: float, seen: Observation, step: int) -> float:
            return lr / 0.98

    class Leave(Undo):
        def update(self, lr: float, seen: Observation, step: int) -> float:
            return lr

    for rule, fights in ((Undo(), True), (Leave(), False)):
        hd = HypergradientDescent(rule)
        make_trainer(tmp_path, hd, limit_train_batches=150).fit(Reference(configure))
        assert any("undid most of what the scheduler did" in remark for remark in remarks(hd._recorders)) == fights


def test_steps_without_a_gradient_are_no_sign_of_a_large_rate(tmp_path: Path) -> None:
    class Settled(Reference):
        """Has nothing to learn after its 20th batch."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * (batch_idx < 20)

    hd = HypergradientDescent()
    make_trainer(tmp_path, hd).fit(Settled())
    assert not [remark for remark in remarks(hd._recorders) if "cosine" in remark]
