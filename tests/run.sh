#!/bin/sh
# Install what the tests need, check the sources, run every test.
# Arguments go to pytest, for example: sh tests/run.sh -k handshake
set -eu
cd "$(dirname "$0")/.."
sh tests/install.sh tests
PATH="$PWD/.venv/bin:$PATH"
export PATH
sh .ci/lint
exec python -m pytest "$@"
