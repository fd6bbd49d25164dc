"""The pace of the rule "auto": how many steps apart looks may be."""

_SETTLED = 500
"""So many steps are all looked at. With looks further apart in these, a GAN diverged."""

_APART, _SPARSEST = 125, 8
"""After each so many steps of a run, looks are one step further apart, up to the largest distance. A memory of 450
steps still holds 56 looks."""

_CALM = 60
"""The same after each so many steps without an event. With a third of it, leaps that came again were seen too late, and
the loss of a differential equation ended far higher."""


def stride(step: int, calm: int, moves: bool) -> int:
    """1, 2, 4 or 8 steps: the longer the run, whose memories grow with it, and the longer nothing has happened.

    The step before a look is noted, so cosines are those of single steps however far apart looks are.

    Args:
        step: The number of the step.
        calm: How many steps there were since the last event: a leap of the gradient, for example.
        moves: Whether the rate is far from its mean in the memory.
    """
    if moves or step < _SETTLED:
        return 1
    return 1 << max(min(step // _APART, calm // _CALM, _SPARSEST).bit_length() - 1, 0)
