"""Other ways to train: the package pytorch_lightning, the README's code as it stands, Hugging Face's Trainer."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_hd import HypergradientDescent, HypergradientLR
from tests import reference
from tests.test_callback import LOGGED, Reference, make_trainer, same, scalars, tags

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]

RATE = "hd/lr-SGD"


@pytest.fixture
def pl() -> Any:
    return pytest.importorskip("pytorch_lightning")


def twin(pl: Any) -> Any:
    """The module ``Reference``, of the other package."""

    def build(self: Any) -> None:
        super(cls, self).__init__()
        self.network, self.configure = reference.torch_network(), None

    body = {name: vars(Reference)[name] for name in ("training_step", "configure_optimizers", "train_dataloader")}
    cls: Any = type("Twin", (pl.LightningModule,), {**body, "__init__": build})
    return cls()


def fit(pl: Any, path: Path, module: Any, *callbacks: Any, resume: Path | None = None, **arguments: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": None}
    settings = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "limit_train_batches": 50, **quiet, **arguments}
    trainer = pl.Trainer(callbacks=list(callbacks), default_root_dir=path, **settings)
    trainer.fit(module, ckpt_path=resume)
    return trainer


# ---------------------------------------------------------------------- pytorch_lightning


def test_pytorch_lightning_tunes_and_logs_as_lightning_does(pl: Any, tmp_path: Path) -> None:
    one, module = HypergradientDescent(), Reference()
    make_trainer(tmp_path, one, limit_train_batches=50).fit(module)
    other, its_module = HypergradientDescent(prog_bar=True), twin(pl)
    logger = pl.loggers.TensorBoardLogger(tmp_path)
    trainer = fit(pl, tmp_path, its_module, other, logger=logger, log_every_n_steps=10)
    assert other.lrs == one.lrs
    assert same(module, its_module)
    assert tags(tmp_path) == {f"hd/{what}-SGD" for what in LOGGED}
    lrs = one.lrs["lr-SGD"]
    assert scalars(tmp_path, RATE) == pytest.approx(dict(enumerate(lrs)), rel=1e-6)
    for metrics in (trainer.callback_metrics, trainer.progress_bar_metrics):
        assert float(metrics[RATE]) == pytest.approx(lrs[-1], rel=1e-6)


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:.*callbacks used to create the checkpoint")
def test_a_checkpoint_of_pytorch_lightning_is_resumed_exactly_by_both_packages(pl: Any, tmp_path: Path) -> None:
    whole, again, there = (HypergradientDescent() for _ in range(3))
    module, its_module, own_module = twin(pl), twin(pl), Reference()
    keep = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(pl, tmp_path, module, whole, keep, max_epochs=3)
    file = tmp_path / "epoch=0.ckpt"
    fit(pl, tmp_path, its_module, again, max_epochs=3, resume=file)
    make_trainer(tmp_path, there, limit_train_batches=50, max_epochs=3).fit(own_module, ckpt_path=file)
    assert again.lrs == there.lrs == {"lr-SGD": whole.lrs["lr-SGD"][50:]}
    assert same(module, its_module)
    assert same(module, own_module)


def test_callbacks_of_pytorch_lightning_can_monitor_the_rate(pl: Any, tmp_path: Path) -> None:
    hd = HypergradientDescent()
    best = pl.callbacks.ModelCheckpoint(tmp_path, monitor=RATE, mode="max", every_n_train_steps=2)
    stop = pl.callbacks.EarlyStopping(RATE, mode="max", stopping_threshold=1e-3, check_on_train_epoch_end=True)
    trainer = fit(pl, tmp_path, twin(pl), hd, best, stop, limit_train_batches=4, max_epochs=20)
    lrs = hd.lrs["lr-SGD"]
    assert trainer.global_step == len(lrs)
    assert lrs[-5] < 1e-3 < lrs[-1]
    assert float(best.best_model_score) == pytest.approx(max(lrs[1::2]), rel=1e-6)


def test_a_strategy_of_pytorch_lightning_that_is_not_supported_is_refused(pl: Any, tmp_path: Path) -> None:
    named: Any = type("DeepSpeedStrategy", (pl.strategies.SingleDeviceStrategy,), {})
    module = twin(pl)
    with pytest.raises(TypeError, match="does not support DeepSpeedStrategy"):
        fit(pl, tmp_path, module, HypergradientDescent(), strategy=named("cpu"))
    assert same(module, twin(pl))


# ---------------------------------------------------------------------- the README and the documentation


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    block
    for page in PAGES
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
]


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: code.partition("\n")[0])
def test_the_code_in_the_readme_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {"ACCELERATOR": "cpu", "MAX_EPOCHS": "1", "ENABLE_PROGRESS_BAR": "0"}.items():
        monkeypatch.setenv(f"PL_TRAINER_{name}", value)
    torch.manual_seed(0)
    model = Reference()
    names: dict[str, Any] = {"__name__": "readme", "model": model, "train_dataloader": model.train_dataloader()}
    exec(code, names)
    if "trainer" in names:
        assert len(scalars(tmp_path, RATE)) == 200
    elif "Sign" in names:
        hd = HypergradientDescent(rule=names["Sign"]())
        make_trainer(tmp_path, hd).fit(Reference())
        assert max(hd.lrs["lr-SGD"]) > 0.01
    elif "remove" in names:
        hd = HypergradientDescent()
        trainer = make_trainer(tmp_path, hd)
        trainer.fit(Reference())
        assert hd.state_dict()["optimizers"][0]["view"]["memory"].any()
        names["remove"](trainer.optimizers[0])
        assert not any("hd_" in key for state in trainer.optimizers[0].state.values() for key in state)
    else:  # without Lightning
        assert names["hd"].step_count == 100
        assert names["hd"].lrs == [group["lr"] for group in names["optimizer"].param_groups] != [0.01]
        assert (names["model"].weight - 1).abs().max() < 0.5


# ---------------------------------------------------------------------- Hugging Face


@pytest.fixture
def transformers() -> Any:
    pytest.importorskip("accelerate")
    return pytest.importorskip("transformers")


class Line(nn.Module):
    """A linear model that returns its loss, as those of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.mse_loss(self.linear(x), labels)}


def samples() -> tuple[Tensor, Tensor]:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    return x, x.sum(1, keepdim=True)


class Huggingface:
    """Twelve steps of the Trainer of transformers, tuned, and what each was taken with; saves the engine's state."""

    def __init__(self, transformers: Any, path: Path, optimizer: type[Optimizer] = AdamW, **arguments: Any) -> None:
        self.model = Line()
        made = optimizer(self.model.parameters(), lr=0.01)  # type: ignore[call-arg]
        self.hd = HypergradientLR(made)
        self.steps: list[tuple[float, float, float]] = []

        def record(*_: Any, optimizer: Any, **others: Any) -> None:
            self.steps.append((self.hd.lrs[0], optimizer.param_groups[0]["lr"], self.hd.scales[0]))

        def save(_: Any, args: Any, state: Any, *rest: Any, **others: Any) -> None:
            torch.save(self.hd.state_dict(), path / f"checkpoint-{state.global_step}" / "hd.pt")

        hooks = type("Hooks", (transformers.TrainerCallback,), {"on_optimizer_step": record, "on_save": save})
        quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
        settings = {"max_steps": 12, "per_device_train_batch_size": 8, "save_strategy": "no", **quiet, **arguments}
        self.trainer = transformers.Trainer(
            model=self.model,
            args=transformers.TrainingArguments(output_dir=str(path), **settings),
            train_dataset=[{"x": x, "labels": y} for x, y in zip(*samples(), strict=True)],
            optimizers=(made, None),
            callbacks=[hooks()],
        )


@pytest.mark.parametrize(
    ("schedule", "scheduled"),
    [
        ({"lr_scheduler_type": "constant"}, [0.01] * 12),
        ({"lr_scheduler_type": "linear"}, [0.01 * (12 - i) / 12 for i in range(12)]),
        ({"lr_scheduler_type": "linear", "warmup_steps": 4}, [0.01 * min(i / 4, (12 - i) / 8) for i in range(12)]),
    ],
)
def test_huggingface_is_tuned_under_its_schedule(
    transformers: Any, tmp_path: Path, schedule: dict[str, Any], scheduled: list[float]
) -> None:
    run = Huggingface(transformers, tmp_path, **schedule)
    run.trainer.train()
    assert run.hd.step_count == 12
    assert [step[1] for step in run.steps] == pytest.approx(scheduled)
    assert [step[0] for step in run.steps] == pytest.approx([rate * scale for _, rate, scale in run.steps])
    assert run.steps[-1][2] > 5 * run.steps[1][2]


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_huggingface_accumulates_and_clips_as_a_plain_loop(transformers: Any, tmp_path: Path, clip: float) -> None:
    arguments = {"gradient_accumulation_steps": 4, "max_grad_norm": clip, "lr_scheduler_type": "constant"}
    run = Huggingface(transformers, tmp_path, SGD, **arguments)
    run.trainer.train()
    model = Line()
    optimizer = SGD(model.parameters(), lr=0.01)
    hd = HypergradientLR(optimizer)
    x, y = samples()
    for lr, _, _ in run.steps:
        optimizer.zero_grad()
        model(x, y)["loss"].backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        assert lr == pytest.approx(hd.lrs[0], rel=1e-4)
    assert run.hd.step_count == 12
    (seen,) = run.hd.last
    assert seen is not None
    assert (seen.grad_norm <= 0.1001) == bool(clip)


@pytest.mark.parametrize("optimizer", [SGD, AdamW])
def test_huggingface_is_resumed_exactly_with_the_state_of_the_engine(
    transformers: Any, tmp_path: Path, optimizer: type[Optimizer]
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 5}
    whole = Huggingface(transformers, tmp_path, optimizer, **saving)
    whole.trainer.train()
    folder = tmp_path / "checkpoint-5"
    again, anew = (Huggingface(transformers, tmp_path, optimizer, **saving) for _ in range(2))
    again.hd.load_state_dict(torch.load(folder / "hd.pt"))
    again.trainer.train(resume_from_checkpoint=str(folder))
    assert again.steps == whole.steps[5:]
    assert same(again.model, whole.model)
    anew.trainer.train(resume_from_checkpoint=str(folder))  # Trainer saves the state of the optimizer only
    assert anew.hd.step_count == 7
    assert anew.steps[0][0] < whole.steps[4][0]
