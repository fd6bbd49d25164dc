"""The tables of the pages are those that follow from the results."""

import math
from pathlib import Path

import pytest

from tests.benchmarks import pages, tasks
from tests.benchmarks.results import MEASURES, Outcome, Run


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.name)
def test_the_tables_of_a_page_follow_from_the_results(page: Path) -> None:
    text = page.read_text("utf8")
    assert pages.filled(text, pages.Ratios(pages.RESULTS)) == text
    assert "| --- |" in text


def test_every_task_is_of_one_kind() -> None:
    named = " ".join(pages.KINDS.values()).split()
    assert sorted(named) == sorted(tasks.TASKS)


def test_results_are_medians_at_the_best_rate_and_tables_their_ratios(tmp_path: Path) -> None:
    runs = {}
    for method, rate, losses in [
        ("constant", 0.1, (3.0, 4.0, 8.0)),
        ("constant", 1.0, (5.0, 5.0, 5.0)),
        ("cosine", 0.1, (2.0, 2.0, 2.0)),
        ("cooldown", 0.1, (1.6, 1.6, 1.6)),
        (pages.TUNED, 1e-3, (1.0, 2.0, 9.0)),
    ]:
        for seed, loss in enumerate(losses):
            runs[Run("text", "SGD", method, rate, seed, 400)] = Outcome(loss, math.nan, rate, 1.0)
    pages.save(tmp_path / "results.csv", pages.figures(runs))
    ratios = pages.Ratios(tmp_path / "results.csv")
    assert ratios.cases == [("text", "SGD")]
    assert [ratios.one(("text", "SGD"), other) for other in ("constant", "cosine")] == [0.5, 1.0]
    assert math.isnan(ratios.one(("text", "SGD"), "constant", "val_loss"))
    assert "| 0.50 / 1.00 |" in pages.filled("<!-- table: quality --><!-- end of table -->", ratios)
    assert pages.kinds(ratios)[1] == ["**all but the digits**", "1", "0.50", "1.25", "1.00"]


def test_methods_that_were_not_run_again_keep_their_results(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    before = [
        pages.Figure("text", "SGD", method, measure, 0.1, loss, 3)
        for method, loss in [("constant", 2.0), (pages.TUNED, 1.0)]
        for measure in MEASURES
    ]
    pages.save(path, before)
    again = [pages.Figure("text", "SGD", pages.TUNED, "train_loss", 1e-3, 0.5, 3)]
    found = pages.updated(pages.read(path), again)
    assert set(found) == {*before[:2], *again}
