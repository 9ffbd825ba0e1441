"""Make the proving guest's kernel and initramfs, in a cache directory.

`images()` returns the paths of a kernel and an initramfs, and first makes those
that are not there yet.  The kernel is Debian's cloud kernel, taken from its
package, which is not installed; the initramfs holds proof.c, linked statically,
as /init, and that kernel's virtio modules, which /init loads to use a disk.

Every file is made beside its final name and renamed, under a lock, so that
parallel tests may all ask at once.  The initramfs is named by a digest of its
contents; the kernel, once fetched, is used until `refresh` asks for a newer one.

If a tool or a package is missing, an error names it; no test is skipped for that.
Run as a program, this prints the two paths: `python tests/guest/build.py [--refresh]`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

KERNEL_METAPACKAGE = "linux-image-cloud-amd64"

# The modules in the order in which they must be loaded.  That kernel has the
# serial port, devtmpfs and the initramfs built in, but not virtio.
MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
)

# No vectors, because QEMU's TCG calls a helper for each SSE instruction, which is slower.
CFLAGS = (
    "-std=gnu11", "-O2", "-fno-tree-vectorize", "-Wall", "-Wextra", "-Werror",
    "-static", "-pthread",
)  # fmt: skip

SOURCE = Path(__file__).with_name("proof.c")


class BuildError(Exception):
    """The guest cannot be made here; the message names what is missing."""


@dataclass(frozen=True)
class Images:
    """The files that QEMU boots.  kernel: a bzImage.  initramfs: an uncompressed cpio archive."""

    kernel: Path
    initramfs: Path


def cache_directory() -> Path:
    """Return the directory of the images: BHYSEND_TEST_CACHE, or one below XDG_CACHE_HOME."""
    chosen = os.environ.get("BHYSEND_TEST_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "bhysend-tests"


def images(cache: Path | None = None, *, refresh: bool = False) -> Images:
    """Return the guest's images; make those that the cache does not hold.

    cache: directory, made if missing; `cache_directory()` if None.
    refresh: ask the package index for the newest kernel.
    Raises BuildError if an image cannot be made.
    """
    cache = cache or cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / "lock"):
        package = _kernel_package(cache, refresh=refresh)
        return Images(package / "vmlinuz", _initramfs(cache, package))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run_tool(argv: Sequence[str | Path], cwd: Path | None = None) -> str:
    """Run a tool and return its standard output.  Raises BuildError that says why it failed."""
    name = str(argv[0])
    try:
        done = subprocess.run(
            argv, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise BuildError(f"{name} is missing: install it to build the test guest") from error
    if done.returncode != 0:
        command = " ".join(map(str, argv))
        raise BuildError(f"{command}: status {done.returncode}\n{done.stderr.strip()}")
    return done.stdout


def _kernel_package(cache: Path, *, refresh: bool) -> Path:
    """Return the directory with vmlinuz and modules/; fetch the package if necessary.

    The link `kernel` names the kernel in use, so that a second run needs no network.
    """
    current = cache / "kernel"
    if current.exists() and not refresh:
        return current.resolve()
    package = _newest_kernel()
    target = cache / package
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as scratch:
            _unpack_kernel(package, Path(scratch))
            (Path(scratch) / "image").rename(target)
    link = cache / f"kernel.{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(target.name)
    link.replace(current)
    return target


def _newest_kernel() -> str:
    """Return the name of the package that the metapackage depends on today."""
    for line in run_tool(["apt-cache", "depends", KERNEL_METAPACKAGE]).splitlines():
        relation, _, name = line.strip().partition(": ")
        if relation == "Depends" and name.startswith("linux-image-"):
            return name
    raise BuildError(
        f"no package {KERNEL_METAPACKAGE} is known here: run `apt-get update`"
        " (the test guest boots Debian's cloud kernel)"
    )


def _unpack_kernel(package: str, scratch: Path) -> None:
    """Fetch a kernel package and leave image/vmlinuz and image/modules in scratch."""
    run_tool(["apt-get", "download", package], cwd=scratch)
    archives = list(scratch.glob("*.deb"))
    if len(archives) != 1:
        raise BuildError(f"apt-get download {package} left {len(archives)} archives, not one")
    tree = scratch / "tree"
    run_tool(["dpkg", "-x", archives[0], tree])
    image = scratch / "image"
    (image / "modules").mkdir(parents=True)
    kernels = list((tree / "boot").glob("vmlinuz-*"))
    if len(kernels) != 1:
        raise BuildError(f"{package} holds {len(kernels)} kernels, not one")
    shutil.copyfile(kernels[0], image / "vmlinuz")
    for name in MODULES:
        found = list(tree.glob(f"**/lib/modules/*/kernel/drivers/**/{name}.ko"))
        if len(found) != 1:
            raise BuildError(f"{package} holds {len(found)} modules {name}.ko, not one")
        shutil.copyfile(found[0], image / "modules" / f"{name}.ko")


def _initramfs(cache: Path, package: Path) -> Path:
    """Return the initramfs for a kernel; make it anew if any of its contents has changed."""
    modules = [package / "modules" / f"{name}.ko" for name in MODULES]
    digest = hashlib.sha256(repr(CFLAGS).encode())
    for path in (SOURCE, Path(__file__), *modules):
        digest.update(path.read_bytes())
    target = cache / f"initramfs-{digest.hexdigest()[:16]}.cpio"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=cache, prefix="build-") as scratch:
        init = Path(scratch) / "init"
        run_tool(["gcc", *CFLAGS, "-o", init, SOURCE])
        archive = Path(scratch) / "initramfs"
        archive.write_bytes(_archive(init.read_bytes(), modules))
        archive.rename(target)
    return target


def _archive(init: bytes, modules: Sequence[Path]) -> bytes:
    """Return the cpio archive, made without cpio(1), which needs root for the console node."""
    parts = [
        _member(1, "dev", stat.S_IFDIR | 0o755),
        # The kernel opens the console for /init before devtmpfs is mounted.
        _member(2, "dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
        _member(3, "modules", stat.S_IFDIR | 0o755),
        _member(4, "init", stat.S_IFREG | 0o755, init),
    ]
    for order, path in enumerate(modules):
        name = f"modules/{order:02d}-{path.name}"
        parts.append(_member(5 + order, name, stat.S_IFREG | 0o644, path.read_bytes()))
    parts.append(_member(0, "TRAILER!!!", 0))
    return b"".join(parts)


def _member(
    inode: int, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)
) -> bytes:
    """Return one member in the newc format, padded.  Source: cpio(5), New ASCII Format."""
    encoded = name.encode() + b"\0"
    fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def main() -> int:
    """Print the paths of kernel and initramfs."""
    if sys.argv[1:] not in ([], ["--refresh"]):
        print("usage: build.py [--refresh]", file=sys.stderr)
        return 64
    try:
        made = images(refresh=sys.argv[1:] == ["--refresh"])
    except BuildError as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 1
    print(made.kernel, made.initramfs, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
