"""What the callback makes of optimizers that it cannot tune, of checkpoints of something else, and of its limits."""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer, Rprop, SparseAdam
from torch.optim.lr_scheduler import StepLR

from lightning_hd import HypergradientDescent
from tests import reference
from tests.test_callback import AfterOneEpoch, Reference, make_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


class Two(LightningModule):
    """Two networks in manual optimization; the second one's optimizer is another."""

    def __init__(self, other: Callable[[nn.Module], Optimizer], sparse: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first = reference.torch_network()
        self.second = nn.Embedding(5, 2, sparse=True) if sparse else reference.torch_network()
        self.other = other

    def training_step(self, batch: Any, batch_idx: int) -> None:
        def closure() -> Any:
            if isinstance(self.second, nn.Embedding):
                loss = self.second(torch.tensor([1, 2])).square().sum()
            else:
                loss = reference.torch_loss(self.second, *batch)
            second.zero_grad()
            self.manual_backward(loss)
            return loss

        first, second = self.trainer.optimizers
        first.zero_grad()
        self.manual_backward(reference.torch_loss(self.first, *batch))
        first.step()
        second.step(closure)

    def configure_optimizers(self) -> Any:
        return [Adam(self.first.parameters(), lr=1e-3), self.other(self.second)]

    train_dataloader = Reference.train_dataloader


@pytest.mark.parametrize(
    ("other", "sparse"),
    [
        (lambda network: LBFGS(network.parameters(), max_iter=2), False),
        (lambda network: Rprop(network.parameters()), False),
        (lambda network: SparseAdam(network.parameters()), True),
    ],
    ids=["LBFGS", "Rprop", "SparseAdam"],
)
def test_optimizers_that_cannot_be_tuned_are_named_and_the_others_are_tuned(
    other: Any, sparse: bool, tmp_path: Path
) -> None:
    hd, module = HypergradientDescent(), Two(other, sparse)
    name = type(other(module.second)).__name__
    trainer = make_trainer(tmp_path, hd, limit_train_batches=20)
    with pytest.warns(UserWarning, match=f"tunes the other optimizers only: optimizer {name} has no learning rate"):
        trainer.fit(module)
    assert list(hd.lrs) == ["lr-Adam"]
    assert len(set(hd.lrs["lr-Adam"])) > 10
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = HypergradientDescent()
    with pytest.warns(UserWarning, match="tunes the other optimizers only"):
        make_trainer(tmp_path, again, limit_train_batches=20, max_epochs=2).fit(
            Two(other, sparse), ckpt_path=tmp_path / "last.ckpt"
        )
    assert len(again.lrs["lr-Adam"]) == 20
    assert again.engines[0].step_count == 40


@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_another_optimizer_beside_one_that_cannot_be_tuned_starts_anew(cls: Any, tmp_path: Path) -> None:
    def module() -> Two:
        return Two(lambda network: LBFGS(network.parameters(), max_iter=2))

    class Other(Two):
        def configure_optimizers(self) -> Any:
            _, second = super().configure_optimizers()
            return [cls(self.first.parameters(), lr=0.02), second]

    with pytest.warns(UserWarning, match="tunes the other optimizers only"):
        (trainer := make_trainer(tmp_path, HypergradientDescent("additive"), limit_train_batches=20)).fit(module())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    arguments: dict[str, Any] = {"max_epochs": 2, "limit_train_batches": 20}
    with pytest.raises(ValueError, match=f"optimizer='Adam' with 1 parameter groups, now it is '{cls.__name__}'"):
        make_trainer(tmp_path, HypergradientDescent("additive"), **arguments).fit(
            Other(module().other), ckpt_path=tmp_path / "last.ckpt"
        )
    hd = HypergradientDescent("additive", hypergrad_lr=0.0, on_mismatch="restart")
    with pytest.warns(UserWarning, match="so this optimizer starts anew"):
        make_trainer(tmp_path, hd, **arguments).fit(Other(module().other), ckpt_path=tmp_path / "last.ckpt")
    assert hd.lrs[f"lr-{cls.__name__}"] == [0.02] * 20


def test_none_that_can_be_tuned_is_an_error(tmp_path: Path) -> None:
    module = Two(lambda network: LBFGS(network.parameters()))
    module.configure_optimizers = lambda: [LBFGS(module.first.parameters()), Rprop(module.second.parameters())]  # type: ignore[method-assign]
    with pytest.raises(TypeError, match=r"none of the optimizers can be tuned: optimizer LBFGS .*; optimizer Rprop"):
        make_trainer(tmp_path, HypergradientDescent()).fit(module)


# ---------------------------------------------------------------------- checkpoints of something else


def sgd(network: nn.Module) -> Any:
    return SGD(network.parameters(), lr=0.01, momentum=0.9)


def split(network: nn.Module) -> Any:
    first, *others = network.parameters()
    return SGD([{"params": [first]}, {"params": others}], lr=0.01, momentum=0.9)


def under_schedule(network: nn.Module) -> Any:
    optimizer = sgd(network)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 5), "interval": "step"}}


OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "rule": (sgd, {"rule": "multiplicative"}),
    "scope": (sgd, {"rule": "additive", "scope": "group"}),
    "optimizer": (lambda network: Adam(network.parameters(), lr=0.01), {"rule": "additive"}),
    "groups": (split, {"rule": "additive"}),
    "auto": (sgd, {"rule": "auto"}),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_of_something_else_is_refused_or_a_fresh_start(what: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, HypergradientDescent("additive"), limit_train_batches=20)
    trainer.fit(Reference(sgd))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    configure, arguments = OTHERS[what]

    def resume(**more: Any) -> tuple[HypergradientDescent, Trainer]:
        hd = HypergradientDescent(**arguments, **more)
        trainer = make_trainer(tmp_path, hd, max_epochs=2, limit_train_batches=20)
        trainer.fit(Reference(configure), ckpt_path=tmp_path / "last.ckpt")
        return hd, trainer

    with pytest.raises(ValueError, match="on_mismatch='restart'"):
        resume()
    with pytest.warns(UserWarning, match="starts? anew"):
        hd, trainer = resume(on_mismatch="restart")
    assert trainer.global_step == 40
    assert hd.engines[0].step_count == 20
    assert not hd.engines[0].stats.nonfinite_steps


def test_a_fresh_start_begins_at_the_configured_rate_without_what_was_kept(tmp_path: Path) -> None:
    def fit(rule: Any, resume: bool, **arguments: Any) -> tuple[HypergradientDescent, Trainer]:
        hd = HypergradientDescent(rule, **arguments)
        trainer = make_trainer(tmp_path, hd, max_epochs=1 + resume, limit_train_batches=20)
        trainer.fit(Reference(), ckpt_path=tmp_path / "last.ckpt" if resume else None)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return hd, trainer

    fit("auto", False)
    with pytest.warns(UserWarning, match="starts anew"):
        hd, _ = fit("additive", True, on_mismatch="restart", hypergrad_lr=0.0)
    assert hd.lrs["lr-SGD"] == [0.01] * 20

    _, trainer = fit("additive", False)
    assert any("hd_direction" in state for state in trainer.optimizers[0].state.values())
    with pytest.warns(UserWarning, match="starts anew"):
        _, trainer = fit("auto", True, on_mismatch="restart")
    assert not any("hd_direction" in state for state in trainer.optimizers[0].state.values())


def test_a_checkpoint_that_is_validated_leaves_nothing_to_the_next_fit(tmp_path: Path, recwarn: Any) -> None:
    class Validated(Reference):
        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

        val_dataloader = Reference.train_dataloader

    trainer = make_trainer(tmp_path, HypergradientDescent(), limit_train_batches=5)
    trainer.fit(Validated(split))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    hd = HypergradientDescent(on_mismatch="restart")
    trainer = make_trainer(tmp_path, hd, limit_train_batches=5)
    module = Validated(sgd)
    trainer.validate(module, ckpt_path=tmp_path / "last.ckpt")
    assert hd.state_dict()  # what was loaded, and no more
    trainer.fit(module)
    assert not [str(w.message) for w in recwarn if "anew" in str(w.message)]


def test_curves_keep_their_names_where_a_run_is_resumed_after_a_group_was_added(tmp_path: Path) -> None:
    class Backbone(Reference):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = reference.torch_network()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) + reference.torch_loss(self.backbone, *batch)

        def configure_optimizers(self) -> Any:
            return SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)

    def fit(epochs: int, *others: Any, resume: Any = None) -> tuple[HypergradientDescent, Trainer]:
        hd = HypergradientDescent("multiplicative")
        trainer = make_trainer(tmp_path, hd, BackboneFinetuning(2), *others, max_epochs=epochs, limit_train_batches=5)
        trainer.fit(Backbone(), ckpt_path=resume)
        return hd, trainer

    _, trainer = fit(3)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    hd, _ = fit(5, resume=tmp_path / "last.ckpt")
    assert list(hd.lrs) == ["lr-SGD", "lr-SGD/pg2"]


# ---------------------------------------------------------------------- limits


@pytest.mark.parametrize("rule", ["auto", "additive", "multiplicative"])
@pytest.mark.parametrize("configure", [sgd, under_schedule])
def test_what_is_learned_stays_after_some_steps(rule: Any, configure: Any, tmp_path: Path) -> None:
    runs = []
    for stop in (None, 10):
        hd = HypergradientDescent(rule, cooldown=0, stop_after=stop)
        make_trainer(tmp_path, hd, limit_train_batches=30).fit(Reference(configure))
        runs.append(hd.lrs["lr-SGD"])
    assert runs[0][:10] == runs[1][:10]
    steps = [after / before for before, after in zip(runs[1][9:], runs[1][10:], strict=False)]
    if configure is sgd:
        assert set(runs[1][10:]) == {runs[1][9]}
    else:
        assert steps == pytest.approx([0.1 if t % 5 == 0 else 1.0 for t in range(10, 30)])
    assert len(set(runs[0][10:])) > 10


def test_tuning_that_has_stopped_stays_so_on_resuming_and_cools_down(tmp_path: Path) -> None:
    def hd() -> HypergradientDescent:
        return HypergradientDescent("auto", stop_after=30, cooldown=0.5)

    whole, first, second = hd(), hd(), hd()
    arguments = {"max_epochs": 2, "limit_train_batches": 20}
    make_trainer(tmp_path, whole, **arguments).fit(Reference(sgd))
    trainer = make_trainer(tmp_path, first, AfterOneEpoch(), **arguments)
    trainer.fit(Reference(sgd))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    make_trainer(tmp_path, second, **arguments).fit(Reference(sgd), ckpt_path=tmp_path / "last.ckpt")
    assert first.lrs["lr-SGD"] + second.lrs["lr-SGD"] == whole.lrs["lr-SGD"]
    end = whole.lrs["lr-SGD"][30:]
    falls = [1 - math.sqrt((10 + i) / 20) for i in range(10)]
    assert end == pytest.approx([end[0] * fall / falls[0] for fall in falls])


# ---------------------------------------------------------------------- written rates and what is shown


def test_a_rate_that_is_edited_in_a_checkpoint_becomes_the_new_one(tmp_path: Path) -> None:
    class Editing(Reference):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] = 0.01  # which is the configured one as well

    trainer = make_trainer(tmp_path, HypergradientDescent("multiplicative"), limit_train_batches=20)
    trainer.fit(Reference())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    learned = trainer.optimizers[0].param_groups[0]["lr"]
    assert learned > 0.013
    for module, expected in ((Reference(), learned), (Editing(), 0.01)):
        hd = HypergradientDescent("multiplicative")
        make_trainer(tmp_path, hd, max_epochs=2, limit_train_batches=20).fit(module, ckpt_path=tmp_path / "last.ckpt")
        assert hd.lrs["lr-SGD"][0] == pytest.approx(expected, rel=0.11)


@pytest.mark.parametrize("chosen", [None, ".1f"])
def test_a_rich_bar_shows_the_digits_of_a_small_rate(chosen: str | None, tmp_path: Path) -> None:
    theme = RichProgressBarTheme() if chosen is None else RichProgressBarTheme(metrics_format=chosen)
    bar = RichProgressBar(theme=theme, console_kwargs={"file": io.StringIO(), "force_terminal": True, "width": 200})
    hd = HypergradientDescent("additive", hypergrad_lr=0.0, prog_bar=True)
    module = Reference(lambda network: SGD(network.parameters(), lr=1e-4))
    make_trainer(tmp_path, hd, bar, enable_progress_bar=True, limit_train_batches=20).fit(module)
    assert bar.theme.metrics_format == (chosen or ".3g")


def test_loggers_are_called_by_name_as_lightning_calls_them(tmp_path: Path) -> None:
    class ByName(CSVLogger):
        def log_metrics(self, **arguments: Any) -> None:  # type: ignore[override]
            seen.append(arguments)

    seen: list[dict[str, Any]] = []
    make_trainer(tmp_path, HypergradientDescent(), logger=ByName(tmp_path), log_every_n_steps=10).fit(Reference())
    ours = [call for call in seen if "hd/lr-SGD" in call["metrics"]]
    assert [call["step"] for call in ours] == list(range(9, 200, 10))


def test_every_metric_can_be_monitored(tmp_path: Path) -> None:
    class Seen(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            seen.append({key for key in trainer.callback_metrics if key.startswith("hd/")})

    seen: list[set[str]] = []
    make_trainer(tmp_path, HypergradientDescent(), Seen(), limit_train_batches=5).fit(Reference())
    assert seen[-1] == {f"hd/{what}-SGD" for what in ("lr", "scale", "hypergradient", "cosine", "backoffs")}
