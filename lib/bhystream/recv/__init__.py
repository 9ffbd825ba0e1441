"""bhyrecv(8): one guest rebuilt from a stream, and what is said of it.

main.py        wiring, and the one error handler
options.py     the command line
incoming.py    one guest rebuilt, as a list of steps
receiving.py   the stream that is received, and what is refused whatever is in it
building.py    the guest that is made
arrival.py     what is recorded and answered of it
judge.py       -n
reply.py       the answers given
query.py       -q
"""
