"""Bugs of the real-time priority: a guest gets it, or a program keeps it."""

from __future__ import annotations

from planted.bug import Bug, Kind

BUGS = (
    Bug(
        Kind.URGENT,
        "a hypervisor that is started meanwhile gets it",
        "urgent.py",
        "os.SCHED_RR | os.SCHED_RESET_ON_FORK, lowest",
        "os.SCHED_RR, lowest",
        ("test_urgent.py::test_what_is_started_in_a_block_is_not_urgent",),
    ),
    Bug(
        Kind.URGENT,
        "it stays after the block",
        "urgent.py",
        "        signal.signal(signal.SIGPROF, before)\n        end()\n",
        "        signal.signal(signal.SIGPROF, before)\n",
        ("test_urgent.py::test_a_block_is_urgent_and_what_follows_is_not",),
    ),
    Bug(
        Kind.URGENT,
        "a peer that floods the program keeps it",
        "urgent.py",
        "    signal.setitimer(signal.ITIMER_PROF, _CPU_S)\n",
        "",
        ("test_urgent.py::test_who_computes_is_not_urgent_any_more",),
    ),
    Bug(
        Kind.URGENT,
        "a policy that somebody chose is overruled",
        "urgent.py",
        "if os.sched_getscheduler(id_) != os.SCHED_OTHER or os",
        "if os",
        ("test_urgent.py::test_a_chosen_policy_stays",),
    ),
    Bug(
        Kind.URGENT,
        "the sender's answers are taken without it",
        "send/outgoing.py",
        "urgently(talk.route.thread_id)",
        "urgently()",
        ("cli/test_urgent.py::test_who_is_urgent[g5-READY-both]",),
    ),
    Bug(
        Kind.URGENT,
        "a plain receiver of files has it",
        "recv/incoming.py",
        "                if job.is_answered:\n                    waited_for",
        "                if True:\n                    waited_for",
        ("recv/test_incoming.py::test_a_load_is_urgent_if_the_source_waits_for_it[plain.bhys-0]",),
    ),
)
