#!/usr/bin/env bash
# What UNIMO's demo configs read, made from the demo data: stores of region features, rewritten captions, retrieved texts.
# usage: bash tools/prepare_unimo_demo.sh [DIR]      DIR: where the demo is (default output/demo); what is there already is kept
set -euo pipefail

out=${1:-output/demo}
data=$out/data unimo=$out/unimo
command -v unimo2 > /dev/null || unimo2() { "${PYTHON:-python}" -m unimo2_paddle.cli "$@"; }

[ -d "$data/regions" ] && [ -d "$data/rewrites" ] || unimo2 demo-data --out "$data"
for split in train val test; do
    store=$unimo/regions/$split
    [ -d "$store" ] || unimo2 features import --format bottom_up "$data/regions/bottom_up/${split/val/dev}.tsv" --out "$store" \
        --object-names "$data/regions/objects_vocab.txt" --attribute-names "$data/regions/attributes_vocab.txt"
done
# every step of unimo2 augment keeps the parts that are complete
unimo2 augment index --source "$data/pairs/*.tar" --synonyms "$data/rewrites/synonyms.txt" --out "$unimo/captions"
unimo2 augment rewrite --source "$data/pairs/*.tar" --index "$unimo/captions" --paraphrases "$data/rewrites/paraphrases.jsonl" --out "$unimo/augmentations"
unimo2 augment index --source "$data/texts/*.tar" --out "$unimo/texts"
unimo2 augment retrieve --source "$data/pairs/*.tar" --index "$unimo/texts" --out "$unimo/augmentations"
