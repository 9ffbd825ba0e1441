#!/bin/sh
# Install what a live migration needs, and show one.
set -eu
cd "$(dirname "$0")/.."
sh tests/install.sh demo
exec .venv/bin/python tests/demo.py
