"""Greedy decoding, sampling or beam search, as the options say: one stream of translations for all of them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from decode.engine import beam
from decode.draws import Draws
from decode.engine.ensemble import Ensemble
from decode.pipeline.members import Options
from decode.translate import Counters, Translation, decode


def search(
    ensemble: Ensemble,
    prompts: Sequence[tuple[list[int], ...]],
    lines: Sequence[int],
    options: Options,
    max_new_tokens: int,
    batch_size: int,
    counters: Counters,
) -> Iterator[tuple[int, Translation]]:
    """Yield (index of the prompt, translation) as sentences end.

    lines: the prompts' lines in the whole input. Draws hang on them and the seed: a line gets the same ones however the
    input is cut into groups. batch_size: rows, of which beam search needs several for a sentence.
    """
    stops = ensemble.stop_tokens
    if options.beam == 1 and not options.nbest:
        draws = None
        if options.sample:
            draws = Draws(options.seed, options.temperature, options.top_k, options.top_p, lines)
        how = options.speculate, draws, options.explain
        yield from decode(ensemble, prompts, max_new_tokens, batch_size, stops, counters, *how)
        return
    rules = beam.Rules(options.beam, options.length_penalty, stops, options.explain)
    for index, found in beam.search(ensemble, prompts, max_new_tokens, batch_size, rules, counters):
        best = found[0]
        translation = Translation(best.tokens, best.logprobs[: len(best.tokens)], best.finished)
        yield index, replace(translation, nbest=found[: options.nbest], explanations=best.explanations)
