#!/usr/bin/env bash
# The recipe of the demo's five models, from text to weights: 81 minutes of two CPU cores that had other work to do.
#
#   demo/train.sh DATA [WORK]
#
# DATA has train.ja.gz and train.en.gz, line-aligned (50,000 pairs of the Tanaka corpus). WORK (default runs/demo) keeps
# every step's folder: a finished step is not run again, a killed one resumes from its last checkpoint. The finished
# models are copied to demo/.
set -euo pipefail
data=${1:?usage: demo/train.sh DATA [WORK]}
work=${2:-runs/demo}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-$here/../.venv/bin/python}
mkdir -p "$work"

# Which lines are for what: 1 to 24,000 the general model, 24,001 to 48,000 the experts, the next 1,000 validation.
if [ ! -f "$work/valid.tsv" ]; then
    paste <(gzip -dc "$data/train.ja.gz") <(gzip -dc "$data/train.en.gz") >"$work/all.tsv"
    sed -n '1,24000p' "$work/all.tsv" >"$work/general.tsv"
    sed -n '24001,48000p' "$work/all.tsv" >"$work/experts.tsv"
    for part in general experts; do
        cut -f1 "$work/$part.tsv" >"$work/$part.ja"
        cut -f2 "$work/$part.tsv" >"$work/$part.en"
    done
    sed -n '48001,49000p' "$work/all.tsv" >"$work/valid.tsv"
fi

if [ ! -f "$work/tokenizer/tokenizer.json" ]; then
    "$python" -m train.bpe --vocab-size 8000 --whole Japanese English --output "$work/tokenizer" \
        --text "$work"/general.ja "$work"/general.en "$work"/experts.ja "$work"/experts.en
fi

cpt() { # OUTPUT TEXT… -- START…
    local output=$1 text=()
    shift
    while [ "$1" != -- ]; do text+=("$1") && shift; done
    shift
    "$python" -m train.cpt --resume --output "$work/$output" --text "${text[@]}" "$@" \
        --packing step --schedule cosine --min-lr-ratio 0.1 --warmup-steps 100 --beta2 0.98 --weight-decay 0.1
}

sft() { # OUTPUT PAIRS OPTIONS…
    local output=$1 pairs=$2
    shift 2
    "$python" -m train.sft --resume --output "$work/$output" --train "$work/$pairs" --valid "$work/valid.tsv" \
        --source ja --target en --prompt "$here/prompt.toml" --keep best --save-dtype bfloat16 "$@" \
        --schedule cosine --min-lr-ratio 0.02 --warmup-steps 200 --beta2 0.98 --weight-decay 0.1
}

fresh() { echo --init "$here/configs/$1.json" --tokenizer "$work/tokenizer"; }

# The experts: a base over both languages, then the paper's three ways to the experts' pairs.
cpt base "$work/experts.ja" "$work/experts.en" -- $(fresh expert) --epochs 3 --lr 3e-3 --batch-size 64 --save-dtype bfloat16
cpt base-src "$work/experts.ja" -- --model "$work/base" --epochs 2 --lr 1e-3 --batch-size 64 --seed 1
cpt base-tgt "$work/experts.en" -- --model "$work/base" --epochs 2 --lr 1e-3 --batch-size 64 --seed 2
# So small a model trains best on one core: the three go side by side.
for expert in "S_mt base 3" "S_src base-src 4" "S_tgt base-tgt 5"; do
    read -r name from seed <<<"$expert"
    OMP_NUM_THREADS=1 sft "$name" experts.tsv --model "$work/$from" --epochs 8 --lr 2e-3 --batch-size 32 --seed "$seed" &
    jobs+=($!)
done
for job in "${jobs[@]}"; do wait "$job"; done

# The general model: text of both languages, then both directions.
cpt general "$work/general.ja" "$work/general.en" -- $(fresh general) --epochs 2 --lr 2e-3 --batch-size 64 --seed 6
sft L general.tsv --model "$work/general" --both-directions --epochs 8 --lr 1.5e-3 --batch-size 64 --seed 7

for model in L S_base S_mt S_src S_tgt; do
    from=$work/$model
    [ "$model" = S_base ] && from=$work/base && cp "$here/prompt.toml" "$from/"
    mkdir -p "$here/$model"
    for file in config.json generation_config.json model.safetensors tokenizer.json prompt.toml run.json; do
        cp "$from/$file" "$here/$model/$file.new" && mv "$here/$model/$file.new" "$here/$model/$file"
    done
done
