"""Who drafts, and how many tokens: exact speculation for any combination.

Several tokens of a row are checked in one pass of every member that has not drafted them: where reading weights is what
a pass costs, that is cheaper than a pass for each. The combined choice is made at every drafted position, and the
longest prefix on which it agrees with the draft is kept, with the choice behind it: the tokens are those of plain
decoding, whoever drafted. A draw is a function of (seed, sentence, position) and the logits, so that holds for sampling
as well: a draft is kept when it equals the draw.

Drafters are the members themselves, whose passes are needed anyway, and the text so far (`lookup`: what followed the
last occurrence of the last tokens, in the prompt or the output; names and numbers are copied in translation).

`auto` chooses by expected tokens a second, from agreement and times measured as decoding goes on. Agreement costs next
to nothing to watch while nothing is drafted; a pass with more positions is tried only when the draft would pay if it
cost no more than a plain one.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from minillama import InputError

LOOKUP = -1
# Stands for a member where the time of choosing is meant: summing logits is a cost of every position too.
CHOICE = -2
# Stands for a whole plain step that is one graph: nobody knows what its parts take.
STEP = -3
# Stands for a choice and the passes of all members side by side (decode/lanes.py).
TOGETHER = -4
# Tokens whose last occurrence is looked for, longest first.
LOOKUP_LENGTHS = (3, 2)
MOST_DRAFTED = 7
# `auto` drafts when it expects this much more than plain decoding.
MARGIN = 1.15
# Weight of the newest measurement in the running means.
NEWEST = 0.1
# Every so many plain steps the members' own choices are compared with the combined one.
WATCH_EVERY = 8
# Comparisons before an agreement is believed.
ENOUGH = 24


@dataclass(frozen=True)
class Draft:
    """Who drafts how many tokens at most: a member's number, or LOOKUP."""

    drafter: int
    length: int


@dataclass
class Tally:
    """How often a drafter's next token was the combined choice; kept tokens out of drafted ones."""

    rate: float = 0.0
    seen: int = 0
    drafted: int = 0
    kept: int = 0

    def add(self, agreed: int, of: int) -> None:
        if of:
            self.seen += of
            share = max(NEWEST * min(of, 4), of / self.seen)
            self.rate += (agreed / of - self.rate) * share


@dataclass
class Speculation:
    """The policy of one run: mode `off`, `auto`, or a fixed number of tokens.

    weights: bytes that a pass of each member reads; none: not known.
    """

    members: int
    mode: str | int = "off"
    weights: Sequence[float] = ()
    tallies: dict[int, Tally] = field(default_factory=dict)
    # seconds of a member's pass or of a choice, by the power of two at or above its positions
    seconds: dict[tuple[int, int], float] = field(default_factory=dict)
    steps: int = 0

    def __post_init__(self) -> None:
        self.mode = check_mode(self.mode)
        self.tallies = {drafter: Tally() for drafter in self.drafters}

    @property
    def drafters(self) -> list[int]:
        """One member's draft is its own whole choice: with a single member only the text so far can draft."""
        return [LOOKUP, *(range(self.members) if self.members > 1 else ())]

    def watches(self) -> bool:
        """Whether this plain step should compare the members' own choices with the combined one."""
        if self.mode == "off":
            return False
        return self.steps % WATCH_EVERY == 0 or any(tally.seen < ENOUGH for tally in self.tallies.values())

    def plan(self, rows: int) -> Draft | None:
        """What to draft for `rows` rows that decode; None for a plain step."""
        self.steps += 1
        if self.mode == "off" or not rows or any(tally.seen < ENOUGH for tally in self.tallies.values()):
            return None
        if isinstance(self.mode, int):
            return self._fixed(self.tallies, self.mode)
        best, plan = MARGIN, None
        for drafter in self.tallies:
            for length in (1, 2, 3, 5, MOST_DRAFTED):
                gain = self._gain(drafter, length, rows)
                if gain > best:
                    best, plan = gain, Draft(drafter, length)
        return plan

    def instead_of_lookup(self) -> Draft | None:
        """What to draft where the text so far has nothing to copy: under a fixed number of tokens the best member's."""
        if not isinstance(self.mode, int) or self.members == 1:
            return None
        return self._fixed(range(self.members), self.mode)

    def _fixed(self, drafters: Iterable[int], length: int) -> Draft:
        return Draft(max(drafters, key=lambda drafter: self._tokens_by_weights(drafter, length)), length)

    def _tokens(self, drafter: int, length: int) -> float:
        """Tokens that a step with this draft is expected to gain."""
        rate = self.tallies[drafter].rate
        return length + 1 if rate >= 1 else (1 - rate ** (length + 1)) / (1 - rate)

    def _tokens_by_weights(self, drafter: int, length: int) -> float:
        """Expected tokens for each reading of all weights: a fixed length is no matter of clocks."""
        own = 0.0 if drafter == LOOKUP or not self.weights else self.weights[drafter] / sum(self.weights)
        return self._tokens(drafter, length) / (1 + length * own)

    def _gain(self, drafter: int, length: int, rows: int) -> float:
        """Tokens a second with this draft over those without, by what is known now."""
        tokens = self._tokens(drafter, length)
        parts = [CHOICE, *range(self.members)]
        plain = self._pass(STEP, rows) or self._pass(TOGETHER, rows) or sum(self._pass(part, rows) for part in parts)
        drafting = 0.0
        if drafter != LOOKUP:
            drafting = (length + 1) * self._pass(drafter, rows) + length * self._pass(CHOICE, rows)
        checked = rows * (length + 1)
        checking = sum(self._pass(part, checked) for part in parts if part != drafter)
        if drafter == LOOKUP:
            checking = self._pass(TOGETHER, checked) or checking
        if not plain:
            return 0.0
        # Where no pass but the whole plain step was measured yet, a draft is how they are.
        return tokens * plain / (drafting + checking) if drafting + checking else math.inf

    def _pass(self, part: int, positions: int) -> float:
        """Seconds of a pass; one never measured is taken for as cheap as the next smaller one that was."""
        size = _size(positions)
        while size and (part, size) not in self.seconds:
            size //= 2
        return self.seconds.get((part, size), 0.0)

    def timed(self, part: int, positions: int, seconds: float) -> None:
        key = (part, _size(positions))
        before = self.seconds.get(key, seconds)
        # The least is what a pass costs; it is forgotten slowly, as texts grow longer.
        self.seconds[key] = min(seconds, before + NEWEST * (seconds - before))

    @staticmethod
    def name(drafter: int, members: Sequence[str]) -> str:
        return "lookup" if drafter == LOOKUP else members[drafter]

    def drafted(self, drafter: int, length: int, kept: int) -> None:
        """A row kept `kept` of `length` drafted tokens; those behind the first that differs say nothing."""
        tally = self.tallies[drafter]
        tally.drafted += length
        tally.kept += kept
        tally.add(kept, min(length, kept + 1))


def check_mode(mode: str | int) -> str | int:
    """`off`, `auto`, or a number of tokens, perhaps as text; raises InputError for anything else."""
    if mode in ("off", "auto"):
        return mode
    try:
        number = int(mode)
    except ValueError:
        raise InputError(f"speculate {mode}: expected auto, off or a number of tokens") from None
    if not 1 <= number <= MOST_DRAFTED:
        raise InputError(f"speculate {mode}: 1 to {MOST_DRAFTED} tokens can be drafted at a time")
    return number


def _size(positions: int) -> int:
    return 1 << (positions - 1).bit_length()


def lookup(context: Sequence[int], text: Sequence[int], length: int) -> list[int]:
    """Up to `length` tokens that followed the latest earlier occurrence of the end of `text` in context + text."""
    everything = [*context, *text]
    for width in LOOKUP_LENGTHS:
        if len(text) < width:
            continue
        end = everything[-width:]
        for start in range(len(everything) - width - 1, -1, -1):
            if everything[start : start + width] == end:
                return everything[start + width : start + width + length]
    return []
