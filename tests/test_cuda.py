"""On a GPU: one read waits for it in early steps, none in late ones, and it tunes as the CPU does. Else skipped."""

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.utils.data import DataLoader, TensorDataset

from lightning_hd import HypergradientDescent, HypergradientLR
from tests.benchmarks.gpu import waits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

FAMILIES: list[Any] = [
    pytest.param(SGD, {}, id="SGD"),
    pytest.param(SGD, {"momentum": 0.9, "nesterov": True, "fused": True}, id="Nesterov, fused"),
    pytest.param(SGD, {"momentum": 0.9}, id="heavy ball"),
    pytest.param(Adam, {}, id="Adam"),
    pytest.param(Adam, {"fused": True, "amsgrad": True}, id="Adam, fused"),
    pytest.param(AdamW, {"capturable": True}, id="AdamW, capturable"),
    pytest.param(RMSprop, {}, id="RMSprop"),
]
RULES = ("additive", "multiplicative", "auto")


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 3)).double()


@pytest.mark.parametrize(("cls", "settings"), FAMILIES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["number", "tensor"])
def test_the_host_waits_once_per_step(cls: Any, settings: dict[str, Any], rule: Any, tensor_lr: bool) -> None:
    if tensor_lr and not (settings.get("fused") or settings.get("capturable")):
        pytest.skip("the optimizer itself reads a tensor rate on the host")
    counts = []
    for tuned in (False, True):
        model = network().cuda()
        lr: Any = torch.tensor(1e-3, device="cuda") if tensor_lr else 1e-3
        optimizer: Optimizer = cls(model.parameters(), lr=lr, **settings)
        if tuned:
            HypergradientLR(optimizer, rule)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for _ in range(4):
            optimizer.step()
        counts.append(waits(optimizer.step))
    assert counts[1] == counts[0] + 1 + tensor_lr, "a rate that is a tensor must be read, for others may write it"


@pytest.mark.parametrize(("cls", "settings"), [*FAMILIES[:2], *FAMILIES[3:5]])
def test_the_host_does_not_wait_in_late_steps(cls: Any, settings: dict[str, Any]) -> None:
    model = network().cuda()
    optimizer: Optimizer = cls(model.parameters(), lr=1e-3, **settings)
    HypergradientLR(optimizer, max_lr=1e-5)  # so that gradients neither leap nor vanish
    model(torch.ones(8, 20, dtype=torch.float64, device="cuda")).square().mean().backward()
    for _ in range(1010):
        optimizer.step()
    assert [waits(optimizer.step) for _ in range(16)] == [0] * 16


@pytest.mark.parametrize(("cls", "settings"), FAMILIES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("probe", ["default", 200])
def test_a_gpu_tunes_as_the_cpu_does(cls: Any, settings: dict[str, Any], rule: Any, probe: Any) -> None:
    x, y = torch.randn(64, 20).double(), torch.randint(3, (64,))
    rates = []
    for device in ("cpu", "cuda"):
        model = network().to(device)
        own = {**settings, "capturable": False} if "capturable" in settings and device == "cpu" else settings
        optimizer: Optimizer = cls(model.parameters(), lr=1e-3, **own)
        engine = HypergradientLR(optimizer, rule, probe=probe)
        found = []
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x.to(device)), y.to(device)).backward()
            optimizer.step()
            found.append(engine.lrs[0])
        rates.append(found)
    # A capturable optimizer takes the powers of its betas in float32: 1 - 0.999^t is off by up to 2^-24 / 0.001 of it.
    assert rates[1] == pytest.approx(rates[0], rel=2**-24 / 0.001 if "capturable" in settings else 1e-8)


class Module(LightningModule):
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.network = network().float()
        self.settings = settings

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.network(x), y)

    def configure_optimizers(self) -> Optimizer:
        return AdamW(self.parameters(), **self.settings)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("settings", [{}, {"fused": True}], ids=["foreach", "fused"])
@pytest.mark.parametrize("rule", ["multiplicative", "auto"])
def test_a_trainer_on_a_gpu(precision: Any, settings: dict[str, Any], rule: Any, tmp_path: Any) -> None:
    torch.manual_seed(1)
    x = torch.randn(512, 20)
    data = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=32)
    ends = {}
    kinds: dict[str, Any] = {"mixed": precision, "full": "32-true"}
    for name, kind in kinds.items():
        callback = HypergradientDescent(rule)
        trainer = Trainer(
            accelerator="gpu", devices=1, precision=kind, callbacks=[callback], max_epochs=4, logger=False,
            default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(Module(copy.deepcopy(settings)), data)
        ends[name] = next(iter(callback.lrs.values()))[-1]
    assert 0 < ends["mixed"] < 1
    assert ends["mixed"] == pytest.approx(ends["full"], rel=0.5)
