"""Saves and loads the state of the tuning of one optimizer, and checks what is loaded."""

from typing import Any

from lightning_hd.checks import check_count
from lightning_hd.engine.loss import Losses
from lightning_hd.engine.step import Tuning
from lightning_hd.rules import rule_name

_COUNTS = ("step_count", "nonfinite_steps")


def save(tuning: Tuning) -> dict[str, Any]:
    """The state: plain numbers, and what the view remembers."""
    return {
        "optimizer": type(tuning.optimizer).__name__,
        "rule": type(tuning.rule).__name__,
        "scope": tuning.rates.kind,
        **{name: getattr(tuning, name) for name in _COUNTS},
        "rates": tuning.rates.state_dict(),
        "view": tuning.view.state_dict(),
        "losses": tuning.losses.state_dict(),
    }


def _is_former(state_dict: dict[str, Any]) -> bool:
    """Whether a state is of a version before this one."""
    if "last" in state_dict and "view" not in state_dict:
        return True
    view = state_dict.get("view")
    if isinstance(view, dict) and "mean" in view:
        return True
    rates = state_dict.get("rates")
    scopes = rates.get("scopes") if isinstance(rates, dict) else None
    return isinstance(scopes, list) and any(isinstance(s, dict) and s and "trajectory" not in s for s in scopes)


def load(tuning: Tuning, state_dict: dict[str, Any], loaded: bool) -> None:
    """Load what ``save`` returned. If that fails, the tuning stays as it was.

    Args:
        tuning: The tuning.
        state_dict: The state.
        loaded: Whether the optimizer has loaded its state already. Then the rates that it holds stay. Otherwise only
            rates stay that were written.

    Raises:
        ValueError: The state is of another optimizer class, rule, scope or layout of parameter groups, of a former
            version, or damaged.
    """
    keep = [loaded or written for written in tuning.rates.written()]
    tuning.rates.sync()
    keep += [loaded] * (len(tuning.optimizer.param_groups) - len(keep))
    own = save(tuning)
    if isinstance(state_dict, dict) and _is_former(state_dict):
        raise ValueError("the saved state is of a former version of lightning-hd")
    if not isinstance(state_dict, dict) or not own.keys() <= state_dict.keys():
        raise ValueError("the state is not what HypergradientLR.state_dict() returned")
    for key in ("optimizer", "rule", "scope"):
        if state_dict[key] != own[key]:
            saved, now = (rule_name(d[key]) if key == "rule" else d[key] for d in (state_dict, own))
            raise ValueError(f"the saved state has {key}={saved!r}, now it is {now!r}")
    try:
        groups = state_dict["rates"]["groups"]
        if isinstance(groups, list) and len(groups) != len(own["rates"]["groups"]):
            raise ValueError(
                f"the saved state has {len(groups)} parameter groups, the optimizer {len(own['rates']['groups'])}"
            )
        Losses().load_state_dict(state_dict["losses"])  # raises before anything is changed
        counts = {name: check_count(name, state_dict[name]) for name in _COUNTS}
        scheduled = tuning.rates.under_schedule
        tuning.view.load_state_dict(state_dict["view"])
        tuning.rates.load_state_dict(state_dict["rates"], keep)  # the last that can fail; it changes all or nothing
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        tuning.view.load_state_dict(own["view"])
        raise ValueError(f"the saved state is damaged, or of other parameter groups: {error!r}") from error
    tuning.lost_schedule = scheduled and not tuning.rates.under_schedule
    tuning.losses.load_state_dict(state_dict["losses"])
    vars(tuning).update(counts)
