"""The bhyve backend: a guest named by its name, on FreeBSD or on its stand-in.

The pieces, in the order in which a move meets them:

    host.py       what is asked of the host: the protocols of the device half
    freebsd.py    the FreeBSD host: sysctls, base programs, mounts, taps
      freebsd_vm.py ioctl.py   one VM: memory map, mapping, topology, dirty log
      freebsd_text.py libc.py  what programs print; mincore(2) and sysctl(3)
      freebsd_kld.py freebsd_disk.py  what vmm.ko can; disks and interfaces
    vmbhyve.py    vm-bhyve's description of a guest, and its last start
      vmconf.py   vm-bhyve's own files by its own rules, and what has changed in them
    locks.py      vm-bhyve's locks: told before the kill, changed after it
    argv.py legacy.py   bhyve's command line -> bhyve_config(5) keys
    config.py     a configuration -> the CONFIG section, or a refusal
    defaults.py   what bhyve would make up from names and paths, made explicit
    keys.py       every key that may travel, and every one that stays
    validate.py   a CONFIG section from a stream is hostile until it passes
    resources.py  the operator's -o key=value and -x key
    compare.py    two configurations, and how they differ
    identity.py   the host's half of the HOST section
    contents.py   BhyveContents: stream's Contents
    verdict.py    the reasons against a guest on this host
      backing.py  what stands behind disks and cards, here and there
      supervisors.py  what would start a guest again that has moved
    memory.py     guest memory, mapped; residency.py: which pages were touched
    place.py      what is recorded of a guest, and its two directories
    nvlist.py     libnv, the language of the checkpoint socket
    checkpoint.py the client of that socket: one request, and what came of it
      listening.py  who serves it
    snapshot.py   FILE.kern and FILE.meta <-> the STATE sections
      snapshotfiles.py  where they are, with FILE, and what is read of them
    command.py    configuration + resources -> what bhyve is started with
    source.py     BhyveSource: base.Source
      opened.py     which guest it is, what it runs with, its memory
      ready.py      all that its pause needs, and the pause
      snapshotdir.py  the directory of a guest that is to be held
      rehearsal.py  a checkpoint that bhyve ends by itself
      fifo.py       the FIFO that bhyve stands in
    held.py       BhyveHeld: base.Paused of a source's guest, and its record
    fpu.py        the FPU that snapshots leave out: stored and loaded by the vCPUs
      fpustate.py   of a held guest, between two marks
      stub.py       the few instructions that they run
      lent.py       vCPU and pages lent to them, and given back
      physical.py registers.py  memory by physical address; vmm's register numbers
    sink.py       BhyveSink: base.Sink
      wanted.py     what is wanted of the guest here, and whether it can be had
      restore.py    `bhyve -r`, started, and held in its read
      heldrestore.py  it is loaded, and let go
      restoring.py  its process, and its VM's memory
      lastpage.py   what it is held by
    loaded.py     base.Paused of a destination's guest
    cold.py       snapshot files as base.Source and base.Sink

Everything but freebsd*.py, ioctl.py and libc.py is the same code over the
stand-in, and is tested there.

Run on FreeBSD 15.1, on an AMD processor that QEMU emulates: moves in every
form, between two hosts and on one, with the holds and the FPU, and most of what
can fail in them.
Everything else was read in its sources, and so was all of 14, of 16 and of
Intel's.  Which of the two a fact is, and where it stands, is said with it.
"""
