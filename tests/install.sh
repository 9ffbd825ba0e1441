#!/bin/sh
# Install what the demonstration ("demo") or the tests ("tests") need: Debian
# packages that are missing, and this checkout with its Python packages into
# .venv.  Run this script from the top of the checkout.  The script names the
# packages that it installs, and skips those that are there already.
set -eu

packages="gcc libc6-dev qemu-system-x86 seabios cpio"
checkout="."
if [ "$1" = tests ]; then
    packages="$packages qemu-utils mandoc mbuffer moreutils pv strace netcat-openbsd openssh-server openssh-client zstd"
    checkout=".[test,lint]"
fi

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi
}

install_packages() {
    echo "installing:$*"
    as_root apt-get -qq update
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get -qq install -y --no-install-recommends "$@" >/dev/null
}

missing=
for package in $packages; do
    dpkg -s "$package" >/dev/null 2>&1 || missing="$missing $package"
done
python3 -c 'import venv, ensurepip' 2>/dev/null || missing="$missing python3-venv"
python3 -c 'import pathlib, sysconfig
(pathlib.Path(sysconfig.get_path("include")) / "Python.h").stat()' 2>/dev/null ||
    missing="$missing python3-dev"
# shellcheck disable=SC2086  # a list of names
[ -z "$missing" ] || install_packages $missing

[ -x .venv/bin/pip ] || python3 -m venv .venv
BHYSTREAM_WERROR=1 .venv/bin/pip install --quiet --disable-pip-version-check --editable "$checkout"
