"""Bugs of the memory: a page that changed is not sent, or arrives as another."""

from __future__ import annotations

from planted.bug import Bug, Kind

BUGS = (
    Bug(
        Kind.PAGE,
        "the last word of a page is not hashed",
        "memory/page.pxd",
        "    return hasher.function(page, PAGE_BYTES, hasher.secret, SECRET_BYTES)\n",
        "    return hasher.function(page, PAGE_BYTES - 8, hasher.secret, SECRET_BYTES)\n",
        ("memory/test_page.py::test_mark_changed_and_find_changed",),
    ),
    Bug(
        Kind.PAGE,
        "a page is zero if all but its last word are",
        "memory/page.pxd",
        "    return seen == 0\n",
        "    return seen == word\n",
        ("memory/test_batch.py::test_one_byte_makes_a_page_not_zero",),
    ),
    Bug(
        Kind.PAGE,
        "a page in place is zero if all but its last word are",
        "memory/page.pxd",
        "    for i in range(PAGE_BYTES // 8):\n",
        "    for i in range(PAGE_BYTES // 8 - 1):\n",
        ("memory/test_batch.py::test_in_place_only_pages_of_zeros_are_zero",),
    ),
    Bug(
        Kind.PAGE,
        "a page that became zero passes for unchanged",
        "memory/page.pxd",
        "    return entry_of(table, page)[0] == h ^ table.zero_hash\n",
        "    return entry_of(table, page)[0] == h ^ table.zero_hash or h == table.zero_hash\n",
        ("memory/test_batch.py::test_rounds_agree_with_the_model",),
    ),
    Bug(
        Kind.PAGE,
        "the last page of a piece is not looked at",
        "memory/page.pyx",
        "    cdef uint64_t ahead\n    while page < end:\n",
        "    cdef uint64_t ahead\n    if end > page:\n        end -= 1\n    while page < end:\n",
        ("send/test_scan.py::test_every_page_that_differs_is_marked_and_no_other",),
    ),
    Bug(
        Kind.PAGE,
        "the last pages of an extent are not marked",
        "memory/page.pyx",
        "            at += 64\n        while at < stop:\n",
        "            at += 64\n        while at < stop - 1:\n",
        ("memory/test_page.py::test_extents_are_marked_and_counted",),
    ),
    Bug(
        Kind.PAGE,
        "a bit is looked for one page too far",
        "memory/page.pxd",
        "        at = (at | 63) + 1\n    return end\n",
        "        at = (at | 63) + 2\n    return end\n",
        ("memory/test_batch.py::test_no_page_is_passed_over_from_any_page_on",),
    ),
    Bug(
        Kind.PAGE,
        "the live page is hashed, not its copy",
        "memory/batch.pyx",
        "        if not zero:\n            h = hash_page(self.hasher, copy)\n",
        "        if not zero:\n            h = hash_page(self.hasher, live)\n",
        ("memory/test_batch.py::test_the_copy_is_hashed_and_not_the_live_page",),
    ),
    Bug(
        Kind.PAGE,
        "a page without room is taken for sent",
        "memory/batch.pyx",
        "        if self.append(page, 1, ZERO if zero else DATA) == 0:\n            return False\n",
        "        set_hash(table, page, h)\n"
        "        if self.append(page, 1, ZERO if zero else DATA) == 0:\n            return False\n",
        ("memory/test_batch.py::test_an_extent_too_many_leaves_the_table",),
    ),
    Bug(
        Kind.PAGE,
        "a page that became a hole is not stated",
        "memory/batch.pyx",
        "                page = next_not_zero(table, page, end)\n",
        "                page = end\n",
        (
            "memory/test_batch.py::test_absent_pages_are_stated_once",
            "send/test_transfer.py::test_a_page_that_became_a_hole_becomes_zero",
        ),
    ),
    Bug(
        Kind.PAGE,
        "an extent joins one that ends a page before it",
        "memory/batch.pyx",
        "                or last.first + last.count != first\n",
        "                or last.first + last.count + 1 < first\n",
        ("memory/test_batch.py::test_rounds_agree_with_the_model",),
    ),
    Bug(
        Kind.PAGE,
        "the last page of a segment is not placed",
        "memory/scatter.pyx",
        "        hi = min(extent.first + extent.count, to.end)\n",
        "        hi = min(extent.first + extent.count, to.end - 1)\n",
        (
            "memory/test_scatter.py::test_scatter_over_segments",
            "memory/test_scatter.py::test_scatter_into_over_segments_and_rounds",
        ),
    ),
    Bug(
        Kind.PAGE,
        "the first page of a segment is not placed",
        "memory/scatter.pyx",
        "        lo = max(extent.first, to.base)\n",
        "        lo = max(extent.first, to.base + (to.base > 0))\n",
        ("memory/test_scatter.py::test_scatter_over_segments",),
    ),
    Bug(
        Kind.PAGE,
        "a page of a waiting guest that became zero stays as it was",
        "memory/scatter.pyx",
        "            if lo < hi and to.memory != NULL:\n",
        "            if False:\n",
        (
            "memory/test_scatter.py::test_scatter_into_over_segments_and_rounds",
            "backend/test_bhyve_sink.py::test_pages_that_were_data_and_are_zero_are_zero",
        ),
    ),
    Bug(
        Kind.PAGE,
        "a page in a file that became zero stays as it was",
        "memory/target.py",
        "            if kind == KIND_ZERO:\n",
        "            if False:\n",
        ("memory/test_scatter.py::test_a_file_and_a_mapping_take_the_same_pages",),
    ),
    Bug(
        Kind.PAGE,
        "a page that was placed is not noted",
        "memory/scatter.pyx",
        "    for i in range(lo, hi):\n"
        "        to.placed[i >> 6] |= <uint64_t>1 << (i & 63)\n",
        "    for i in range(lo, hi - 1):\n"
        "        to.placed[i >> 6] |= <uint64_t>1 << (i & 63)\n",
        ("memory/test_scatter.py::test_scatter_into_over_segments_and_rounds",),
    ),
    Bug(
        Kind.PAGE,
        "a write that was cut short is not continued",
        "memory/scatter.pyx",
        "        source += n\n        nbytes -= <uint64_t>n\n",
        "        source += n\n        nbytes = 0\n",
        (
            "memory/test_scatter.py::test_scatter_continues_short_writes_and_retries_eintr",
        ),
    ),
    Bug(
        Kind.PAGE,
        "the dirty log begins anew after round 0, not before",
        "send/transfer.py",
        "        changed = self._source.changed()\n"
        "        if changed is None or way.everything:\n",
        "        changed = None if way.everything else self._source.changed()\n"
        "        if changed is None or way.everything:\n",
        ("send/test_transfer.py::test_a_dirty_log_says_what_to_look_at",),
    ),
    Bug(
        Kind.PAGE,
        "the last page of a stride is left out",
        "send/strides.py",
        "min(first + STRIDE_PAGES, border - base)",
        "min(first + STRIDE_PAGES - 1, border - base)",
        ("send/test_strides.py::test_strides_cover_the_guest_exactly",),
        is_quick=True,
    ),
    Bug(
        Kind.PAGE,
        "a section has pages of two segments",
        "send/transfer.py",
        "        if segment != way.segment:  # a section has pages of one segment only\n"
        "            self._flush(way, base_page)\n",
        "        if segment != way.segment:\n",
        ("send/test_transfer.py::test_memory_arrives_byte_for_byte",),
    ),
    Bug(
        Kind.PAGE,
        "the last scan is of a piece too few",
        "send/scan.py",
        "            if work >= PIECE_PAGES or at - first >= _MAX_PIECE_PAGES or at == border:\n",
        "            if work >= PIECE_PAGES or at - first >= _MAX_PIECE_PAGES:\n",
        ("send/test_scan.py::test_every_page_that_differs_is_marked_and_no_other",),
    ),
    Bug(
        Kind.PAGE,
        "the pages of a piece are counted from the segment, not from the piece",
        "send/transfer.py",
        "                origin=first,\n",
        "                origin=0,\n",
        ("send/test_transfer.py::test_threads_send_what_one_thread_sends",),
        also=("ValueError",),
    ),
    Bug(
        Kind.PAGE,
        "the last round of bhyve's guest believes the log of the vCPUs",
        "backend/bhyve/source.py",
        "        return None if self._was_asked else self._opened.memory.changed()\n",
        "        return self._opened.memory.changed()\n",
        ("backend/test_bhyve_pages.py::test_the_last_round_believes_no_log",),
    ),
    Bug(
        Kind.SPLICE,
        "pages of a running guest are spliced",
        "send/transfer.py",
        "        if last and self._last_in_place:\n",
        "        if self._last_in_place:\n",
        ("send/test_transfer.py::test_the_last_round_is_written_in_place",),
    ),
    Bug(
        Kind.SPLICE,
        "pages are spliced in the kept form too",
        "send/rounds.py",
        "            last_in_place=job.opts.form == Form.ANSWERED,\n",
        "            last_in_place=True,\n",
        ("cli/test_transports.py::test_what_is_read_after_the_guest_runs_again_is_sound",),
    ),
    Bug(
        Kind.SPLICE,
        "a batch is spliced, and filled again before it was read",
        "send/transfer.py",
        "        pages = batch.page_view()\n        if self._zstd",
        "        pages = batch.page_view()\n"
        "        if HAS_VMSPLICE and len(pages):\n"
        "            whole = fmt.EXTENT.pack(0, batch.npages, fmt.KIND_DATA)\n"
        "            return PagesInPlace(pages, 0, memoryview(whole), batch.npages), 0\n"
        "        if self._zstd",
        ("send/test_transfer.py::test_a_guest_that_writes_during_the_rounds_arrives_as_it_was_paused",),
    ),
)
