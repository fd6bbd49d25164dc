"""The numbers of the rule "auto" beside those of its parts."""

from dataclasses import dataclass

from lightning_hd.checks import not_negative


@dataclass
class Learned:
    """The numbers that the rule itself holds, beside those of its parts."""

    first_lr: float = not_negative()  # α_1; 0 where it is the configured one
    lr: float = 0.0  # γ_{t-1}
    gap: float = 0.0  # log γ_t - L_t
    moves: float = not_negative()  # the sum of the weights of the moves in E
    fresh: bool = False  # whether the memory starts anew
    anew: bool = False  # whether it has done so because all parameters were new, and is still short
    cosine: float = 0.0  # c_t
    squares: float = not_negative()  # S_t
    norm: float = not_negative()  # G, before the correction for its start at 0
    norm_weight: float = not_negative()  # the square of that correction
    largest_norm: float = not_negative()
    peak: float = not_negative()  # the highest α_t so far
    fallen: float = not_negative()  # how far log α has fallen beyond the cap, and has not risen beyond it since
    turns: int = 0  # how many cosines of two gradients in a row were seen, 20 at most
    turn: float = 0.0  # their running mean
