"""What a user's own file does with the package. `.ci/run` checks it strictly, without the settings of the project."""

import torch
from lightning.pytorch import Trainer
from typing_extensions import assert_type

from lightning_hd import Auto, Context, HypergradientDescent, HypergradientLR, Observation, Rule


class Sign(Rule):
    """A rule of one's own."""

    def update(self, lr: float, seen: Observation, context: Context) -> float:
        return lr * (1.01 if seen.cosine > 0 else 0.99)


callback = HypergradientDescent(Auto(start="configured"), scope="group", max_lr=0.1, probe=None, cooldown=0.1)
trainer = Trainer(callbacks=[callback, HypergradientDescent(rule=Sign(), hypergrad_lr=None)])
assert_type(callback.engines, list[HypergradientLR])
assert_type(callback.lrs, dict[str, list[float]])

optimizer = torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=0.1)
hd = HypergradientLR(optimizer, "additive", hypergrad_lr=1e-3, total_steps=100)
hd.observe(torch.tensor(1.0))
assert_type(hd.lrs, list[float])
assert_type(hd.last, list[Observation | None])
assert_type(hd.stats.loss, float | None)
assert_type(hd.stats.backoffs, tuple[int, ...])
assert_type(hd.scheduled, bool)
later = torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=hd.suggestion())
again = torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=callback.suggestion())
assert_type(hd.suggestion(by_group=True), dict[str, float])
assert_type(callback.suggestion(by_group=True), dict[str, float])


def refused() -> None:
    """Each line has an error. mypy reports a comment that is not needed, so it reports a line without an error."""
    HypergradientDescent("adaptive")  # type: ignore[arg-type]
    HypergradientLR(optimizer, rule="adaptive")  # type: ignore[arg-type]
    HypergradientDescent("additive", 1e-3)  # type: ignore[call-arg]
    HypergradientLR(optimizer, "additive", 1e-3)  # type: ignore[call-arg]
    hd.scheduled = True  # type: ignore[misc]
    hd.stats.nonfinite_steps = 0  # type: ignore[misc]
