#!/bin/sh
# Runs an export into FOLDER unless the one there was made by the same words from the same verifier:
#   export_stage.sh FOLDER dspark-export STAGE OPTIONS...
# dspark-export replaces an earlier export only when it has succeeded, stage.json last.
set -eu
folder="$1"
shift
mark="$(dirname "$folder")/exported-with"

describe() {
    printf '%s\n' "$@"
    before=
    for word in "$@"; do
        if [ "$before" = --verifier ]; then cksum <"$word/stage.json"; fi
        before="$word"
    done
    # Ties the mark to this export: one that was cut short or laid by hand is not taken for it.
    cksum <"$folder/stage.json"
}

# Replicas that start together share the folder: one exports, the others wait and find it done. Some network file systems
# have no locks; there each exports, as before.
mkdir -p "$(dirname "$folder")"
exec 9>"$(dirname "$folder")/export.lock"
flock 9 || echo "$folder: exporting without a lock" >&2

if [ -f "$folder/stage.json" ] && [ -f "$mark" ] && [ "$(describe "$@")" = "$(cat "$mark")" ]; then
    echo "$folder: exported already, with the same arguments"
    exit 0
fi
"$@" --out "$folder"
describe "$@" >"$mark.new"
mv "$mark.new" "$mark"
