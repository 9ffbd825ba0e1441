"""bhysend(8): one move at the source, from the command line to what becomes of the guest.

main.py        wiring, and the one error handler
options.py     the command line
outgoing.py    one move, as a list of steps
job.py         what it is about, and what has begun
custody.py     the guest from its pause on: what is done to it, and what a failure means
stopwatch.py   its pause, measured and told
rounds.py      the rounds of one move
transfer.py    one round: from a mapping through the hash table to MEMORY sections
precopy.py     when to go on, stop or give up: pure functions
dryrun.py      -n
cold.py        snapshot files
hook.py        -p
conversation.py  the way there and back, and what is waited for
  push.py      what a pipeline holds back, pressed through
  rendezvous.py  where answers come in
keeper.py      acts for a bhysend that died: a process of its own
third.py       -A; settle.py: what it does where no bhysend lives
"""
