"""The benchmark's own arithmetic: what is known in closed form, the ratios of the tables, and going on after a kill."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.benchmarks import learning_quality, quadratic, table
from tests.benchmarks.learning_quality import complete
from tests.benchmarks.plan import Settings, plan
from tests.benchmarks.results import Outcome, Run, load
from tests.benchmarks.tuners import grid_rate

SETTINGS = Settings(["quadratic"], ["SGD"], ["constant"], seeds=1)


def outcome(loss: float) -> Outcome:
    return Outcome(loss, math.nan, 0.0, 0.0)


@pytest.mark.parametrize("rate", [0.003, 0.15])
def test_the_closed_form_of_the_quadratic(rate: float) -> None:
    steps, copies = 64, 800
    random = np.random.default_rng(0)
    curvature = np.logspace(-3, 1, 200)
    start = random.normal(size=200)
    x = np.tile(start, (copies, 1))
    losses = []
    for _ in range(steps):
        losses.append((0.5 * curvature * x**2).sum(1).mean())
        x -= rate * (curvature * x + 0.1 * np.sqrt(curvature) * random.normal(size=x.shape))
    simulated = np.mean(losses[-steps // 8 :])
    assert quadratic.expected_loss(rate, start, steps) == pytest.approx(simulated, rel=0.01)


def test_the_best_rate_of_the_quadratic_is_better_than_all_others() -> None:
    rate, loss = quadratic.best_constant([0], steps=2000)
    start = quadratic.first_point(0)
    assert quadratic.expected_loss(rate, start, 2000) == pytest.approx(loss)
    others = [quadratic.expected_loss(float(other), start, 2000) for other in np.geomspace(1e-4, 0.199, 300)]
    assert loss <= min(others)


def test_the_gradient_of_the_quadratic_is_noisy_and_its_loss_is_not() -> None:
    problem = quadratic.Quadratic(quadratic.sampler(0))
    grads, losses = [], []
    for _ in range(2000):
        problem.zero_grad()
        loss = problem()
        loss.backward()
        assert problem.point.grad is not None
        grads.append(problem.point.grad.clone())
        losses.append(loss.item())
    noise = torch.stack(grads) - problem.curvature * problem.point.detach()
    assert max(losses) == min(losses)
    torch.testing.assert_close(noise.var(0), 0.01 * problem.curvature, rtol=0.2, atol=0)
    assert (noise.mean(0) / (noise.std(0) / math.sqrt(2000))).abs().max() < 5


CSV = """\
task,optimizer,method,rate,seed,steps,train_loss,val_loss,final_lr,seconds
text,Adam,constant,0.001,0,400,4.0,3.0,0.001,1.0
text,Adam,constant,0.001,1,400,2.0,9.0,0.001,1.0
text,Adam,constant,0.001,2,400,1.0,5.0,0.001,1.0
text,Adam,constant,0.01,0,400,inf,inf,0.01,1.0
text,Adam,cosine,0.001,0,400,1.0,4.0,0.0,1.0
text,Adam,auto,0.001,0,400,3.0,5.0,0.02,1.0
text,Adam,auto,0.0,0,400,3.0,5.0,0.02,1.0
text,Adam,auto,1000.0,0,400,3.0000000000000004,5.0,0.02,1.0
text,Adam,auto+cosine,0.001,0,400,1.5,4.0,0.02,1.0
text,Adam,additive,1e-05,0,400,8.0,5.0,0.02,1.0
text,Adam,additive,0.001,0,400,3.0,5.0,0.02,1.0
text,Adam,additive,0.1,0,400,7.0,5.0,0.02,1.0
text,Adam,multiplicative,0.001,0,400,5.0,5.0,0.02,1.0
text,Adam,multiplicative,0.1,0,400,inf,inf,0.02,1.0
text,Adam,prodigy,1.0,0,400,6.0,10.0,0.02,1.0
tanh,Adam,constant,0.001,0,1000,1.0,1.0,0.001,1.0
tanh,Adam,auto,0.001,0,1000,6.0,2.0,0.02,1.0
tanh,Adam,prodigy,1.0,0,1000,inf,inf,nan,1.0
"""


def test_the_ratios_of_the_tables(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(CSV)
    results = load(path)
    text, tanh = table.rows(results, "train_loss", "auto")
    assert (text.constant, text.cosine, tanh.constant) == ((0.001, 2.0), (0.001, 1.0), (0.001, 1.0))
    found = {column: ratio for column, ratio in text.ratios.items() if not math.isnan(ratio)}
    assert found == {
        "auto / const": 1.5,
        "auto / cos": 3.0,
        "auto+cos / cos": 1.5,
        "spread const": 4.0,
        "spread auto": 1.0,
        "paper": 1.5,
        "paper, worst": 4.0,
        "Prodigy": 3.0,
    }
    assert table.mean_ratio([row.ratios["auto / const"] for row in (text, tanh)]) == pytest.approx((3.0, 0))
    assert table.mean_ratio([row.ratios["Prodigy"] for row in (text, tanh)]) == pytest.approx((3.0, 1))
    assert table.duels(results, "auto")["auto / prodigy"] == (0.5, 1)
    assert table.sensitive(results, "auto") == (1, 2)
    val, _ = table.rows(results, "val_loss", "auto")
    assert (val.constant, val.ratios["Prodigy"]) == ((0.001, 5.0), 2.0)
    lines = table.report(results, "auto").splitlines()
    assert sum(line.startswith("| geometric mean") for line in lines) == 2
    assert "- diverged: constant 1 of 5, multiplicative 1 of 2, prodigy 1 of 2" in lines


def finish(path: Path, runs: list[Run], best: float) -> Sequence[Run]:
    """Complete the benchmark with runs whose loss is lowest at the rate ``best``."""

    def work(run: Run) -> Outcome:
        runs.append(run)
        return outcome(abs(math.log(run.rate / best)))

    with ThreadPoolExecutor(1) as pool:
        results, failed = complete(SETTINGS, path, pool, 1, work)
    assert not failed
    assert load(path) == results or math.isnan(next(iter(results.values())).val_loss)
    return list(results)


def test_a_finished_run_is_not_made_again_and_a_cut_off_line_is(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    made: list[Run] = []
    everything = finish(path, made, best=0.1)
    assert sorted(made) == sorted(everything) == sorted(plan(SETTINGS, {}))
    again: list[Run] = []
    assert sorted(finish(path, again, best=0.1)) == sorted(everything)
    assert again == []

    path.write_text(path.read_text()[:-2])  # as a kill would leave it: the last line still looks whole
    finish(path, again, best=0.1)
    assert again == [made[-1]]
    assert sorted(load(path)) == sorted(everything)

    path.write_text(path.read_text()[:10])
    again.clear()
    finish(path, again, best=0.1)
    assert sorted(again) == sorted(everything)


@pytest.mark.parametrize(("best", "lowest", "highest"), [(100.0, -5, 5), (1e-4, -9, 1)])
def test_a_grid_whose_best_is_at_its_edge_is_extended(tmp_path: Path, best: float, lowest: int, highest: int) -> None:
    made: list[Run] = []
    finish(tmp_path / "runs.csv", made, best)
    assert sorted(run.rate for run in made) == sorted(grid_rate(index) for index in range(lowest, highest + 1))


def test_an_error_ends_one_run_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def work(run: Run) -> Outcome:
        if run.rate == grid_rate(0):
            raise ArithmeticError("no")
        return outcome(1.0)

    with ThreadPoolExecutor(1) as pool:
        results, failed = complete(SETTINGS, tmp_path / "runs.csv", pool, 1, work)
    assert [run.rate for run in failed] == [1.0]
    assert len(results) == len(plan(SETTINGS, {})) - 1
    assert "no" in capsys.readouterr().err


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        learning_quality.main(["--rule", "multiplicative", "--tasks", "tanh,what"])
    assert "--tasks: 'what' is none of digits-16" in capsys.readouterr().err
