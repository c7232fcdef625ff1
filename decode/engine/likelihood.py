"""Forced decoding: log-probabilities of given texts. Prompt and text are read, and nothing is generated.

The probability of a text is that of its tokens and of its end: that any stop token of the ensemble follows. Logits of
a few positions exist at a time; the hidden states of one step are the most that is held. A text's result has the same
bits whatever it is scored beside.
"""

# R positions  G tokens whose log-probability is requested at each  N members  D model width

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from decode.engine.model_runner import ModelRunner, SlotInput
from kernels import describe_flag, fused_logits

# Positions whose logits exist at once: 16 MB a member with a vocabulary of 128,256.
ROWS_AT_ONCE = 32
END = -1  # among targets: any stop token


def score_targets(runner: ModelRunner, inputs: SequenceOf[SlotInput], hidden: SequenceOf[Tensor | None]) -> None:
    """Score the positions that this step has read of sequences with targets; finish those that are at their end.

    hidden: of these inputs alone, as `ModelRunner.forward` returns it.
    """
    for member, hidden_RD in enumerate(hidden):
        read = [entry for entry in inputs if entry.tokens[member]]
        if hidden_RD is not None:
            for entry, piece_RD in zip(read, hidden_RD.split([entry.num_logits for entry in read])):
                if entry.num_logits and entry.sequence.keep_hidden:
                    entry.sequence.hidden[member].append(piece_RD.clone())
    rows = [entry for entry in inputs for _ in range(entry.num_logits)]
    offsets = [0] * len(hidden)
    for first in range(0, len(rows), ROWS_AT_ONCE):
        block = rows[first : first + ROWS_AT_ONCE]
        counts = [sum(1 for entry in block if entry.tokens[member]) for member in range(len(hidden))]
        of_block = [h[at : at + n] if h is not None and n else None for h, at, n in zip(hidden, offsets, counts)]
        offsets = [at + count for at, count in zip(offsets, counts)]
        if not all(entry.sequence.keep_hidden for entry in block):
            _score_block(runner, block, of_block)
    for entry in inputs:
        sequence = entry.sequence
        if not sequence.reads_prompt and sequence.finish_reason is None:
            sequence.finish_reason = "stop" if sequence.stops else "length"


def _score_block(runner: ModelRunner, rows: SequenceOf[SlotInput], hidden: SequenceOf[Tensor | None]) -> None:
    """The log-probability of each row's next target, and under each member's own distribution."""
    sequences = [entry.sequence for entry in rows]
    most_stops = max(len(sequence.stops) for sequence in sequences)
    requested: list[list[int]] = []
    seen: Counter[int] = Counter()  # rows of each sequence in this block
    for sequence in sequences:
        assert sequence.targets is not None
        at = len(sequence.logprobs) + seen[sequence.id]
        seen[sequence.id] += 1
        token = sequence.targets[at] if at < len(sequence.targets) else END
        own_stops = sorted(sequence.stops)
        requested.append([token, *own_stops, *[END] * (most_stops - len(own_stops))])
    target_RG = torch.tensor(requested, device=runner.device)
    logits = runner.all_logits(hidden, rows)
    result = fused_logits(logits, runner.weights(sequences), targets=target_RG, members=True)
    assert result.target_logprob is not None
    assert result.member_target_logprob is not None
    combined = _token_or_end(result.target_logprob.cpu(), requested)
    members = [_token_or_end(own_RG, requested) for own_RG in result.member_target_logprob.cpu()]
    for sequence, flag, logprob, *own in zip(sequences, result.flag.tolist(), combined, *members):
        if flag:
            sequence.finish_reason, sequence.error = "error", describe_flag(flag, runner.ensemble.names)
        sequence.logprobs.append(logprob)
        for values, value in zip(sequence.member_logprobs, own):
            values.append(value)


def _token_or_end(logprob_RG: Tensor, requested: SequenceOf[SequenceOf[int]]) -> list[float]:
    """The first column, or where that is END the log-probability that any of the other tokens follows, in float64."""
    of_token_R = logprob_RG[:, 0].double()
    ends_R = torch.tensor([tokens[0] == END for tokens in requested])
    if not ends_R.any():
        return of_token_R.tolist()
    padding_RG = torch.tensor([[token == END for token in tokens[1:]] for tokens in requested])
    of_end_R = logprob_RG[:, 1:].double().masked_fill(padding_RG, -torch.inf).logsumexp(dim=1)
    return torch.where(ends_R, of_end_R, of_token_R).tolist()
