"""bhysend(8): one move at the source, from the command line to the exit status.

main.py          the wiring, and the one error handler
options.py       the command line
outgoing.py      one move, as a list of steps
job.py           what all parts of one move share
custody.py       the guest from its pause on: the acts on it, and what a failure means
stopwatch.py     the pause, measured and reported
prediction.py    the pause, foretold
  experience.py  how far off earlier moves were
  hostload.py    whether other processes keep the CPUs busy
rounds.py        the rounds of one move
throttle.py      the vCPUs held back in the rounds
head.py          the header and the head sections
strides.py       the guest's memory in the order of a round; how many threads scan it
transfer.py      one round: from a mapping through the hash table to MEMORY sections
scan.py          the last scan, by as many threads as the guest has vCPUs
precopy.py       when to go on, stop or give up: pure functions
dryrun.py        -n
  survey.py      two scans of a guest that runs on
cold.py          snapshot files
hook.py          -p
conversation.py  the stream's way out, and the wait for the answers
  flush.py       the push through what a pipeline holds back
  rendezvous.py  the socket and the pipe that answers come in by
keeper.py        a process of its own that acts for a bhysend that died
third_stage.py   -A
  recovery.py    what -A does if no bhysend lives
"""
