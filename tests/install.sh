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
    packages="$packages bmake dpkg-dev lintian"
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

if [ "$1" = tests ] && ! dpkg-checkbuilddeps .packages/debian/control 2>/dev/null; then
    echo "installing: what the build of the Debian package needs"
    as_root apt-get -qq update
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get -qq build-dep -y --no-install-recommends ./.packages >/dev/null
fi

[ -x .venv/bin/pip ] || python3 -m venv .venv
BHYSTREAM_WERROR=1 .venv/bin/pip install --quiet --disable-pip-version-check --editable "$checkout"
if [ "$1" = tests ]; then
    # What a build and an installation require, for tests that have no network.
    .venv/bin/python -c 'import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))
print(*project["build-system"]["requires"], *project["project"]["dependencies"], sep="\n")' |
        .venv/bin/pip download --quiet --disable-pip-version-check --dest .venv/wheels \
            --requirement /dev/stdin
fi
