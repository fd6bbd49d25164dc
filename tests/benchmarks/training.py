"""One run: a plain training loop, and what is measured of it."""

import math
import time
from statistics import fmean

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from tests.benchmarks.problems import Problem
from tests.benchmarks.results import Outcome
from tests.benchmarks.tuners import Method


def train(problem: Problem, method: Method, base: str, rate: float, decay: float, steps: int) -> Outcome:
    """Train for that many steps, or until the loss is not finite."""
    network = problem.network
    tuning = method.start(network, base, rate, decay, steps)
    optimizer = tuning.optimizer
    scheduler = CosineAnnealingLR(optimizer, T_max=steps) if method.cosine else None
    switch_mode(optimizer, "train")
    losses: list[float] = []
    final_lr = math.nan
    begin = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = problem.train_loss()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            val_loss = math.nan if problem.val_loss is None else math.inf
            return Outcome(math.inf, val_loss, final_lr, time.perf_counter() - begin)
        loss.backward()
        tuning.observe(loss)
        optimizer.step()
        problem.project()
        final_lr = tuning.rate()
        tuning.after_step()
        if scheduler is not None:
            scheduler.step()
    seconds = time.perf_counter() - begin
    val_loss = math.nan
    if problem.val_loss is not None:
        switch_mode(optimizer, "eval")
        with torch.no_grad():
            val_loss = problem.val_loss(tuning.evaluated or network).item()
        val_loss = val_loss if math.isfinite(val_loss) else math.inf
    return Outcome(fmean(losses[-(steps // 8) :]), val_loss, final_lr, seconds)


def switch_mode(optimizer: torch.optim.Optimizer, mode: str) -> None:
    """Schedule-Free's optimizers hold one point for training and another for evaluation."""
    switch = getattr(optimizer, mode, None)
    if switch is not None:
        switch()
