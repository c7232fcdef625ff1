"""The rows of the paper's tables: the sum of logits of each, and the tables that contain it.

Members are named L (the large model), S_all (the small model before training), S_MT, S_srcMT and S_tgtMT (the experts).
"""

from dataclasses import dataclass

from decode.engine.expression import parse

MEMBERS = ("L", "S_all", "S_MT", "S_srcMT", "S_tgtMT")


@dataclass(frozen=True)
class Expression:
    """`combine` as `decode.collab --combine` reads it; `tables`: numbers of the paper's tables."""

    method: str
    combine: str
    tables: tuple[int, ...]

    @property
    def weights(self) -> dict[str, float]:
        """By member, in order of first mention."""
        return parse(self.combine, MEMBERS, all_used=False)


# In the order of the paper's Table 6. Tables 3 and 4 have the first large model only (the paper's 3B).
EXPRESSIONS = {
    "proxy": Expression("Proxy-tuning", "L + (S_MT - S_all)", (2, 3, 4, 6)),
    "proxy-src": Expression("Proxy-tuning, CPT on source text", "L + (S_srcMT - S_all)", (4, 6)),
    "proxy-tgt": Expression("Proxy-tuning, CPT on target text", "L + (S_tgtMT - S_all)", (4, 6)),
    "proxy-half": Expression("Proxy-tuning, both halved", "L + (0.5*S_srcMT + 0.5*S_tgtMT - S_all)", (6,)),
    "mt": Expression("one expert, no CPT", "L + S_MT", (6,)),
    "src": Expression("one expert, CPT on source text", "L + S_srcMT", (6,)),
    "tgt": Expression("one expert, CPT on target text", "L + S_tgtMT", (6,)),
    "half": Expression("Collab-MT, halved experts", "L + 0.5*S_srcMT + 0.5*S_tgtMT", (6,)),
    "collab": Expression("Collab-MT", "L + S_srcMT + S_tgtMT", (2, 3, 4, 6)),
}
ORIGINAL = Expression("Original", "L", (2, 3, 4, 6))
FINETUNING = Expression("Fine-tuning", "L", (2, 3, 4, 6))
# Fitted weights by kind of fit: the row's name, its label in tables, the members.
FITTED = {
    "likelihood": ("fitted", "likelihood", ("L", "S_srcMT", "S_tgtMT")),
    "all": ("fitted-all", "likelihood, all five", ("L", "S_srcMT", "S_tgtMT", "S_MT", "S_all")),
}
