# Sets $python to a Python 3.11 or 3.12: $DSPARK_PYTHON if given, else the first on PATH. Sourced, not run.
# shellcheck shell=bash
python=""
for candidate in ${DSPARK_PYTHON:-python3 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1; then
        python="$candidate"
        break
    fi
done
if [[ -z "$python" ]]; then
    echo "error: expected Python 3.11 or 3.12 as ${DSPARK_PYTHON:-python3, python3.12 or python3.11}, found none." \
        "Install one (Debian, Ubuntu: apt install python3 python3-venv) or name it in DSPARK_PYTHON" >&2
    exit 1
fi
