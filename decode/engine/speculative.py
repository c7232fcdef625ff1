"""Who drafts, and how many tokens: exact speculation for any combination.

Several tokens of a row are checked in one pass of every member that has not drafted them: where reading weights is what
a pass costs, that is cheaper than a pass for each. The combined choice is made at every drafted position, and the
longest prefix on which it agrees with the draft is kept, with the choice behind it: the tokens are those of plain
decoding, whoever drafted. A draw is a function of (seed, sentence, position) and the logits, so that holds for sampling
as well: a draft is kept when it equals the draw.

Drafters are the members themselves, whose passes are needed anyway, and the text so far (`lookup`: what followed the
last occurrence of the last tokens, in the prompt or the output; names and numbers are copied in translation).

`auto` chooses by expected tokens a second, from agreement and times measured as decoding goes on, and from how many
rows have something to copy just now. Agreement costs next to nothing to watch while nothing is drafted. A member that
drafts stops before a token that is less likely to be kept than it costs, by how sure the member is of it. Longer passes
are tried only when the draft would pay if their time grew as that of shorter ones does.
"""

import math
from collections.abc import Iterator, Sequence
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
# How many tokens `auto` considers, whatever they are.
LENGTHS = (1, 3)
# `auto` drafts when it expects this much more than plain decoding: of a lone row, and of several, whose drafts are of
# unequal length and beside which prompts are read, which takes longer than passes that were measured.
MARGIN, MARGIN_OF_ROWS = 1.1, 1.4
# Weight of the newest measurement in a pass's running mean.
NEWEST = 0.1
# What a comparison still counts after the next one: agreement is that of about the last hundred.
FADING = 0.99
# Every so many plain steps the members' own choices are compared with the combined one.
WATCH_EVERY = 16
# Comparisons before an agreement is believed.
ENOUGH = 12
# `auto` asks again so many steps after it found that a draft does not pay. With fewer than twice as many rows what they
# have to copy, and how sure a drafter is, changes faster: then after half as many steps as there are rows.
RESTING = 8
# Parts in which a drafter's own probabilities are told apart, and what of them all is taken for known of each.
SURENESSES = 8
PRIOR = 4
# Of those the least at which a draft of any length is considered to go on.
SURER = (4, 7)


@dataclass(frozen=True)
class Draft:
    """Who drafts how many tokens at most: a member's number, or LOOKUP.

    least: tokens that the time of one more drafted token would bring without it. That a draft is kept to its last token
    must be as likely, and with several rows their sum as much as `least` of each.
    """

    drafter: int
    length: int
    least: float = 0.0


@dataclass
class Agreement:
    """How often something was the combined choice, of late."""

    agreed: float = 0.0
    seen: float = 0.0

    @property
    def rate(self) -> float:
        return self.agreed / self.seen if self.seen else 0.0

    def add(self, agreed: float, of: int) -> None:
        fading = FADING**of
        self.agreed = self.agreed * fading + agreed
        self.seen = self.seen * fading + of


@dataclass
class Tally(Agreement):
    """A drafter's next token against the combined choice.

    by_sureness: the same by the probability that the drafter itself gave the token, from 0 to 1 in equal parts.
    shares: how many of late were of each part.
    """

    by_sureness: list[Agreement] = field(default_factory=lambda: [Agreement() for _ in range(SURENESSES)])
    shares: list[float] = field(default_factory=lambda: [0.0] * SURENESSES)

    @property
    def known(self) -> bool:
        return self.seen >= ENOUGH

    def add_sure(self, agreed: bool, sure: float) -> None:
        part = _part(sure)
        self.by_sureness[part].add(int(agreed), 1)
        self.shares = [share * FADING for share in self.shares]
        self.shares[part] += 1

    def chance(self, sure: float) -> float:
        """That a token with this probability is kept; where little was seen of such, nearer to what any has."""
        return self._chance(_part(sure))

    def sure_from(self, part: int) -> tuple[float, float]:
        """How likely a token is of this part or a surer one, and how likely it is so and kept."""
        seen = sum(self.shares)
        if not seen:  # nobody has asked how sure the drafter was
            return 1.0, self.rate
        surer = range(part, SURENESSES)
        kept = sum(self.shares[one] * self._chance(one) for one in surer)
        return sum(self.shares[one] for one in surer) / seen, kept / seen

    def _chance(self, part: int) -> float:
        alike = self.by_sureness[part]
        return (alike.agreed + PRIOR * self.rate) / (alike.seen + PRIOR)


@dataclass
class Speculation:
    """The policy of one run: mode `off`, `auto`, or a fixed number of tokens.

    weights: bytes that a pass of each member reads; none: not known.
    """

    members: int
    mode: str | int = "off"
    weights: Sequence[float] = ()
    tallies: dict[int, Tally] = field(default_factory=dict)
    # seconds of a member's pass or of a choice, by its positions, rounded up (`_size`)
    seconds: dict[tuple[int, int], float] = field(default_factory=dict)
    steps: int = 0
    # the step before which nobody asks again what to draft
    resting_until: int = 0

    def __post_init__(self) -> None:
        self.mode = check_mode(self.mode)
        self.tallies = {drafter: Tally() for drafter in (LOOKUP, *self.drafting_members)}

    def watches(self) -> bool:
        """Whether this plain step should compare the members' own choices with the combined one."""
        if self.mode == "off":
            return False
        return self.steps % WATCH_EVERY == 0 or any(not self.tallies[member].known for member in self.drafting_members)

    def plan(self, rows: int, copying: int = 0) -> Draft | None:
        """What to draft for `rows` rows that decode, of which `copying` have something to copy; None: a plain step."""
        if self.mode == "off" or not rows:
            return None
        known = [drafter for drafter in self.drafting_members if self.tallies[drafter].known]
        if copying and self.tallies[LOOKUP].known:
            known.append(LOOKUP)
        if not known:
            return None
        if isinstance(self.mode, int):
            length, share = self.mode, copying / rows
            return Draft(max(known, key=lambda drafter: self._tokens_by_weights(drafter, length, share)), length)
        return self._best(known, rows, copying)

    def rests(self) -> bool:
        """Whether this step is a plain one unasked: nothing is ever drafted, or a plain one was best a moment ago."""
        return self.mode == "off" or self.steps < self.resting_until

    def rest(self, rows: int) -> None:
        """A draft for so many rows does not pay just now, or came to nothing: that is so for a while."""
        known = all(self.tallies[member].known for member in self.drafting_members)
        if self.mode == "auto" and rows and known and self._plain(rows):
            self.resting_until = self.steps + min(RESTING, rows // 2)

    def copies(self) -> bool:
        """Whether this step should look for what could be copied."""
        return self.mode != "off" and not (self.rests() and self.tallies[LOOKUP].known)

    def _best(self, drafters: Sequence[int], rows: int, copying: int) -> Draft | None:
        """The draft that brings most tokens a second, by what is known now; None for a plain step."""
        plain = self._plain(rows)
        if not plain:
            return None
        most = self._longest(rows)
        gain, best = MARGIN if rows == 1 else MARGIN_OF_ROWS, None
        for drafter in drafters:
            by_lookup = drafter == LOOKUP
            expected = self._by_lookup(rows, copying, most) if by_lookup else self._by_member(drafter, rows, most)
            for length, tokens, seconds in expected:
                # Where no pass but the whole plain step was measured yet, a draft is how they are.
                found = tokens * plain / seconds if seconds else math.inf
                if found > gain:
                    gain, best = found, Draft(drafter, length)
        if best is None or best.drafter == LOOKUP or math.isinf(gain):
            return best
        return Draft(best.drafter, most, self._least(best.drafter, rows, gain))

    def _by_lookup(self, rows: int, copying: int, most: int) -> Iterator[tuple[int, float, float]]:
        """Lengths of drafts by copying; of each the tokens of a row and the seconds of a step."""
        for length in LENGTHS:
            if length <= most:
                tokens = 1 + (self._tokens(LOOKUP, length) - 1) * copying / rows
                yield length, tokens, self._checking(rows + copying * length)

    def _by_member(self, member: int, rows: int, most: int) -> Iterator[tuple[int, float, float]]:
        """Lengths of a member's drafts for each row; of each the tokens of a row and the seconds of a step.

        Drafts of the greatest length also end before a token of a part of its sureness below one of SURER.
        """
        own, choosing = self._pass(member, rows), self._pass(CHOICE, rows)
        for length, surer in [(length, 0) for length in LENGTHS if length <= most] + [(most, part) for part in SURER]:
            going, kept = self.tallies[member].sure_from(surer)
            # A pass of the drafter is made as long as one row goes on.
            passes = sum(1 - (1 - going**at) ** rows for at in range(1, length + 1))
            positions = round(rows * _series(going, length))
            others = sum(self._pass(part, positions) for part in (CHOICE, *range(self.members)) if part != member)
            yield length, _series(kept, length), others + own + passes * (own + choosing)

    @property
    def drafting_members(self) -> range:
        """A member's draft is its own whole choice: of a single one it would be the choice."""
        return range(self.members if self.members > 1 else 0)

    def _tokens(self, drafter: int, length: int) -> float:
        """Tokens that a step with this draft is expected to gain."""
        return _series(self.tallies[drafter].rate, length)

    def _tokens_by_weights(self, drafter: int, length: int, copying: float) -> float:
        """Expected tokens for each reading of all weights: a fixed length is no matter of clocks.

        copying: the share of rows with something to copy.
        """
        if drafter == LOOKUP:
            return 1 + (self._tokens(drafter, length) - 1) * copying
        own = self.weights[drafter] / sum(self.weights) if self.weights else 0.0
        return self._tokens(drafter, length) / (1 + length * own)

    def _least(self, drafter: int, rows: int, gain: float) -> float:
        """`Draft.least` where a draft brings `gain` times the tokens of a plain step."""
        others = [part for part in (CHOICE, *range(self.members)) if part != drafter]
        few, most = (sum(self._pass(part, rows * n) for part in others) for n in (2, MOST_DRAFTED + 1))
        checking = max(0.0, most - few) / (MOST_DRAFTED - 1)
        further = self._pass(drafter, rows) + self._pass(CHOICE, rows) + checking
        return min(gain * further / self._plain(rows), 1.0)

    def _plain(self, rows: int) -> float:
        """Seconds of a plain step."""
        return self._pass(STEP, rows) or self._checking(rows)

    def _checking(self, positions: int) -> float:
        """Seconds of all members' passes and a choice."""
        every = (self._pass(part, positions) for part in (CHOICE, *range(self.members)))
        return self._pass(TOGETHER, positions) or sum(every)

    def _pass(self, part: int, positions: int) -> float:
        """Seconds of a pass; one never measured by how those of fewer positions grow, 0 where there are none."""
        size = _size(positions)
        if (part, size) in self.seconds:
            return self.seconds[part, size]
        measured = sorted(smaller for of, smaller in self.seconds if of == part and smaller < size)[-2:]
        if not measured:
            return 0.0
        least, most = measured[0], measured[-1]
        rise = self.seconds[part, most] - self.seconds[part, least]
        return self.seconds[part, most] + (max(0.0, rise) / (most - least) * (size - most) if rise else 0.0)

    def _longest(self, rows: int) -> int:
        """Tokens that may be drafted for so many rows: passes grow by no more than twice what was measured already."""
        most = 2 * max((size for _, size in self.seconds), default=1)
        return min(MOST_DRAFTED, max(1, most // rows - 1))

    def timed(self, part: int, positions: int, seconds: float) -> None:
        key = (part, _size(positions))
        before = self.seconds.get(key, seconds)
        # The least is what a pass costs; it is forgotten slowly, as texts grow longer.
        self.seconds[key] = min(seconds, before + NEWEST * (seconds - before))

    @staticmethod
    def name(drafter: int, members: Sequence[str]) -> str:
        return "lookup" if drafter == LOOKUP else members[drafter]

    def compared(self, drafter: int, agreed: Sequence[bool], sureness: Sequence[float] = ()) -> None:
        """Whether each of a row's next tokens was what the drafter would write, up to the first that was not.

        sureness: the drafter's own probability of each, where it has any.
        """
        tally = self.tallies[drafter]
        tally.add(sum(agreed), len(agreed))
        for same, sure in zip(agreed, sureness):
            tally.add_sure(same, sure)


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


def _series(rate: float, length: int) -> float:
    """One and how many of `length` are reached when each is as likely as `rate`, once those before it are reached."""
    return sum(rate**at for at in range(length + 1))


def _part(sure: float) -> int:
    return min(int(sure * SURENESSES), SURENESSES - 1)


def _size(positions: int) -> int:
    """The next number at or above that is a power of two or one and a half of them."""
    power = 1 << (positions - 1).bit_length()
    return power * 3 // 4 if positions <= power * 3 // 4 else power


class Copies:
    """What followed the latest earlier occurrence of the last tokens, in a prompt and what was written behind it."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._written = 0
        self._behind: dict[tuple[int, ...], int] = {}  # where what followed some tokens begins
        self._append(prompt)

    def next(self, written: Sequence[int], length: int) -> list[int]:
        """Up to `length` tokens to go on with; `written` has grown since the last call, or is as it was."""
        self._append(written[self._written :])
        self._written = len(written)
        for width in LOOKUP_LENGTHS:
            start = self._behind.get(tuple(self._tokens[-width:])) if len(written) >= width else None
            if start is not None:
                return self._tokens[start : start + length]
        return []

    def _append(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            end = len(self._tokens)
            for width in LOOKUP_LENGTHS:
                if end >= width:
                    self._behind[tuple(self._tokens[end - width :])] = end
            self._tokens.append(token)
