"""Make the proving guest's kernel and initramfs, in a cache directory.

`images()` returns paths to a kernel and an initramfs, building what is not
there yet.  The kernel is Debian's cloud kernel, taken from its package without
installing it; the initramfs holds proof.c, linked statically, as /init, and
the virtio modules of that kernel, which /init loads when it is to use a disk.

Everything is made beside its final name and renamed, under a lock, so parallel
tests may all ask at once.  The initramfs is named by a digest of what goes
into it; the kernel, once fetched, is used until `refresh` asks for a newer one.

A missing tool or package is an error that names it, never a skipped test.
Run as a program it prints the two paths: `python tests/guest/build.py [--refresh]`.
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

# In the order in which they must be loaded.  In that kernel the serial port,
# devtmpfs and the initramfs are built in, and virtio is not.
MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
)

# No vectors: QEMU's TCG emulates SSE one helper call at a time, and the loops get slower.
CFLAGS = (
    "-std=gnu11", "-O2", "-fno-tree-vectorize", "-Wall", "-Wextra", "-Werror",
    "-static", "-pthread",
)  # fmt: skip

SOURCE = Path(__file__).with_name("proof.c")


class BuildError(Exception):
    """The guest cannot be made here; the message names what is missing."""


@dataclass(frozen=True)
class Images:
    """What QEMU boots.  kernel: a bzImage.  initramfs: an uncompressed cpio archive."""

    kernel: Path
    initramfs: Path


def cache_directory() -> Path:
    """Return where images are kept: BHYSEND_TEST_CACHE, or below XDG_CACHE_HOME."""
    chosen = os.environ.get("BHYSEND_TEST_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "bhysend-tests"


def images(cache: Path | None = None, *, refresh: bool = False) -> Images:
    """Return the guest's images, making what the cache does not hold.

    cache: directory, made when missing; `cache_directory()` when None.
    refresh: ask the package index for the newest kernel.
    Raises BuildError.
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
    """Run a tool and return its standard output; say what failed, and why, in BuildError."""
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
    """Return the directory with vmlinuz and modules/, fetching the package if need be.

    The link `kernel` names the one in use, so that a second run asks nobody.
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
    """Return the name of the package that the metapackage stands for today."""
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
    """Return the initramfs for a kernel, compiling proof.c if anything in it is new."""
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
    """Return the cpio archive.  Written here: cpio(1) needs root to make the console node."""
    parts = [
        _member(1, "dev", stat.S_IFDIR | 0o755),
        # The kernel opens it for /init before devtmpfs is mounted.
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
