"""Members must share one vocabulary: the same id has to be the same piece of text for all of them."""

from collections.abc import Mapping

from minillama import InputError, Tokenizer

SHOWN = 5


def check_shared(tokenizers: Mapping[str, Tokenizer]) -> None:
    """Compare every tokenizer's table with the first; raises InputError naming the entries that differ."""
    (first_name, first), *others = tokenizers.items()
    for name, tokenizer in others:
        differences = first.differences(tokenizer)
        if differences:
            more = f" and {len(differences) - SHOWN:,} more" if len(differences) > SHOWN else ""
            raise InputError(
                f"{first_name} ({len(first):,} entries) and {name} ({len(tokenizer):,}) do not share one vocabulary: "
                f"{len(differences):,} ids differ, {'; '.join(differences[:SHOWN])}{more}; members need the same table"
            )
