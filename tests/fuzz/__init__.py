"""Coverage-guided fuzzing of everything that parses bytes from outside.

    run          runs targets: tests/fuzz/run [--seconds N | --runs N] [target ...]
    runner.py    what run does, also for the tests
    targets.py   the table of all targets
    target.py    what a target is, and what it may do with any bytes
    streams.py   the stream: reader and verifier; bhyrecv up to the start of a guest
    seal.py      makes changed streams pass their checksums
    bhyve.py qemu.py host.py   what the hypervisors, and files of this host, say
    fuzzed.py    targets under atheris, each in a process of its own
    planted.py   targets with planted bugs, which show that each kind of failure is found
    corpus/      for each target, small inputs that reach different code; seeds.py writes the first

A failing input is saved by `run`, which prints how to run it alone.  After the bug is
mended, the input moves to corpus/, so that each run of the tests tries it again.
"""
