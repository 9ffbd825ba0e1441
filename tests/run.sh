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

# Run three groups at once: the tests that move guests spend much of their time waiting.
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
python -m pytest -m standin >"$logs/standin" 2>&1 &
standin=$!
python -m pytest -m "not guest and not standin and not bhyve" >"$logs/others" 2>&1 &
others=$!
status=0
python -m pytest -m guest || status=$?
wait "$standin" || status=$?
wait "$others" || status=$?
cat "$logs/standin" "$logs/others"
exit "$status"
