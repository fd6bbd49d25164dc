"""The callback beside Lightning's other callbacks, in real Trainers and, where it may matter, in both orders."""

import io
import math
import pickle
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor
from torch.optim import SGD, Optimizer, lr_scheduler, swa_utils
from torch.utils.data import DataLoader, TensorDataset

from lightning_hd import HypergradientDescent
from lightning_hd.reporting.summary import remarks
from tests import reference
from tests.pairs import by_turns, pairwise
from tests.test_callback import Reference, make_trainer, same, scalars
from tests.test_checkpoints import differences

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]

EPOCH = 20

in_both_orders = pytest.mark.parametrize("reverse", [False, True], ids=["first", "last"])
RULES = ("auto", "additive", "multiplicative")
with_every_rule = pytest.mark.parametrize("rule", RULES)
with_every_rule_in_turn = pytest.mark.parametrize(
    ("rule", "reverse"), list(zip(RULES, (False, True, False), strict=True))
)


class Example(Reference):
    """The reference problem with all that one of the callbacks asks for."""

    def __init__(self, exponential: bool = False) -> None:
        super().__init__()
        self.lr = 0.01
        self.batch_size = reference.BATCH
        self.backbone: Any = self.network[0]
        self.head: Any = self.network[2]
        self.exponential = exponential
        self.before = torch.zeros(())
        self.held_lrs: list[list[float]] = []  # by the optimizer's groups before each step
        self.real_lrs: list[float] = []  # of each step, as a parameter tells it

    def configure_optimizers(self) -> Any:
        optimizer = SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)
        return ([optimizer], [lr_scheduler.ExponentialLR(optimizer, 0.9)]) if self.exponential else optimizer

    def train_dataloader(self) -> Any:
        x, y = (torch.cat(parts) for parts in zip(*reference.torch_batches(), strict=True))
        return DataLoader(TensorDataset(x, y), batch_size=self.batch_size)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", reference.torch_loss(self.network, *batch))

    val_dataloader = train_dataloader

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.before = self.head.weight.detach().clone()

    def on_train_batch_start(self, *_: Any) -> None:
        self.held_lrs.append([group["lr"] for group in self.trainer.optimizers[0].param_groups])

    def on_train_batch_end(self, *_: Any) -> None:
        g = self.head.weight.grad
        self.real_lrs.append(float((g * (self.before - self.head.weight)).sum() / g.square().sum()))


def fit(path: Path, module: LightningModule, *used: Callback, reverse: bool = False, **arguments: Any) -> Trainer:
    settings = {"limit_train_batches": EPOCH, "limit_val_batches": 0, **arguments}
    trainer = make_trainer(path, *used[:: -1 if reverse else 1], **settings)
    trainer.fit(module)
    return trainer


# ---------------------------------------------------------------------- what others read


@in_both_orders
@pytest.mark.parametrize("exponential", [False, True])
def test_the_monitor_logs_what_the_optimizer_holds(tmp_path: Path, exponential: bool, reverse: bool) -> None:
    hd = HypergradientDescent()
    monitor, alone = callbacks.LearningRateMonitor("step"), callbacks.LearningRateMonitor("step")
    for name, own in (("with", [hd, monitor]), ("alone", [alone])):
        arguments: dict[str, Any] = {"logger": TensorBoardLogger(tmp_path / name), "log_every_n_steps": 1}
        fit(tmp_path, Example(exponential), *own, reverse=reverse, max_epochs=2, **arguments)
    if exponential:
        assert monitor.lrs == alone.lrs
    else:
        assert monitor.lrs["lr-SGD"] == [0.01, *hd.lrs["lr-SGD"][:-1]]
        logged = [scalars(tmp_path / "with", tag) for tag in ("lr-SGD", "hd/lr-SGD")]
        assert [logged[0][step] for step in range(1, 2 * EPOCH)] == list(logged[1].values())[:-1]


@in_both_orders
def test_a_checkpoint_can_be_chosen_by_the_rate(tmp_path: Path, reverse: bool) -> None:
    hd = HypergradientDescent("multiplicative")
    best = callbacks.ModelCheckpoint(tmp_path, "{step}", "hd/lr-SGD", mode="max", every_n_train_steps=7)
    fit(tmp_path, Reference(), hd, best, reverse=reverse, limit_train_batches=100)
    saved = {step: hd.lrs["lr-SGD"][step - 1] for step in range(7, 100, 7)}
    expected = max(saved, key=lambda step: saved[step])
    assert float(best.best_model_score or 0) == pytest.approx(saved[expected])
    assert Path(best.best_model_path).stem == f"step={expected}"
    assert expected < max(saved)


@in_both_orders
@pytest.mark.parametrize("accumulate", [1, 8])
def test_any_validation_can_stop_training_by_the_rate(tmp_path: Path, accumulate: int, reverse: bool) -> None:
    hd = HypergradientDescent("multiplicative")
    stop = callbacks.EarlyStopping("hd/lr-SGD", stopping_threshold=0.012, mode="max")
    arguments = {"val_check_interval": 4, "limit_val_batches": 1, "accumulate_grad_batches": accumulate}
    trainer = fit(tmp_path, Example(), hd, stop, reverse=reverse, max_epochs=9, **arguments)
    assert hd.lrs["lr-SGD"][-1] > 0.012
    assert trainer.global_step == len(hd.lrs["lr-SGD"]) < 9 * EPOCH // accumulate


@in_both_orders
@pytest.mark.parametrize("bar", [callbacks.RichProgressBar, callbacks.TQDMProgressBar])
def test_progress_bars_show_the_rate(tmp_path: Path, bar: Any, reverse: bool) -> None:
    hd, shown, module = HypergradientDescent(prog_bar=True), bar(), Reference()
    trainer = fit(tmp_path, module, hd, shown, reverse=reverse, enable_progress_bar=True)
    assert shown.get_metrics(trainer, module)["hd/lr-SGD"] == pytest.approx(hd.lrs["lr-SGD"][-1])


# ---------------------------------------------------------------------- searches before and in training

SWEEP: dict[str, Any] = {"max_lr": 0.5, "num_training_steps": 15, "early_stop_threshold": None}
TRIALS: dict[str, Any] = {"steps_per_trial": 2, "init_val": 8, "max_trials": 2}


class SweepInMidTraining(callbacks.LearningRateFinder):
    """At the start of an epoch, as Lightning's documentation does it."""

    def __init__(self, epoch: int, **arguments: Any) -> None:
        super().__init__(**SWEEP, **arguments)
        self.epoch = epoch

    on_fit_start = Callback.on_fit_start

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            self.lr_find(trainer, pl_module)


class TrialsAtTheStart(callbacks.BatchSizeFinder):
    """At the start of the first epoch, as Lightning's documentation does it."""

    on_fit_start = Callback.on_fit_start

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            self.scale_batch_size(trainer, pl_module)


@with_every_rule_in_turn
def test_a_sweep_before_training_is_not_tuned_but_training_is(tmp_path: Path, rule: Any, reverse: bool) -> None:
    alone, finder = [callbacks.LearningRateFinder(**SWEEP) for _ in range(2)]
    fit(tmp_path, Example(), alone)
    hd, module = HypergradientDescent(rule), Example()
    fit(tmp_path, module, hd, finder, reverse=reverse)
    assert finder.optimal_lr is not None is not alone.optimal_lr
    assert finder.optimal_lr.results == alone.optimal_lr.results
    assert len(hd.lrs["lr-SGD"]) == len(set(hd.lrs["lr-SGD"])) == EPOCH
    assert rule == "auto" or hd.lrs["lr-SGD"][0] == module.lr != 0.01


def test_a_sweep_of_the_tuner_is_not_tuned_but_training_is(tmp_path: Path) -> None:
    hd, sweeps = HypergradientDescent("multiplicative"), []
    for own in ([], [hd]):
        module, trainer = Example(), make_trainer(tmp_path, *own, limit_train_batches=EPOCH, limit_val_batches=0)
        sweep = Tuner(trainer).lr_find(module, max_lr=0.5, num_training=15, early_stop_threshold=None)
        sweeps.append((sweep.results if sweep else None, module.lr))
    assert sweeps[0] == sweeps[1]
    trainer.fit(module)
    assert hd.lrs["lr-SGD"][0] == module.lr != 0.01
    assert len(hd.lrs["lr-SGD"]) == len(set(hd.lrs["lr-SGD"])) == EPOCH


@pytest.mark.filterwarnings("error:HypergradientDescent")
@pytest.mark.parametrize("finder", [callbacks.LearningRateFinder(**SWEEP), callbacks.BatchSizeFinder(**TRIALS)])
def test_a_search_before_training_is_not_taken_for_a_checkpoint(tmp_path: Path, finder: Callback) -> None:
    fit(tmp_path, Example(), HypergradientDescent(), finder)


@pytest.mark.parametrize(("rule", "epoch"), [("auto", 0), ("additive", 1), ("multiplicative", 0)])
def test_a_sweep_in_mid_training_is_not_tuned(tmp_path: Path, rule: Any, epoch: int) -> None:
    finder, module = SweepInMidTraining(epoch), Example()
    fit(tmp_path, module, HypergradientDescent(rule), finder, max_epochs=3)
    assert finder.optimal_lr is not None
    assert module.real_lrs[epoch * EPOCH :][:15] == pytest.approx(finder.optimal_lr.results["lr"], rel=1e-5)


@pytest.mark.parametrize(("rule", "epoch"), [("multiplicative", 0), ("multiplicative", 1), ("auto", 1)])
def test_training_goes_on_from_the_rate_that_a_sweep_suggests(tmp_path: Path, rule: Any, epoch: int) -> None:
    hd, module = HypergradientDescent(rule), Example()
    fit(tmp_path, module, hd, SweepInMidTraining(epoch), max_epochs=3)
    assert hd.lrs["lr-SGD"][-(3 - epoch) * EPOCH] == pytest.approx(module.lr, rel=0.11)
    assert module.lr != 0.01


@pytest.mark.parametrize(
    ("search", "rule"), by_turns(("sweep in epoch 0", "sweep in epoch 1", "trials in epoch 0"), RULES, every=3)
)
def test_training_goes_on_from_a_search_as_if_there_had_been_none(tmp_path: Path, rule: Any, search: str) -> None:
    sweep = SweepInMidTraining(int(search[-1]), update_attr=False)
    finder = TrialsAtTheStart(**TRIALS) if "trials" in search else sweep
    hds, modules = [HypergradientDescent(rule) for _ in range(2)], [Example() for _ in range(2)]
    for module, hd, others in zip(modules, hds, ([], [finder]), strict=True):
        assert fit(tmp_path, module, hd, *others, max_epochs=3).global_step == 3 * EPOCH
    assert len(modules[1].real_lrs) > 3 * EPOCH
    assert same(*modules)
    assert differences(hds[0].engines[0].state_dict(), hds[1].engines[0].state_dict()) == 0
    assert hds[0].lrs == hds[1].lrs


@pytest.mark.parametrize(("by", "reverse"), [("callback", False), ("callback", True), ("tuner", False)])
def test_batch_sizes_are_tried_as_ever(tmp_path: Path, by: str, reverse: bool) -> None:
    hds, modules = [HypergradientDescent("multiplicative") for _ in range(2)], [Example() for _ in range(2)]
    fit(tmp_path, modules[0], hds[0])
    finder = [callbacks.BatchSizeFinder(**TRIALS)] if by == "callback" else []
    trainer = make_trainer(tmp_path, *[hds[1], *finder][:: -1 if reverse else 1], limit_train_batches=EPOCH)
    if by == "tuner":
        assert Tuner(trainer).scale_batch_size(modules[1], **TRIALS) == 16
    trainer.fit(modules[1])
    assert modules[1].batch_size == 16
    assert hds[0].lrs == hds[1].lrs


# ---------------------------------------------------------------------- averages


def annealed(begin: float, swa_lr: float, epochs: int, annealing: int) -> list[float]:
    """The rate of each epoch of averaging, by the cosine that SWALR documents."""
    parts = [min(1.0, epoch / annealing) if annealing else 1.0 for epoch in range(epochs)]
    return [swa_lr + (begin - swa_lr) * (1 + math.cos(math.pi * part)) / 2 for part in parts]


@pytest.mark.parametrize(
    ("rule", "swa_lr", "schedule", "reverse"),
    pairwise(RULES, [0.0005, 0.5], [(False, 2), (True, 2), (True, 0)], [False, True]),
)
def test_averaging_goes_from_the_learned_rate_to_its_own(
    tmp_path: Path, rule: Any, swa_lr: float, schedule: tuple[bool, int], reverse: bool
) -> None:
    """With or without an exponential schedule, and with some epochs of annealing."""
    exponential, annealing = schedule
    hd, module = HypergradientDescent(rule), Example(exponential)
    swa = callbacks.StochasticWeightAveraging(swa_lr, swa_epoch_start=3, annealing_epochs=annealing)
    fit(tmp_path, module, hd, swa, reverse=reverse, max_epochs=6)
    lrs, begin = hd.lrs["lr-SGD"], 2 * EPOCH
    learned = lrs[begin - 1] * (0.9 if exponential else 1.0)
    expected = annealed(learned, swa_lr, 4, annealing)
    assert lrs[begin:] == pytest.approx([lr for lr in expected for _ in range(EPOCH)], rel=1e-9)
    assert lrs[-1] == module.optimizers().param_groups[0]["swa_lr"] == swa_lr  # type: ignore[union-attr]
    assert module.real_lrs[begin:] == pytest.approx(lrs[begin:], rel=1e-3)
    assert hd.engines[0].scales == [1.0]
    assert not [remark for remark in remarks(hd._recorders, hd.rule) if "undid" in remark]


@pytest.mark.parametrize(("rule", "exponential"), [("auto", True), ("additive", False), ("multiplicative", True)])
def test_averaging_from_the_first_step_on_has_its_own_rates(tmp_path: Path, rule: Any, exponential: bool) -> None:
    runs = []
    for own in ([], [HypergradientDescent(rule)]):
        module, swa = Example(exponential), callbacks.StochasticWeightAveraging(0.5, 1, annealing_epochs=2)
        fit(tmp_path, module, *own, swa, max_epochs=4)
        runs.append(module)
    assert runs[0].held_lrs == runs[1].held_lrs
    assert same(*runs)


def test_a_clamp_holds_the_rates_of_averaging(tmp_path: Path) -> None:
    hd, swa = HypergradientDescent(max_lr=0.1), callbacks.StochasticWeightAveraging(0.5, 2, annealing_epochs=1)
    fit(tmp_path, Example(), hd, swa, max_epochs=4)
    assert hd.lrs["lr-SGD"][-1] == 0.1


def loads_averaging() -> bool:
    """Whether torch loads what a Trainer saves of SWALR: the functions of old versions are refused."""
    file = io.BytesIO()
    torch.save(swa_utils.SWALR(SGD([torch.ones(1)], 0.1), 0.1).state_dict(), file)
    file.seek(0)
    with suppress(pickle.UnpicklingError):
        torch.load(file, weights_only=True)
        return True
    return False


where_averaging_is_loaded = pytest.mark.skipif(
    not loads_averaging(), reason="this torch cannot load the checkpoints of StochasticWeightAveraging at all"
)


@where_averaging_is_loaded
@pytest.mark.parametrize(("rule", "exponential"), [("auto", False), ("additive", True), ("multiplicative", False)])
def test_averaging_is_resumed_exactly(tmp_path: Path, rule: Any, exponential: bool) -> None:
    def average() -> Callback:
        return callbacks.StochasticWeightAveraging(0.5, swa_epoch_start=2, annealing_epochs=4)

    whole, rest = HypergradientDescent(rule), HypergradientDescent(rule)
    every = callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    modules = [Example(exponential), Example(exponential)]
    fit(tmp_path, modules[0], whole, average(), every, max_epochs=6)
    trainer = make_trainer(tmp_path, rest, average(), limit_train_batches=EPOCH, limit_val_batches=0, max_epochs=6)
    trainer.fit(modules[1], ckpt_path=tmp_path / "epoch=2.ckpt")
    assert rest.lrs["lr-SGD"] == whole.lrs["lr-SGD"][3 * EPOCH :]
    assert len({*rest.lrs["lr-SGD"]}) == 3


@where_averaging_is_loaded
@with_every_rule
def test_a_run_without_averaging_goes_on_from_its_rate_and_tunes(tmp_path: Path, rule: Any) -> None:
    before, after = HypergradientDescent(rule), HypergradientDescent(rule)
    every = callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    swa = callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=2, annealing_epochs=1)
    fit(tmp_path, Example(), before, swa, every, max_epochs=3)
    trainer = make_trainer(tmp_path, after, limit_train_batches=EPOCH, limit_val_batches=0, max_epochs=6)
    with pytest.warns(RuntimeWarning, match="the saved state is of a training with a scheduler, and there is none now"):
        trainer.fit(Example(), ckpt_path=tmp_path / "epoch=2.ckpt")
    lrs = after.lrs["lr-SGD"]
    assert lrs[0] == pytest.approx(before.lrs["lr-SGD"][-1], rel=0.12)
    assert len({*lrs}) == 3 * EPOCH
    assert not after.engines[0].scheduled


@in_both_orders
@pytest.mark.parametrize("name", ["WeightAveraging", "EMAWeightAveraging"])
def test_averages_of_the_weights_do_not_change_the_rates(tmp_path: Path, name: str, reverse: bool) -> None:
    if not hasattr(callbacks, name):
        pytest.skip(f"this Lightning has no {name}")
    hds, modules = [HypergradientDescent() for _ in range(2)], [Example() for _ in range(2)]
    for module, hd, others in zip(modules, hds, ([], [getattr(callbacks, name)()]), strict=True):
        fit(tmp_path, module, hd, *others, reverse=reverse, max_epochs=2, val_check_interval=5, limit_val_batches=1)
    assert hds[0].lrs == hds[1].lrs
    assert not same(*modules)


# ---------------------------------------------------------------------- what others change


@pytest.mark.parametrize(("rule", "scope", "reverse"), pairwise(RULES, ["global", "group"], [False, True]))
def test_a_backbone_follows_what_finetuning_writes(tmp_path: Path, rule: Any, scope: Any, reverse: bool) -> None:
    hd, module = HypergradientDescent(rule, scope=scope), Example()
    finetuning = callbacks.BackboneFinetuning(2, lambda _: 2.0)
    trainer = fit(tmp_path, module, hd, finetuning, reverse=reverse, max_epochs=5)
    head, backbone = hd.lrs["lr-SGD"], hd.lrs["lr-SGD/pg2"]
    assert (len(head), len(backbone)) == (5 * EPOCH, 3 * EPOCH)
    assert all(0 < lr < math.inf for lr in head + backbone)
    for epoch in range(2, 5):
        begin = epoch * EPOCH
        first, *others = backbone[begin - 2 * EPOCH :][:EPOCH]
        if (rule, scope, epoch) == ("auto", "global", 2):  # the rate was found without the backbone: it starts anew
            assert head[begin] < 0.1 * head[begin - 1]
        else:
            assert head[begin] / head[begin - 1] == pytest.approx(1, abs=0.65 if rule == "auto" else 0.11)
        assert first == pytest.approx(module.held_lrs[begin][1], rel=0.65 if rule == "auto" else 0.11) or (
            rule == "auto" and epoch == 2
        )
        assert len({first, *others}) == EPOCH
    assert hd.engines[0].stats.nonfinite_steps == 0
    assert float(trainer.callback_metrics["hd/lr-SGD/pg2"]) == pytest.approx(backbone[-1])


@pytest.mark.parametrize("scope", ["global", "group"])
def test_a_curve_goes_on_under_its_name_though_a_group_was_added(tmp_path: Path, scope: Any) -> None:
    class Monitor(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            seen.append({key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("hd/")})

    seen: list[dict[str, float]] = []
    hd, logger = HypergradientDescent(scope=scope), TensorBoardLogger(tmp_path)
    finetuning = callbacks.BackboneFinetuning(2)
    fit(tmp_path, Example(), hd, finetuning, Monitor(), max_epochs=4, logger=logger, log_every_n_steps=1)
    first = [metrics["hd/lr-SGD"] for metrics in seen]
    assert len(first) == 4 * EPOCH
    assert first == pytest.approx(hd.lrs["lr-SGD"])
    assert list(scalars(tmp_path, "hd/lr-SGD").values()) == pytest.approx(first)
    assert [metrics["hd/lr-SGD/pg2"] for metrics in seen[2 * EPOCH :]] == pytest.approx(hd.lrs["lr-SGD/pg2"])
    assert set(hd.lrs) == {"lr-SGD", "lr-SGD/pg2"}
    assert len(scalars(tmp_path, "hd/scale-SGD")) == 4 * EPOCH
    for quantity in ("scale", "hypergradient", "cosine", "backoffs"):  # for EarlyStopping and the like
        assert f"hd/{quantity}-SGD" in seen[-1]


@in_both_orders
def test_accumulation_that_changes_is_logged_at_every_step(tmp_path: Path, reverse: bool) -> None:
    hd, accumulation = HypergradientDescent(), callbacks.GradientAccumulationScheduler({0: 1, 1: 4, 2: 2})
    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, Reference(), hd, accumulation, reverse=reverse, max_epochs=3, logger=logger, log_every_n_steps=1)
    assert len(hd.lrs["lr-SGD"]) == EPOCH + EPOCH // 4 + EPOCH // 2
    logged = scalars(tmp_path, "hd/lr-SGD")
    assert list(logged) == list(scalars(tmp_path, "loss")) == list(range(35))
    assert list(logged.values()) == pytest.approx(hd.lrs["lr-SGD"])


@with_every_rule_in_turn
def test_pruned_weights_stay_pruned(tmp_path: Path, rule: Any, reverse: bool) -> None:
    hd, module = HypergradientDescent(rule), Reference()
    fit(tmp_path, module, hd, callbacks.ModelPruning("l1_unstructured", amount=0.5), reverse=reverse, max_epochs=3)
    p = torch.cat([p.flatten() for p in module.parameters()])
    assert int((p == 0).sum()) == pytest.approx((1 - 0.5**3) * len(p), abs=1)
    assert len(set(hd.lrs["lr-SGD"])) > 0.9 * 3 * EPOCH, "the greedy bound may hold the rate for a step"
    assert hd.engines[0].stats.nonfinite_steps == 0


# ---------------------------------------------------------------------- what ends training


@in_both_orders
def test_a_timer_ends_tuning(tmp_path: Path, reverse: bool) -> None:
    hd, timer = HypergradientDescent(), callbacks.Timer(timedelta(seconds=0.1), interval="step")
    trainer = fit(tmp_path, Reference(), hd, timer, reverse=reverse, max_epochs=10_000)
    assert 0 < trainer.global_step == len(hd.lrs["lr-SGD"]) < 10_000 * EPOCH
    assert hd.engines[0]._hooks is None


class OneBatch(Reference):
    """All batches are the same, for Lightning resumes an epoch at its first ones."""

    failing = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.failing and (self.current_epoch, batch_idx) == (1, 5):
            raise ValueError("stop")
        return super().training_step(reference.torch_batches()[0], batch_idx)


@with_every_rule_in_turn
def test_the_checkpoint_of_an_exception_can_be_resumed(tmp_path: Path, rule: Any, reverse: bool) -> None:
    whole, failing, resumed = (OneBatch() for _ in range(3))
    failing.failing = True
    hds = [HypergradientDescent(rule) for _ in range(3)]
    fit(tmp_path, whole, hds[0], max_epochs=2)
    saver, arguments = callbacks.OnExceptionCheckpoint(tmp_path), {"max_epochs": 2, "enable_checkpointing": True}
    with pytest.raises(ValueError, match="stop"):
        fit(tmp_path, failing, hds[1], saver, reverse=reverse, **arguments)
    make_trainer(tmp_path, hds[2], max_epochs=2, limit_train_batches=EPOCH).fit(resumed, ckpt_path=saver.ckpt_path)
    assert hds[1].lrs["lr-SGD"] + hds[2].lrs["lr-SGD"] == hds[0].lrs["lr-SGD"]
    assert same(whole, resumed)
