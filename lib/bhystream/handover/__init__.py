"""What both programs know of the protocol: which party does what when, and what it records.

handshake.py   the tables
answers.py     the lines of the way back, and the inbox that collects them
state.py       the state directory: locks and durable records
recorded.py    a recorded guest of the source, and what is done to it
standing.py    a guest that is not sent again, because it stands here
where.py       where a recorded guest is, and what the operator has to type
verbs.py       -l, --discard, --resume
leftover.py    what a killed bhyrecv has left of a guest
prune.py       records that nobody needs any more
"""
