#!/usr/bin/env bash
# The README's table: eight combinations of the demo's models on a test set, with a paired bootstrap against Collab-MT.
#
#   demo/evaluate.sh SOURCE.ja REFERENCE.en OUTPUT
#
# Translations and run.json of each system go to OUTPUT; the table is printed and stands in OUTPUT/scores.json.
set -euo pipefail
source=${1:?usage: demo/evaluate.sh SOURCE.ja REFERENCE.en OUTPUT}
reference=${2:?no reference}
output=${3:?no output folder}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-$here/../.venv/bin/python}
mkdir -p "$output"

systems=(
    "collab       L + S_src + S_tgt"
    "collab-half  L + 0.5*S_src + 0.5*S_tgt"
    "proxy        L + (S_mt - S_base)"
    "experts      S_src + S_tgt"
    "L            L"
    "S_mt         S_mt"
    "S_src        S_src"
    "S_tgt        S_tgt"
)
baselines=()
for system in "${systems[@]}"; do
    read -r name combine <<<"$system"
    models=()
    for model in L S_base S_mt S_src S_tgt; do
        grep -qw "$model" <<<"$combine" && models+=(--model "$model=$here/$model")
    done
    "$python" -m decode.collab "${models[@]}" --combine "$combine" --source ja --target en --input "$source" \
        --reference "$reference" --output "$output/$name.txt" --report "$output/$name.json" 2>/dev/null
    [ "$name" = collab ] || baselines+=(--baseline "$output/$name.txt")
done
"$python" -m eval.score --hypothesis "$output/collab.txt" --reference "$reference" --target en --metrics bleu,chrf \
    "${baselines[@]}" --report "$output/scores.json"
