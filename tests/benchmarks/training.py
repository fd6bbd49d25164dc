"""One run: a plain training loop, and what is measured of it."""

import math
import time
from statistics import fmean

import torch
from torch.optim import Optimizer

from tests.benchmarks.problems import Problem
from tests.benchmarks.results import Outcome
from tests.benchmarks.tuners import Method


def train(problem: Problem, method: Method, base: str, rate: float, decay: float, steps: int) -> Outcome:
    """Train for that many steps, or until the loss is not finite."""
    players = problem.players or [(problem.network, problem.train_loss)]
    tunings = [method.start(network, base, rate, decay, steps) for network, _ in players]
    schedulers = [method.schedule(tuning.optimizer, steps) for tuning in tunings if method.schedule]
    for tuning in tunings:
        switch_mode(tuning.optimizer, "train")
    losses: list[float] = []
    final_lr = math.nan
    begin = time.perf_counter()
    for _ in range(steps):
        for tuning, (_, train_loss) in zip(tunings, players, strict=True):
            tuning.optimizer.zero_grad()
            loss = train_loss()
            if not math.isfinite(loss.item()):
                val_loss = math.nan if problem.val_loss is None else math.inf
                return Outcome(math.inf, val_loss, final_lr, time.perf_counter() - begin)
            loss.backward()
            tuning.observe(loss)
            tuning.optimizer.step()
            problem.project()
            tuning.after_step()
        final_lr = tunings[0].rate()
        losses.append(problem.measure().item() if problem.measure else loss.item())
        for scheduler in schedulers:
            scheduler.step()
    seconds = time.perf_counter() - begin
    val_loss = math.nan
    if problem.val_loss is not None:
        switch_mode(tunings[0].optimizer, "eval")
        with torch.no_grad():
            val_loss = problem.val_loss(tunings[0].evaluated or problem.network).item()
        val_loss = val_loss if math.isfinite(val_loss) else math.inf
    return Outcome(fmean(losses[-(steps // 8) :]), val_loss, final_lr, seconds)


def switch_mode(optimizer: Optimizer, mode: str) -> None:
    """Schedule-Free's optimizers hold one point for training and another for evaluation."""
    switch = getattr(optimizer, mode, None)
    if switch is not None:
        switch()
