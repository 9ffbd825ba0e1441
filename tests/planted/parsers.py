"""Bugs of the other parsers of what another program says: a length that is not checked.

The answers of a destination, bhyve's snapshot files, and the messages of bhyve's socket.
"""

from __future__ import annotations

from planted.bug import Bug, Kind

ANSWERS = "handover/answers.py"
META = "backend/bhyve/snapshot.py"
NVLIST = "backend/bhyve/nvlist.py"

BUGS = (
    Bug(
        Kind.LENGTH,
        "an answer may have any length",
        ANSWERS,
        "_LINE.fullmatch(line) if len(line) <= MAX_LINE_BYTES else None",
        "_LINE.fullmatch(line)",
        ("handover/test_answers.py::test_a_line_has_a_longest_form",),
        is_quick=True,
    ),
    Bug(
        Kind.LENGTH,
        "an answer need not end",
        ANSWERS,
        "        if self.hello and len(self._rest) > MAX_LINE_BYTES:\n",
        "        if False:\n",
        ("handover/test_answers.py::test_a_line_without_end_is_an_error",),
    ),
    Bug(
        Kind.LENGTH,
        "noise before HELLO need not end",
        ANSWERS,
        "            if self._noise_bytes > MAX_NOISE_BYTES:\n",
        "            if False:\n",
        ("handover/test_answers.py::test_noise_before_hello_is_passed_on_up_to_its_limit",),
    ),
    Bug(
        Kind.LENGTH,
        "noise without a newline need not end",
        ANSWERS,
        "        if not self.hello and len(self._rest) > MAX_NOISE_BYTES:\n",
        "        if False:\n",
        ("handover/test_answers.py::test_noise_without_a_newline_is_limited_too",),
    ),
    Bug(
        Kind.LENGTH,
        "an answer may have any number of arguments",
        ANSWERS,
        "    if WORDS.get(word) != len(raw):\n",
        "    if word not in WORDS:\n",
        ("handover/test_answers.py::test_a_wrong_number_of_arguments_is_refused",),
        also=("IndexError", "TypeError"),
    ),
    Bug(
        Kind.LENGTH,
        "FILE.meta may have any length",
        META,
        "    if len(text) > MAX_META_BYTES:\n",
        "    if False:\n",
        ("backend/test_bhyve_limits.py::test_the_caps_of_a_meta",),
    ),
    Bug(
        Kind.LENGTH,
        "FILE.meta may list any number of blobs",
        META,
        "    if not isinstance(values, list) or len(values) > MAX_ITEMS:\n",
        "    if not isinstance(values, list):\n",
        ("backend/test_bhyve_limits.py::test_the_caps_of_a_meta",),
    ),
    Bug(
        Kind.LENGTH,
        "blobs may overlap or leave gaps",
        META,
        "        if item.offset_bytes != at:\n",
        "        if False:\n",
        ("backend/test_bhyve_snapshot.py::test_a_meta_that_lies_is_refused_by_name",),
    ),
    Bug(
        Kind.LENGTH,
        "the blobs together may have any length",
        META,
        "    if at > room_bytes:\n",
        "    if False:\n",
        (
            "backend/test_bhyve_snapshot.py::test_a_meta_that_lies_is_refused_by_name",
            "backend/test_bhyve_limits.py::test_the_caps_of_a_meta",
        ),
    ),
    Bug(
        Kind.LENGTH,
        "a blob may be empty or longer than bhyve's buffer",
        META,
        '_number(entry, "size", 1, MAX_BLOB_BYTES, f"{where}.")',
        '_number(entry, "size", 0, MAX_ALL_BYTES, f"{where}.")',
        ("backend/test_bhyve_limits.py::test_the_caps_of_a_meta",),
    ),
    Bug(
        Kind.LENGTH,
        "FILE.kern may have another size than FILE.meta says",
        META,
        "    if len(view) != meta.kern_bytes:\n",
        "    if False:\n",
        ("backend/test_bhyve_snapshot.py::test_cut_refuses_a_kern_of_another_size",),
    ),
    Bug(
        Kind.LENGTH,
        "a state may have another size than FILE.meta says",
        META,
        "        if len(state.data) != item.size_bytes:\n",
        "        if False:\n",
        (
            "backend/test_bhyve_contents.py::test_states_that_are_not_the_guests_are_refused",
            "backend/test_bhyve_snapshot.py::test_states_that_are_not_those_of_the_meta_are_refused",
        ),
    ),
    Bug(
        Kind.LENGTH,
        "the state may be shaped otherwise than the rehearsal",
        META,
        "    if planned.items == found.items:\n        return\n",
        "    return\n",
        (
            "backend/test_bhyve_snapshot.py::"
            "test_a_state_that_is_not_shaped_as_in_the_rehearsal_is_refused",
        ),
    ),
    Bug(
        Kind.LENGTH,
        "the registers of a vCPU may have any length",
        "backend/bhyve/fpu.py",
        "    if not named or not _LEAST_BYTES <= size <= STATE_LIMIT_BYTES:\n",
        "    if not named or size < _LEAST_BYTES:\n",
        ("backend/test_bhyve_limits.py::test_the_length_of_the_registers_of_a_vcpu",),
    ),
    Bug(
        Kind.LENGTH,
        "a state of QEMU may have any length",
        "backend/qemu/contents.py",
        "        if len(state.data) > MAX_STATE_BYTES:\n",
        "        if False:\n",
        ("recv/test_judge.py::test_a_qemu_guest_has_one_state",),
    ),
    Bug(
        Kind.LENGTH,
        "a message of bhyve's may have any length",
        NVLIST,
        "    if size_bytes > SIZE_CAP_BYTES:\n",
        "    if False:\n",
        (
            "backend/test_bhyve_nvlist.py::test_a_size_over_the_cap_is_refused_before_its_bytes_come",
        ),
        also=("TimeoutError",),
    ),
    Bug(
        Kind.LENGTH,
        "a message of bhyve's may announce any number of descriptors",
        NVLIST,
        "    if nfds > DESCRIPTOR_CAP:\n",
        "    if False:\n",
        ("backend/test_bhyve_nvlist.py::test_malformed_lists_are_refused",),
    ),
    Bug(
        Kind.LENGTH,
        "a message of bhyve's may have another length than it says",
        NVLIST,
        "    if len(data) - HEADER.size != size_bytes:\n",
        "    if False:\n",
        ("backend/test_bhyve_nvlist.py::test_malformed_lists_are_refused",),
    ),
    Bug(
        Kind.LENGTH,
        "a pair of a message may be cut",
        NVLIST,
        "    if len(data) - at < name_bytes + data_bytes:\n",
        "    if False:\n",
        (
            "backend/test_bhyve_nvlist.py::"
            "test_every_cut_of_the_pairs_is_refused_though_the_size_agrees",
        ),
    ),
    Bug(
        Kind.LENGTH,
        "a value of a message may have another length than its type",
        NVLIST,
        '    if len(data) != size_bytes:\n        raise _broken(f"{name!r} has',
        '    if False:\n        raise _broken(f"{name!r} has',
        ("backend/test_bhyve_nvlist.py::test_malformed_lists_are_refused",),
        also=("error", "IndexError"),
    ),
)
