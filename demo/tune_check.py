"""The fit of decode.tune against scipy on logits of the plain models, all in float64.

python demo/tune_check.py FIT.ja FIT.en REPORT.json OUTPUT.json

REPORT.json is the output of `decode.tune --json` for these texts. Nothing of the fit is used here: `Llama` itself reads
prompts one by one, logits are computed by its own output layer, and scipy minimises their cross-entropy.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize

from corpora import read_lines
from decode.pipeline.members import open_members
from minillama import Llama
from minillama.files import atomic_write

POSITIONS_AT_ONCE = 512


def main(source: str, reference: str, report: str, output: str) -> None:
    fitted = json.loads(Path(report).read_text(encoding="utf-8"))
    members = open_members(fitted["models"], None, None)
    tokens: list[int] = []
    hidden, heads = [], []
    for member in members:
        model = Llama.from_pretrained(member.folder).double()
        end = model.stop_tokens[0]
        states = []
        tokens.clear()
        with torch.no_grad():
            for sentence, translation in zip(read_lines(source), read_lines(reference), strict=True):
                prompt = member.encode(sentence, "ja", "en")
                target = member.tokenizer.encode(translation.strip())
                states.append(model.hidden(torch.tensor([[*prompt, *target]]))[0, len(prompt) - 1 :])
                tokens += [*target, end]
        hidden.append(torch.cat(states))
        heads.append(model.output_weight.detach())
    token_T = torch.tensor(tokens)

    def nats(weights_N: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.tensor(weights_N, requires_grad=True)
        value = 0.0
        for start in range(0, len(token_T), POSITIONS_AT_ONCE):
            here = slice(start, start + POSITIONS_AT_ONCE)
            x_TV = sum(w * (h_TD[here] @ o_VD.T) for w, h_TD, o_VD in zip(weights, hidden, heads, strict=True))
            part = torch.nn.functional.cross_entropy(x_TV, token_T[here], reduction="sum") / len(token_T)
            part.backward()
            value += part.item()
        assert weights.grad is not None
        return value, weights.grad.numpy()

    start_N = np.full(len(members), 1 / len(members))
    found = minimize(nats, start_N, jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-8})
    ours_N = np.array([fitted["weights"][member.name] for member in members])
    result = {
        "dtype": str(hidden[0].dtype),
        "tokens": len(token_T),
        "method": "scipy.optimize.minimize L-BFGS-B",
        "evaluations": int(found.nfev),
        "weights": dict(zip(fitted["weights"], found.x.tolist(), strict=True)),
        "nats": float(found.fun),
        "gradient_norm": float(np.linalg.norm(found.jac)),
        "largest_weight_difference": float(np.abs(found.x - ours_N).max()),
        "nats_difference": fitted["fit"]["nats"] - float(found.fun),
    }
    atomic_write(Path(output), json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
