"""Bugs of the samples of disks: a disk that is not the guest's is taken."""

from __future__ import annotations

from planted.bug import Bug, Kind

BUGS = (
    Bug(
        Kind.DISK,
        "bhyrecv does not wait for the comparison",
        "recv/incoming.py",
        "            building.require_disks()\n",
        "",
        ("cli/test_disks.py::test_a_wrong_and_a_stale_disk_are_refused_and_a_copy_is_taken",),
    ),
    Bug(
        Kind.DISK,
        "bhysend samples no disk",
        "send/outgoing.py",
        "        if sampled:\n",
        "        if False:\n",
        ("cli/test_disks.py::test_a_wrong_and_a_stale_disk_are_refused_and_a_copy_is_taken",),
    ),
    Bug(
        Kind.DISK,
        "the disks are sampled before the command at the pause has ended",
        "send/outgoing.py",
        "            custody.wait_for_hook()\n        watch, start_ns",
        "            pass\n        watch, start_ns",
        ("cli/test_disks.py::test_the_disks_are_sampled_after_the_command_at_the_pause",),
    ),
    Bug(
        Kind.DISK,
        "a sample that differs is none",
        "recv/sampled.py",
        " != hash_\n",
        " == None\n",
        ("recv/test_sampled.py::test_one_place_that_differs_is_enough",),
        also=("ValueError",),
        is_quick=True,
    ),
    Bug(
        Kind.DISK,
        "a disk that cannot be read is taken",
        "recv/sampled.py",
        "        except OSError as error:\n",
        '        except OSError as error:\n            return ""\n',
        ("recv/test_sampled.py::test_a_disk_that_cannot_be_read_is_a_reason",),
        also=("ValueError",),
        is_quick=True,
    ),
    Bug(
        Kind.DISK,
        "only the beginning of the disk is sampled, not that of its partitions",
        "send/sampling.py",
        "partitions(begin)[:MAX_PARTITIONS]",
        "[]",
        ("send/test_sampling.py::test_the_beginning_of_each_partition_is_sampled",),
        is_quick=True,
    ),
    Bug(
        Kind.LENGTH,
        "a sample may end beyond its disk",
        "stream/disks.py",
        "        if end > size_bytes:\n",
        "        if False:\n",
        ("stream/test_disks.py::test_a_malformed_one_is_refused",),
        is_quick=True,
    ),
    Bug(
        Kind.DISK,
        "a guest is taken for the one that bhyrecv has started under its name",
        "backend/bhyve/opened.py",
        "    if found and is_its:\n",
        "    if found:\n",
        ("cli/test_ownconf.py::test_the_configuration_of_an_earlier_process_is_not_believed",),
    ),
)
