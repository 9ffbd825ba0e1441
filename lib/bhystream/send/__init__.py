"""bhysend(8): one move at the source, from the command line to what becomes of the guest.

main.py        wiring, and the one error handler
options.py     the command line
move.py        one move; recover.py: one that failed
transfer.py    rounds: from a mapping through the hash table to MEMORY sections
precopy.py     when to go on, stop or give up: pure functions
dryrun.py      -n
cold.py        snapshot files
hook.py        -p
offer.py       the answers, asked for and awaited
  push.py      what a pipeline holds back, pressed through
  rendezvous.py  where answers come in
keeper.py      acts for a bhysend that died: a process of its own
third.py       -A; settle.py: what it does where no bhysend lives
"""
