"""bhyrecv(8): one guest rebuilt from a stream, and what is said of it.

main.py        wiring, and the one error handler
options.py     the command line
build.py       the guest, from the events of a stream
judge.py       -n
reply.py       the answers given
query.py       -q
"""
