"""What both sides know of the protocol: who does what when, and what is recorded of it.

handshake.py   the tables
answers.py     the lines of the way back; the box that they are collected in
state.py       the state directory: locks and durable records
standing.py    a recorded guest of the source, and what is done to it
where.py       where such a guest is, and what to type
hold.py        -l, --discard, --resume
leftover.py    what a killed bhyrecv left of a guest
prune.py       records that nobody needs any more
"""
