"""Build the package and its Cython loops, and install programs and man pages."""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

WERROR = ["-Werror"] if os.environ.get("BHYSTREAM_WERROR") else []
CFLAGS = ["-O3", "-Wall", "-Wextra", *WERROR]

EXTENSIONS = [
    Extension(
        f"bhystream.memory.{name}", [f"lib/bhystream/memory/{name}.pyx"], extra_compile_args=CFLAGS
    )
    for name in ("batch", "page", "scatter", "splice")
]

setup(
    package_dir={"": "lib"},
    packages=[
        "bhystream",
        "bhystream.backend",
        "bhystream.backend.bhyve",
        "bhystream.backend.qemu",
        "bhystream.handover",
        "bhystream.memory",
        "bhystream.recv",
        "bhystream.send",
        "bhystream.standin",
        "bhystream.stream",
    ],
    package_data={"bhystream": ["py.typed"], "bhystream.memory": ["*.pyi"]},
    ext_modules=cythonize(
        EXTENSIONS,
        build_dir="build/cython",
        compiler_directives={"language_level": "3", "boundscheck": False, "wraparound": False},
    ),
    scripts=["bhysend", "bhyrecv"],
    data_files=[
        ("share/man/man5", ["man/bhystream.5"]),
        ("share/man/man7", ["man/bhysend-bhyve.7", "man/bhysend-qemu.7"]),
        ("share/man/man8", ["man/bhysend.8", "man/bhyrecv.8"]),
    ],
)
