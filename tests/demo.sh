#!/bin/sh
# Install what a live migration needs, and show a live migration.
set -eu
cd "$(dirname "$0")/.."
sh tests/install.sh demo
exec .venv/bin/python tests/demo.py
