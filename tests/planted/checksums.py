"""Bugs of the reader: what a stream says is not compared with what it has."""

from __future__ import annotations

from planted.bug import Bug, Kind

BUGS = (
    Bug(
        Kind.CHECKSUM,
        "the header's checksum is not compared",
        "stream/reader.py",
        'if expected != int.from_bytes(checksum, "little"):',
        "if False:",
        (
            "stream/test_malformed.py::test_bad_header_is_refused",
            "stream/test_golden.py::test_every_changed_byte_is_refused",
        ),
    ),
    Bug(
        Kind.CHECKSUM,
        "the checksum of a section is not compared",
        "stream/reader.py",
        "if state.intdigest() != section.checksum:",
        "if False:",
        (
            "stream/test_malformed.py::test_wrong_checksum_is_refused",
            "stream/test_golden.py::test_every_changed_byte_is_refused",
        ),
    ),
    Bug(
        Kind.CHECKSUM,
        "a section's checksum does not cover its header",
        "stream/reader.py",
        "        state.update(self._head[: fmt.CHECKED_HEADER_BYTES])\n",
        "",
        ("stream/test_golden.py::test_both_readers_agree_on_what_it_holds",),
    ),
    Bug(
        Kind.CHECKSUM,
        "the list of a MEMORY section is believed before its checksum",
        "stream/reader.py",
        "            self._check_checksum(section)\n            self._check_flags(section)\n"
        "            if take",
        "            self._check_flags(section)\n            if take",
        ("stream/test_malformed_memory.py::test_a_list_is_believed_only_after_its_checksum",),
    ),
    Bug(
        Kind.CHECKSUM,
        "a list whose extents are wrong is found only behind its pages",
        "stream/reader.py",
        "            if take := self._on_list(section):\n",
        "            if take := None:\n",
        ("stream/test_malformed_memory.py::test_a_list_is_checked_before_a_page_byte_is_read",),
    ),
    Bug(
        Kind.CHECKSUM,
        "a zstd frame is left out of the checksum",
        "stream/reader.py",
        "        if section.type == Type.MEMORY and section.flags & fmt.FLAG_ZSTD:\n"
        "            state.update(section.body)\n",
        "",
        ("stream/test_malformed_memory.py::test_sound_frames_are_taken",),
    ),
    Bug(
        Kind.CHECKSUM,
        "pages are not compared with their hashes",
        "stream/verify.py",
        "        if bad >= 0:\n",
        "        if False:\n",
        (
            "stream/test_malformed_memory.py::test_changed_page_bytes_are_refused_by_the_page_hash",
            "stream/test_malformed_memory.py::test_the_pages_of_a_frame_have_hashes_too",
        ),
    ),
    Bug(
        Kind.CHECKSUM,
        "the last page of a section is not hashed",
        "memory/page.pyx",
        "        # No prefetch: the receiver has just read these bytes from its pipe.\n"
        "        for i in range(npages):\n",
        "        for i in range(npages - 1):\n",
        ("memory/test_page.py::test_check_pages_finds_the_first_difference",),
    ),
    Bug(
        Kind.CHECKSUM,
        "END's digest is not compared",
        "stream/verify.py",
        "            digest=self.reader.digest.digest(),\n",
        "            digest=end.digest,\n",
        (
            "stream/test_malformed.py::test_bad_end_is_refused",
            "stream/test_malformed.py::test_the_digest_is_over_sections_of_every_type",
        ),
    ),
    Bug(
        Kind.CHECKSUM,
        "END's digest leaves out the header's checksum",
        "stream/reader.py",
        "        self.digest.update(checksum)\n",
        "",
        ("stream/test_reader.py::test_the_digest_is_over_the_checksums_before_end",),
    ),
    Bug(
        Kind.CHECKSUM,
        "END's totals are not compared",
        "stream/verify.py",
        "            if said != counted:\n",
        '            if said != counted and name == "digest":\n',
        ("stream/test_malformed.py::test_bad_end_is_refused",),
    ),
    Bug(
        Kind.CHECKSUM,
        "END's count of sections is not compared",
        "stream/verify.py",
        "            sections=section.sequence,\n",
        "            sections=end.sections,\n",
        ("stream/test_malformed.py::test_bad_end_is_refused",),
    ),
    Bug(
        Kind.CHECKSUM,
        "END's bytes of states are not compared",
        "stream/verify.py",
        "            state_bytes=tally.needed.nbytes,\n",
        "            state_bytes=end.state_bytes,\n",
        ("stream/test_malformed.py::test_bad_end_is_refused",),
    ),
    Bug(
        Kind.CHECKSUM,
        "a round's counts are not compared",
        "stream/verify.py",
        "        if (data, zero) != (tally.data_pages, tally.zero_pages):\n",
        "        if False:\n",
        ("stream/test_malformed_memory.py::test_bad_round_end_is_refused",),
    ),
    Bug(
        Kind.CHECKSUM,
        "the sequence number is not compared",
        "stream/reader.py",
        "        if sequence != self.sequence:\n",
        "        if False:\n",
        ("stream/test_malformed.py::test_wrong_sequence_number_is_refused",),
    ),
    Bug(
        Kind.CHECKSUM,
        "padding is not compared with zeros",
        "stream/reader.py",
        "        if any(padding):\n",
        "        if False:\n",
        ("stream/test_malformed.py::test_padding_has_to_be_complete_and_zero",),
    ),
    Bug(
        Kind.CHECKSUM,
        "the end of the input passes for END",
        "stream/verify.py",
        "        if not self._ended:\n",
        "        if False:\n",
        ("stream/test_malformed.py::test_end_of_file_is_not_a_trailer",),
    ),
    Bug(
        Kind.CHECKSUM,
        "the states are not asked whether all have come",
        "stream/verify.py",
        "        if self._contents and not self.is_dry_run:\n",
        "        if False:\n",
        ("backend/test_bhyve_contents.py::test_states_that_are_not_the_guests_are_refused",),
    ),
)
