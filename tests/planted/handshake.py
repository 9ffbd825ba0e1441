"""Bugs of the handshake: an act too many, too early, or of the wrong one."""

from __future__ import annotations

from planted.bug import Bug, Kind

TABLES = "handover/handshake.py"
MODEL = "handover/test_handshake.py::test_nothing_that_can_happen_breaks_an_invariant"
KEEPER = "send/test_keeper_takes_over.py::"

BUGS = (
    Bug(
        Kind.ORDER,
        "the tables: RUNNING is said before the guest is started",
        TABLES,
        "        (Act.RECORD_STARTED, Act.START),\n",
        "        (Act.RECORD_STARTED, Act.SAY_RUNNING, Act.START),\n",
        (MODEL,),
    ),
    Bug(
        Kind.ORDER,
        "bhyrecv: RUNNING is said before the guest is started",
        "recv/arrival.py",
        "        self._machine.on(Event.GO)\n",
        '        self._job.reply.try_to_say("RUNNING")\n        self._machine.on(Event.GO)\n',
        ("cli/test_standin.py::test_a_restore_that_fails_brings_the_guest_back",),
    ),
    Bug(
        Kind.ORDER,
        "RUNNING is said before bhyve has restored the guest",
        "backend/bhyve/waitingrestore.py",
        "            self._await_socket()\n        except",
        "        except",
        (
            "backend/test_bhyve_sink.py::test_a_start_that_fails_never_ran_and_is_undone",
            "cli/test_standin.py::test_a_restore_that_fails_brings_the_guest_back",
        ),
    ),
    Bug(
        Kind.ORDER,
        "READY is taken before END is written",
        "send/conversation.py",
        "        if self._inbox.nonce is not None:\n            raise GuestError(",
        "        if False:\n            raise GuestError(",
        ("send/test_conversation.py::test_ready_before_its_time_is_refused",),
    ),
    Bug(
        Kind.RESUME,
        "the tables: a limit after GO resumes the guest",
        TABLES,
        "    (SourceState.COMMITTED, Event.DOUBT): (SourceState.DOUBT, ()),\n",
        "    (SourceState.COMMITTED, Event.DOUBT): (SourceState.RUNS_HERE, _TAKE_BACK),\n",
        (MODEL,),
    ),
    Bug(
        Kind.RESUME,
        "bhysend: a failure after GO resumes the guest",
        "send/custody.py",
        "(at == SourceState.COMMITTED and not self._go_is_out):\n",
        "at == SourceState.COMMITTED:\n",
        ("send/test_custody.py::test_a_failure_after_go_leaves_the_guest_paused",),
    ),
    Bug(
        Kind.RESUME,
        "bhysend: no answer to GO passes for FAILED",
        "send/conversation.py",
        '        return Event.DOUBT, self._inbox.lost or f"no answer',
        '        return Event.FAILED, self._inbox.lost or f"no answer',
        ("send/test_conversation.py::test_an_answer_that_does_not_come_is_doubt",),
    ),
    Bug(
        Kind.RESUME,
        "bhysend: RAN passes for FAILED",
        "handover/recorded.py",
        '"FAILED": Event.FAILED}\n',
        '"FAILED": Event.FAILED, "RAN": Event.FAILED}\n',
        (
            "handover/test_recorded.py::test_what_an_answer_is",
            "send/test_conversation.py::test_the_answer_to_go",
        ),
    ),
    Bug(
        Kind.RESUME,
        "bhysend: a failure after END of the plain form resumes the guest",
        "send/custody.py",
        "        if self._machine.at == SourceState.HELD and self._begun.writer.ended:\n",
        "        if False:\n",
        (
            "send/test_custody.py::"
            "test_an_end_that_cannot_be_synced_leaves_the_guest_held_with_what_to_type",
        ),
    ),
    Bug(
        Kind.RESUME,
        "the answer of another host counts",
        "handover/recorded.py",
        "    if record.host and (record.host, record.directory) != hello.args:\n",
        "    if False:\n",
        ("handover/test_recorded.py::test_an_answer_of_another_says_nothing",),
    ),
    Bug(
        Kind.RESUME,
        "the answer to another stream counts",
        "handover/answers.py",
        "        if answer.id != self.id:\n",
        "        if False:\n",
        ("handover/test_answers.py::test_another_streams_answer_is_an_error",),
        is_quick=True,
    ),
    Bug(
        Kind.RESUME,
        "the tables: the keeper resumes the guest after GO",
        TABLES,
        "    (GO, Event.RUNNING): _END_HERE,\n",
        "    (GO, Event.RUNNING): _END_HERE,\n    (GO, Event.ALONE): _TAKE_BACK,\n",
        (
            MODEL,
            f"{KEEPER}test_nothing_else_is_ever_resumed",
        ),
    ),
    Bug(
        Kind.DISCARD,
        "the tables: a limit after GO ends the guest",
        TABLES,
        "    (SourceState.COMMITTED, Event.DOUBT): (SourceState.DOUBT, ()),\n",
        "    (SourceState.COMMITTED, Event.DOUBT): (SourceState.RUNS_THERE, _END_HERE),\n",
        (MODEL,),
    ),
    Bug(
        Kind.DISCARD,
        "the tables: the guest runs on before it is ended",
        TABLES,
        "_END_HERE = (Act.RECORD_MOVED, Act.DISCARD, Act.FORGET)\n",
        "_END_HERE = (Act.RECORD_MOVED, Act.RESUME, Act.DISCARD, Act.FORGET)\n",
        (MODEL,),
    ),
    Bug(
        Kind.DISCARD,
        "bhysend: any answer to GO passes for RUNNING",
        "send/conversation.py",
        '            return Event.DOUBT, f"{self.host} cannot say',
        '            return Event.RUNNING, f"{self.host} cannot say',
        ("send/test_conversation.py::test_the_answer_to_go",),
    ),
    Bug(
        Kind.DISCARD,
        "bhyve's guest is ended though it runs",
        "backend/bhyve/paused.py",
        "        if self.runs():\n            raise",
        "        if False:\n            raise",
        ("backend/test_bhyve_deaths.py::test_only_a_guest_that_stands_is_ended",),
    ),
    Bug(
        Kind.PAUSED,
        "the guest is not asked before GO",
        "send/outgoing.py",
        "        try:\n            custody.require_paused()\n",
        "        try:\n            pass\n",
        ("send/test_outgoing.py::test_the_guest_is_asked_last_before_go",),
    ),
    Bug(
        Kind.PAUSED,
        "the guest is not asked before END of the plain form",
        "send/custody.py",
        "        self.require_paused()\n        self._machine.on(Event.COPIED_PLAIN)\n",
        "        self._machine.on(Event.COPIED_PLAIN)\n",
        (
            "send/test_custody.py::"
            "test_a_guest_that_another_program_let_run_is_neither_held_nor_kept",
        ),
    ),
    Bug(
        Kind.PAUSED,
        "bhyve's guest stands, whatever its FIFO says",
        "backend/bhyve/paused.py",
        "        return self._is_full() and self._vcpus_stand()\n",
        "        return True\n",
        (
            "backend/test_bhyve_lifecycle.py::"
            "test_somebody_who_lets_it_run_in_the_pause_ends_the_move",
        ),
    ),
    Bug(
        Kind.NONCE,
        "GO starts the guest whatever nonce it has",
        "recv/incoming.py",
        "        if not secrets.compare_digest(go.nonce, nonce):\n",
        "        if False:\n",
        ("cli/test_recorded_streams.py::test_a_recorded_go_starts_nothing",),
    ),
    Bug(
        Kind.NONCE,
        "every READY has the same nonce",
        "recv/arrival.py",
        "        self._nonce = os.urandom(fmt.NONCE_BYTES)\n",
        "        self._nonce = bytes(fmt.NONCE_BYTES)\n",
        ("cli/test_recorded_streams.py::test_a_recorded_go_starts_nothing",),
    ),
    Bug(
        Kind.NONCE,
        "the nonce follows from the stream's id",
        "recv/arrival.py",
        "        self._nonce = os.urandom(fmt.NONCE_BYTES)\n",
        "        self._nonce = bytes.fromhex(job.id)\n",
        ("cli/test_recorded_streams.py::test_a_recorded_go_starts_nothing",),
    ),
)
