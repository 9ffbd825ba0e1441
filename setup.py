"""Build the package and its Cython loops, and install programs and man pages."""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.sdist import sdist

WERROR = ["-Werror"] if os.environ.get("BHYSTREAM_WERROR") else []
CFLAGS = ["-O3", "-Wall", "-Wextra", *WERROR]

EXTENSIONS = [
    Extension(
        f"bhystream.memory.{name}", [f"lib/bhystream/memory/{name}.pyx"], extra_compile_args=CFLAGS
    )
    for name in ("batch", "page", "scatter", "splice")
]


class SourceDistribution(sdist):
    """Put every file of the repository into the source distribution.

    The tests are a packager's only proof of a build, and README.md leads through them.
    """

    def make_distribution(self):
        for directory in (".ci", ".packages", "lib", "man", "tests"):
            self.filelist.process_template_line(f"graft {directory}")
        self.filelist.process_template_line("include .gitignore .pre-commit-config.yaml")
        # What builds and runs have left there.
        self.filelist.process_template_line("global-exclude *.so *.py[cod]")
        self.filelist.process_template_line("prune lib/bhystream.egg-info")
        super().make_distribution()


setup(
    license="BSD-2-Clause",
    cmdclass={"sdist": SourceDistribution},
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
