"""Rules, and the names by which they are chosen."""

from typing import Literal, TypeAlias

from lightning_hd.rules.auto import Auto
from lightning_hd.rules.base import Context, Observation, Rule
from lightning_hd.rules.paper import PAPER_RULES, Additive, Multiplicative, inverse_square

__all__ = [
    "Additive",
    "Auto",
    "Context",
    "Multiplicative",
    "Observation",
    "Rule",
    "RuleName",
    "inverse_square",
    "make_rule",
    "rule_name",
]

RuleName: TypeAlias = Literal["auto", "additive", "multiplicative"]
"""The names of the rules."""


def rule_name(class_name: str) -> str:
    """The name by which a rule is chosen: ``"auto"`` for example, or the class name of a rule of the user's own."""
    names = {"Auto": "auto"} | {rule.__name__: name for name, rule in PAPER_RULES.items()}
    return names.get(class_name, class_name)


def make_rule(rule: Rule | str, hypergrad_lr: float | None) -> Rule:
    """The rule for the arguments ``rule`` and ``hypergrad_lr`` of the public classes.

    Raises:
        TypeError: ``rule`` is neither a name nor a ``Rule``.
        ValueError: No rule has that name, or the rule takes no ``hypergrad_lr``.
    """
    if isinstance(rule, Rule):
        if hypergrad_lr is not None:
            raise ValueError(
                f"hypergrad_lr={hypergrad_lr} beside a rule object has no effect: give it to the {type(rule).__name__} "
                "itself"
            )
        return rule
    names = ["auto", *PAPER_RULES]
    if not isinstance(rule, str):
        meant = f"; did you mean {rule.__name__}()?" if isinstance(rule, type) and issubclass(rule, Rule) else ""
        raise TypeError(f"rule must be one of {names} or a Rule object, got {rule!r}{meant}")
    if rule not in names:
        meant = f"; did you mean {rule.lower()!r}?" if rule.lower() in names else ""
        raise ValueError(f"rule must be one of {names} or a Rule object, got {rule!r}{meant}")
    if rule in PAPER_RULES:
        return PAPER_RULES[rule](hypergrad_lr=hypergrad_lr)
    if hypergrad_lr is not None:
        raise ValueError(
            f"hypergrad_lr={hypergrad_lr} has no effect on rule='auto', which has nothing to tune: leave it out, or "
            "choose rule='additive' or rule='multiplicative'"
        )
    return Auto()
