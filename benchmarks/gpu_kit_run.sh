#!/bin/sh
# One part of the kit that benchmarks/gpu_kit.py packs, on a GPU machine without a network:
#
#   sh FOLDER/run.sh              keeps this part; once all are there, installs them and runs the acceptance
#   sh FOLDER/run.sh COMMAND...   or COMMAND, in the folder of the sources
#
# KIT (default: ./deploy-kit) is where the parts are kept, RESULTS (default: KIT/results) where logs and tables go.
set -eu
part=$(cd "$(dirname "$0")" && pwd)
mkdir -p "${KIT:=deploy-kit}"
KIT=$(cd "$KIT" && pwd)
read -r count sum <"$part/whole"

if [ "$(cat "$KIT/whole" 2>/dev/null || :)" != "$count $sum" ]; then  # another kit was here, or none
    rm -rf "$KIT/parts" "$KIT/sources" "$KIT/site"
    mkdir -p "$KIT/parts"
    cp "$part/whole" "$KIT/whole"
fi
cp "$part"/part.* "$KIT/parts/"
there=$(find "$KIT/parts" -type f | wc -l)
if [ "$there" -lt "$count" ]; then
    echo "$there of $count parts are there"
    exit 0
fi

if [ ! -d "$KIT/site" ]; then
    cat "$KIT"/parts/part.* >"$KIT/kit.tar"
    echo "$sum  $KIT/kit.tar" | sha256sum --check --quiet -
    mkdir -p "$KIT/sources" "$KIT/content"
    tar -C "$KIT/content" -xf "$KIT/kit.tar"
    tar -C "$KIT/sources" -xf "$KIT/content/sources.tar"
    python3 -m pip install --quiet --disable-pip-version-check --no-index --no-deps --target "$KIT/new" "$KIT"/content/wheels/*.whl
    rm -rf "$KIT/content" "$KIT/kit.tar"
    mv "$KIT/new" "$KIT/site"
fi

cd "$KIT/sources"
export PYTHONPATH="$KIT/sources:$KIT/site${PYTHONPATH:+:$PYTHONPATH}"
if [ "$#" -gt 0 ]; then
    exec "$@"
fi
mkdir -p "${RESULTS:=$KIT/results}"
status=0
python3 -m pytest -W default -p no:cacheprovider tests/gpu >"$RESULTS/tests.txt" 2>&1 || status=$?
tail -n 15 "$RESULTS/tests.txt"
python3 benchmarks/gpu_report.py --results "$RESULTS" --parts "$KIT/measured" --work "$KIT/work" ${BUDGET:+--budget "$BUDGET" --together} || status=$?
echo "results: $RESULTS"
exit "$status"
