#!/bin/sh
# Install what the tests need, check the sources, run every test.
# Arguments go to pytest, for example: sh tests/run.sh -k handshake
set -eu
cd "$(dirname "$0")/.."
sh tests/install.sh tests
PATH="$PWD/.venv/bin:$PATH"
export PATH
sh .ci/lint
[ $# -eq 0 ] || exec python -m pytest "$@"

# Two at once: where guests move, much of the time is spent waiting.
log=$(mktemp)
trap 'rm -f "$log"' EXIT
python -m pytest -m "not guest and not bhyve" >"$log" 2>&1 &
others=$!
status=0
python -m pytest -m guest || status=$?
wait "$others" || status=$?
cat "$log"
exit "$status"
