"""Random requests and what float64 says about them: shared by the tests of the fused kernels.

A case is a small description (shape, dtypes, strides, weights, corner case) and a seed; the tensors follow from it.
The comparison allows what DESIGN.md allows: 1e-5 plus a few float32 roundings of max_v sum_i |w_i logits_i|.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st

from kernels import reference
from kernels.types import FusedLogits, Request

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CORNERS = ("none", "ties", "mask one member", "mask all members", "mask a row", "nan", "+inf", "3e38", "equal rows")
FEW_ROUNDINGS = 4 * 2.0**-23
# What takes the interpreter long: dozens of launches, of which each runs program after program.
SLOW_INTERPRETED = pytest.param("triton", marks=pytest.mark.gpu if torch.cuda.is_available() else pytest.mark.slow)
BOTH_PATHS = pytest.mark.parametrize("path", ["cpu", SLOW_INTERPRETED], indirect=True)


def device(path: str) -> str:
    return "cuda" if path == "triton" and torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    batch: int
    vocabulary: int
    dtypes: tuple[torch.dtype, ...]
    padding: tuple[int, ...]
    weights: tuple[float, ...]
    weights_per_row: bool
    some_left_out: bool
    corner: str
    spread: float
    seed: int

    def request(self, where: str, **requested) -> Request:
        generator = torch.Generator().manual_seed(self.seed)
        logits = []
        for padding in self.padding:
            wide = torch.randn(self.batch, self.vocabulary + padding, generator=generator) * self.spread
            if self.corner in ("ties", "equal rows"):
                wide = wide.div(2).round().clamp(-4, 4) / 2  # quarters: sums are exact, so equal is equal on every path
            logits.append(wide)
        members = len(logits)
        number = int(torch.randint(members, (), generator=generator))
        row = int(torch.randint(self.batch, (), generator=generator))
        entries = torch.randint(self.vocabulary, (max(1, self.vocabulary // 3),), generator=generator)
        if self.corner == "equal rows":
            for wide in logits:
                wide[row] = 0.25
        elif self.corner == "mask one member":
            logits[number][:, entries] = -torch.inf
        elif self.corner == "mask all members":
            for wide in logits:
                wide[:, entries] = -torch.inf
        elif self.corner == "mask a row":
            logits[number][row] = -torch.inf
        elif self.corner == "nan":
            logits[number][row, entries[0]] = torch.nan
        elif self.corner == "+inf":
            logits[number][row, entries[0]] = torch.inf
        weights = torch.tensor(self.weights)
        if self.weights_per_row:
            weights = weights[:, None] * torch.tensor([1.0, -0.5, 2.0]).repeat(self.batch)[: self.batch]
        placed = []
        for dtype, wide in zip(self.dtypes, logits, strict=True):
            narrow = wide.to(dtype)
            if self.corner == "3e38" and dtype != torch.float16:
                narrow[row, entries[0]] = 3e38 if self.seed % 2 else -3e38
            placed.append(narrow.to(where)[:, : self.vocabulary])
        if self.some_left_out and members > 1:
            weights = weights if self.weights_per_row else weights[:, None].repeat(1, self.batch)
            left_out_NB = torch.rand(members, self.batch, generator=generator) < 0.4
            left_out_NB[int(torch.randint(members, (), generator=generator))] = False
            weights = weights.masked_fill(left_out_NB, 0.0)
            for logits_BV, left_out_B in zip(placed, left_out_NB, strict=True):
                logits_BV[left_out_B.to(where)] = (torch.nan, torch.inf, -torch.inf)[self.seed % 3]
        requested = {k: value.to(where) if isinstance(value, torch.Tensor) else value for k, value in requested.items()}
        return Request(tuple(placed), weights.to(where), **requested)


@st.composite
def cases(draw, vocabularies=(1, 2, 7, 63, 64, 65, 130, 1000, 4095, 4096, 4097, 8200)) -> Case:
    members = draw(st.integers(1, 4))
    several = {"min_size": members, "max_size": members}
    corner = draw(st.sampled_from(CORNERS))
    exact = draw(st.booleans()) or corner in ("ties", "equal rows")
    sizes = (1.0, -1.0, 0.5, -2.0) if exact else (1.0, -1.0, 0.3, -1.7, 1e-4, 1e4, -1e4)
    return Case(
        batch=draw(st.integers(1, 4)),
        vocabulary=draw(st.sampled_from(vocabularies)),
        dtypes=tuple(draw(st.lists(st.sampled_from(DTYPES), **several))),
        padding=tuple(draw(st.lists(st.sampled_from((0, 0, 1, 16, 5)), **several))),
        weights=tuple(draw(st.lists(st.sampled_from(sizes), **several))),
        weights_per_row=draw(st.booleans()),
        some_left_out=draw(st.booleans()),
        corner=corner,
        spread=draw(st.sampled_from((0.0, 1.0, 5.0, 30.0))),
        seed=draw(st.integers(0, 10**6)),
    )


def tolerance_R(request: Request) -> torch.Tensor:
    """The allowed difference of a log-probability, row by row, float64."""
    sizes_RV = sum(
        torch.where(w_R[:, None] == 0, 0.0, (w_R.double()[:, None] * l_RV.double()).nan_to_num(0.0, 0.0, 0.0).abs())
        for w_R, l_RV in zip(request.weights_NB, request.logits, strict=True)
    )
    return 1e-5 + FEW_ROUNDINGS * sizes_RV.amax(dim=1)


def assert_means_the_same(request: Request, result: FusedLogits) -> None:
    """Every result that is there against the definition in float64."""
    truth = reference.fused_logits(request, torch.float64)
    x_RV, flag_R = reference.combine(request, torch.float64)
    assert torch.equal(result.flag, flag_R)
    fine_R = flag_R == 0
    assert (result.token[~fine_R] == -1).all()
    assert result.logprob[~fine_R].isnan().all()
    if not fine_R.any():
        return
    allowed_R = tolerance_R(request)[fine_R]
    logprob_RV = torch.log_softmax(x_RV[fine_R], dim=1)
    token_R = result.token[fine_R]
    best_R = logprob_RV.amax(dim=1)
    reached_R = logprob_RV.gather(1, token_R[:, None])[:, 0]
    assert (best_R - reached_R <= allowed_R).all()
    assert ((result.logprob[fine_R] - best_R).abs() <= allowed_R).all()
    # where nothing else comes within the tolerance, and in exact ties, it is the very same token
    near_R = (logprob_RV >= best_R[:, None] - allowed_R[:, None]).sum(dim=1)
    exact_R = (logprob_RV == best_R[:, None]).sum(dim=1)
    decided_R = near_R == exact_R
    assert torch.equal(token_R[decided_R], truth.token[fine_R][decided_R])

    assert_close(result.target_logprob, truth.target_logprob, 2 * allowed_R, fine_R)
    if result.member_logprob is not None:
        sampled_R = result.token if result.sample_token is None else result.sample_token
        for number, logits_RV in enumerate(request.logits):
            own_allowed_R = 1e-5 + FEW_ROUNDINGS * logits_RV[fine_R].double().nan_to_num(0, 0, 0).abs().amax(dim=1)
            own_RV = torch.log_softmax(logits_RV.double(), dim=1)
            own_RV[request.weights_NB[number] == 0] = torch.nan
            own_R = own_RV.gather(1, sampled_R.clamp_min(0)[:, None])[:, 0]
            assert_close(result.member_logprob[number], own_R, own_allowed_R, fine_R)
            if result.member_target_logprob is not None:
                theirs_RG = truth.member_target_logprob[number]
                assert_close(result.member_target_logprob[number], theirs_RG, 2 * own_allowed_R, fine_R)
    if result.top_token is not None:
        assert_best(result, truth, x_RV[fine_R], logprob_RV, fine_R, allowed_R)


def assert_close(ours, theirs, allowed_R, fine_R) -> None:
    """Log-probabilities (R,) or (R, G) within what is allowed, NaN and -inf at the same entries, NaN where flagged."""
    if ours is None:
        return
    assert ours[~fine_R].isnan().all()
    ours, theirs = ours[fine_R].double(), theirs[fine_R].double()
    allowed = allowed_R.view(-1, *[1] * (ours.dim() - 1))
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours == -torch.inf, theirs == -torch.inf)
    assert (((ours - theirs).abs() <= allowed) | ours.isnan() | (ours == theirs)).all()


def assert_best(result, truth, x_RV, logprob_RV, fine_R, allowed_R) -> None:
    """The k best: right values, tokens that have them, each once, in order, nothing after the last unmasked token."""
    token_RK, value_RK = result.top_token[fine_R], result.top_logprob[fine_R]
    there_RK = truth.top_token[fine_R] >= 0
    assert torch.equal(token_RK >= 0, there_RK)
    assert (value_RK[~there_RK] == -torch.inf).all()
    reached_RK = logprob_RV.gather(1, token_RK.clamp_min(0))
    close_RK = (value_RK - reached_RK).abs() <= 2 * allowed_R[:, None]
    ordered_RK = (value_RK - truth.top_logprob[fine_R]).abs() <= 2 * allowed_R[:, None]
    assert (close_RK | ~there_RK).all()
    assert (ordered_RK | ~there_RK).all()
    assert (value_RK[:, :-1] >= value_RK[:, 1:]).all()
    same_RKK = (token_RK[:, :, None] == token_RK[:, None, :]) & there_RK[:, :, None]
    assert (same_RKK.sum(dim=2) <= 1).all()
    x_RK = x_RV.gather(1, token_RK.clamp_min(0))
    tied_RK = (value_RK[:, :-1] == value_RK[:, 1:]) & (x_RK[:, :-1] == x_RK[:, 1:]) & there_RK[:, 1:]
    assert (token_RK[:, :-1] < token_RK[:, 1:])[tied_RK].all()
