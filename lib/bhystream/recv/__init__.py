"""bhyrecv(8): rebuild one guest from a stream, and answer its source.

main.py        wiring, and the one error handler
options.py     the command line
forced.py      the words that the holder of a key may add to it
incoming.py    one guest rebuilt, as a list of steps
receiving.py   the stream to receive, and what is refused whatever it contains
building.py    the guest that is built
placing.py     its memory, filled by splice(2)
arrival.py     what is recorded and answered about that guest
judge.py       -n
reply.py       the answers to the source
query.py       -q
"""
