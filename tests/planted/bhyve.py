"""Bugs of the holds that make a bhyve wait, at the source and at the destination."""

from __future__ import annotations

from planted.bug import Bug, Kind

CHECKPOINT = "backend/bhyve/checkpoint.py"
LAST_PAGE = "backend/bhyve/lastpage.py"
PAUSED = "backend/bhyve/paused.py"
WAITING = "backend/bhyve/waitingrestore.py"
# The line that gives bhyve the FIFO, and what is left of it without the FIFO.
GIVES_FIFO = "        if fifo_fd is not None:\n"

BUGS = (
    Bug(
        Kind.FIFO,
        "bhyve does not get the FIFO",
        CHECKPOINT,
        GIVES_FIFO,
        "        if False:\n",
        (
            "backend/test_bhyve_checkpoint.py::test_the_fifo_goes_along_until_the_request_is_served",
            "backend/test_bhyve_source.py::"
            "test_only_bhyve_has_the_fifo_open_while_the_guest_stands",
        ),
    ),
    Bug(
        Kind.FIFO,
        "bhyve does not get the FIFO: on FreeBSD",
        CHECKPOINT,
        GIVES_FIFO,
        "        if False:\n",
        (
            "bhyve/test_hold.py::"
            "test_it_stands_when_all_of_ours_are_killed_and_any_process_lets_it_run",
        ),
        needs_freebsd=True,
    ),
    Bug(
        Kind.FIFO,
        "bhysend keeps the FIFO open too",
        "backend/bhyve/ready.py",
        "            os.close(fd)  # only bhyve may have the FIFO open: see fifo.has_reader()\n",
        "            pass\n",
        ("backend/test_bhyve_source.py::test_only_bhyve_has_the_fifo_open_while_the_guest_stands",),
    ),
    Bug(
        Kind.FIFO,
        "bhyve does not get our end of the connection",
        "backend/bhyve/listening.py",
        '{**pairs, "bhysend-reply": nvlist.Descriptor(connection.fileno())}',
        "pairs",
        ("backend/test_bhyve_checkpoint.py::test_a_reply_to_one_who_is_gone_is_no_signal",),
    ),
    Bug(
        Kind.FIFO,
        "the FIFO has room for FILE.meta",
        "backend/bhyve/fifo.py",
        "        if _write(fd, _FILLER * (full_bytes - 1)) != full_bytes - 1:\n",
        "        if False:\n",
        ("backend/test_bhyve_fifo.py::test_it_lacks_one_byte_when_it_is_armed",),
    ),
    Bug(
        Kind.RELEASE,
        "FILE's last page and FILE.kern are given before GO",
        WAITING,
        "        if states:\n            self._load_fpu(states)\n        self.require_held()\n",
        "        self._last.give(self.memory)\n        self._bhyve.child.go_on()\n",
        ("backend/test_bhyve_sink.py::test_a_held_guest_is_ready_for_as_long_as_one_likes",),
    ),
    Bug(
        Kind.RELEASE,
        "the last page is not cut off",
        LAST_PAGE,
        "        os.truncate(self.files.memory, self.memory_bytes - PAGE_BYTES)\n",
        "",
        ("backend/test_bhyve_sink.py::test_a_held_guest_is_ready_for_as_long_as_one_likes",),
    ),
    Bug(
        Kind.RELEASE,
        "FILE.kern is not cut",
        LAST_PAGE,
        "        os.truncate(self.files.kern, 0)\n",
        "",
        (
            "backend/test_bhyve_lastpage.py::test_a_file_is_whole_again_and_the_memory_has_its_bytes",
        ),
    ),
    Bug(
        Kind.RELEASE,
        "bhyve is let go before FILE.kern is written",
        WAITING,
        "            self._last.fill(kern)\n",
        "            self._last.give(self.memory)\n"
        "            self._bhyve.child.go_on()\n"
        "            self._last.fill(kern)\n",
        ("backend/test_bhyve_sink.py::test_a_held_guest_is_ready_for_as_long_as_one_likes",),
    ),
    Bug(
        Kind.RELEASE,
        "the marks stay in the guest's memory",
        LAST_PAGE,
        "        last[:] = self.tail[PAGE_BYTES:]\n",
        "",
        (
            "backend/test_bhyve_lastpage.py::test_a_file_is_whole_again_and_the_memory_has_its_bytes",
        ),
    ),
    Bug(
        Kind.BHYVE,
        "the suspension of the throttle stays: found by its record",
        PAUSED,
        "            self._end_throttle()\n",
        "",
        ("backend/test_bhyve_paused.py::test_a_throttled_guest_that_is_found_runs_again",),
    ),
    Bug(
        Kind.BHYVE,
        "the suspension of the throttle stays: when the throttle ends",
        "send/throttle.py",
        "                finally:\n                    self._source.resume_vcpus()\n",
        "                finally:\n                    pass\n",
        ("send/test_throttle.py::test_the_vcpus_stand_again_and_again_and_run_at_the_end",),
    ),
    Bug(
        Kind.BHYVE,
        "the throttle lets vCPUs run that others have suspended",
        "backend/bhyve/suspended.py",
        "        if suspended is None or vcpu in suspended:\n",
        "        if True:\n",
        ("backend/test_bhyve_source.py::test_the_throttle_resumes_only_what_it_has_suspended",),
    ),
    Bug(
        Kind.BHYVE,
        "the guest is resumed without its registers",
        PAUSED,
        "            self._put_back()\n            self.release()\n",
        "            self.release()\n",
        ("backend/test_bhyve_deaths.py::test_a_guest_whose_fpu_was_being_stored_goes_on",),
    ),
    Bug(
        Kind.BHYVE,
        "registers are borrowed before the journal is written",
        "backend/bhyve/lent.py",
        "            journal.write(saved)\n        phase = Phase.SET\n",
        "            pass\n        phase = Phase.SET\n",
        (
            "backend/test_bhyve_journal.py::test_whoever_is_killed_while_he_stores_it_all_is_put_back",
        ),
    ),
    Bug(
        Kind.BHYVE,
        "registers that were put back are not compared",
        "backend/bhyve/savedvcpu.py",
        "        if SavedVcpu.read(vm, memory, self.vcpu) != self:\n",
        "        if False:\n",
        ("backend/test_bhyve_fpu.py::test_registers_that_read_back_as_others_are_an_error",),
    ),
    Bug(
        Kind.BHYVE,
        "the memory under the stub is not put back",
        "backend/bhyve/savedvcpu.py",
        "        memory[stub.BASE_GPA : stub.END_GPA] = self.pages\n",
        "",
        ("backend/test_bhyve_fpu.py::test_every_vcpu_is_saved_one_after_the_other",),
    ),
    Bug(
        Kind.BHYVE,
        "an NMI that the stub swallowed is lost",
        "backend/bhyve/lent.py",
        "            if phase == Phase.BACK_NMI:\n",
        "            if False:\n",
        ("backend/test_bhyve_fpu.py::test_an_nmi_that_waits_is_swallowed_and_given_back",),
    ),
    Bug(
        Kind.BHYVE,
        "a request that was given up is not taken back",
        PAUSED,
        '        if self._directory.withdraw():\n            return b""\n',
        "",
        (
            "backend/test_bhyve_source_pause.py::"
            "test_a_request_that_was_given_up_never_holds_the_guest_later",
        ),
    ),
    Bug(
        Kind.BHYVE,
        "the VM of another guest of that name is destroyed",
        PAUSED,
        '        return node != "" and not (is_this_boot and node == self.record.node)\n',
        "        return False\n",
        ("backend/test_bhyve_paused.py::test_another_guest_of_its_name_is_left_alone",),
    ),
)
