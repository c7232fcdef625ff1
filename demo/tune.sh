#!/usr/bin/env bash
# What docs/tuning.md reports: weights of the demo's models fitted to one text, and all sums scored on another.
#
#   demo/tune.sh FIT.ja FIT.en TEST.ja TEST.en OUTPUT
#
# The text to fit on also selects the best of the sums with weights set by hand. The result is OUTPUT/tune-demo.json
# (the committed one: benchmarks/results/decode/tune-demo.json); what OUTPUT already has is not done again.
set -euo pipefail
[ $# = 5 ] || { echo "usage: demo/tune.sh FIT.ja FIT.en TEST.ja TEST.en OUTPUT" >&2; exit 2; }
fit=$1 fit_reference=$2 test=$3 test_reference=$4 output=$5
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-$here/../.venv/bin/python}
mkdir -p "$output"
languages=(--source ja --target en)

# The study's expressions (the paper's Table 6), the large model and the experts alone, the experts' sum.
fixed=(
    "collab       L + S_src + S_tgt"
    "half         L + 0.5*S_src + 0.5*S_tgt"
    "src          L + S_src"
    "tgt          L + S_tgt"
    "mt           L + S_mt"
    "proxy        L + (S_mt - S_base)"
    "proxy-src    L + (S_src - S_base)"
    "proxy-tgt    L + (S_tgt - S_base)"
    "proxy-half   L + (0.5*S_src + 0.5*S_tgt - S_base)"
    "L            L"
    "S_mt         S_mt"
    "S_src        S_src"
    "S_tgt        S_tgt"
    "experts      S_src + S_tgt"
)
fitted=(likelihood-3 likelihood-5)

models() { # the --model options of the names in an expression
    for model in L S_mt S_src S_tgt S_base; do
        grep -qw "$model" <<<"$1" && printf -- '--model\n%s=%s\n' "$model" "$here/$model"
    done
    return 0
}

tune() { # NAME EXPRESSION
    [ -s "$output/$1.tune.json" ] && return
    local name=$1 against=() members
    mapfile -t members < <(models "$2")
    for system in "${fixed[@]}"; do
        read -r _ expression <<<"$system"
        # of three members only what needs no other
        [[ $2 = *S_mt* || ! $expression =~ S_mt|S_base ]] && against+=(--against "$expression")
    done
    "$python" -m decode.tune "${members[@]}" --combine "$2" "${languages[@]}" --input "$fit" \
        --reference "$fit_reference" --held-out "$test" "$test_reference" "${against[@]}" \
        --output "$output/$name.toml" --json >"$output/.part"
    mv "$output/.part" "$output/$name.tune.json"
}

translate() { # NAME KIND BEAMS SOURCE REFERENCE OPTION…: OUTPUT/NAME.KIND.txt and .json
    [ -s "$output/$1.$2.json" ] && return
    "$python" -m decode.collab "${@:6}" "${languages[@]}" --input "$4" --reference "$5" --beam "$3" \
        --output "$output/$1.$2.txt" --report "$output/$1.$2.json" --no-resume 2>/dev/null
}

three="L + S_src + S_tgt" five="L + 0*S_mt + S_src + S_tgt + 0*S_base"
tune likelihood-3 "$three"
[ -s "$output/scipy.json" ] || "$python" "$here/tune_check.py" "$fit" "$fit_reference" \
    "$output/likelihood-3.tune.json" "$output/scipy.json"
tune likelihood-5 "$five"

names=()
for system in "${fixed[@]}"; do
    read -r name expression <<<"$system"
    mapfile -t members < <(models "$expression")
    names+=("$name")
    translate "$name" greedy 1 "$test" "$test_reference" "${members[@]}" --combine "$expression"
    translate "$name" beam 4 "$test" "$test_reference" "${members[@]}" --combine "$expression"
    translate "$name" hand 1 "$fit" "$fit_reference" "${members[@]}" --combine "$expression"
done
for name in "${fitted[@]}"; do
    mapfile -t members < <(models "$([[ $name = *5 ]] && echo "$five" || echo "$three")")
    names+=("$name")
    translate "$name" greedy 1 "$test" "$test_reference" "${members[@]}" --weights "$output/$name.toml"
    translate "$name" beam 4 "$test" "$test_reference" "${members[@]}" --weights "$output/$name.toml"
done

# Each of these against every other: p-values of the paired bootstrap.
for kind in greedy beam; do
    for first in collab likelihood-3 likelihood-5; do
        [ -s "$output/$first.$kind.scores.json" ] && continue
        baselines=()
        for name in "${names[@]}"; do
            [ "$name" = "$first" ] || baselines+=(--baseline "$output/$name.$kind.txt")
        done
        "$python" -m eval.score --hypothesis "$output/$first.$kind.txt" --reference "$test_reference" --target en \
            --metrics bleu,chrf "${baselines[@]}" --report "$output/$first.$kind.scores.json" >/dev/null
    done
done

"$python" "$here/tune_summary.py" "$output" "${names[@]}"
