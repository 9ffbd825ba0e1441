"""The bhyve backend: a guest, known by its name, on FreeBSD or on the stand-in.

The pieces, in the order in which a move meets them:

    host.py       what the backend asks of the host: the protocols of the device half
    freebsd.py    the FreeBSD host: sysctls, base programs, mounts, taps
      freebsd_trace.py  a bhyve that is stopped before it reads the memory, and given answers
      freebsd_vm.py ioctl.py   one VM: memory map, mapping, topology, dirty log
      freebsd_text.py libc.py  what programs print; mincore(2) and sysctl(3)
      freebsd_kld.py freebsd_disk.py  what vmm.ko can; disks and interfaces
      freebsd_announce.py  the frames that tell the network where a guest is
    datastore.py  where vm-bhyve keeps a guest
    vmbhyve.py    vm-bhyve's description of a guest, and its last start
      vmconf.py   vm-bhyve's files, read by vm-bhyve's rules, and what has changed in them
    locks.py      vm-bhyve's locks: what they say while a guest arrives, leaves, and is gone
    ownconf.py    what bhyrecv has started a guest with, kept for its next move or start
    argv.py legacy.py   bhyve's command line -> bhyve_config(5) keys
    config.py     a configuration -> the CONFIG section, or a refusal
    defaults.py   the values that bhyve would make up from names and paths, made explicit
    keys.py       every key that may travel, and every key that stays
    validate.py   the checks of a stream's CONFIG section, which is hostile until it passes
    resources.py  the operator's -o key=value and -x key
    compare.py    two configurations, and how they differ
    identity.py   the host's half of the HOST section
    contents.py   BhyveContents: contents.Contents
    verdict.py    the reasons against a guest on this host
      backing.py  what stands behind disks and cards, at the source and at the destination
      supervisors.py  what would start a guest again after the guest has moved
      cures.py    the edit of a configuration that lets a guest move
    layout.py     where bhyve puts a guest's memory
    memory.py     guest memory, mapped; residency.py: which pages were touched
    restoredguest.py  the record of a guest at the destination, and its two directories
    nvlist.py     libnv, the language of the checkpoint socket
    checkpoint.py the client of the checkpoint socket: one request, and its outcome
      listening.py  who listens at the checkpoint socket
    snapshot.py   FILE.kern and FILE.meta <-> the STATE sections
      snapshotfiles.py  the paths of a snapshot's files, and the reading of the files
    command.py    configuration + resources -> the file and the argv that start bhyve
    source.py     BhyveSource: base.Source
      opened.py     the guest's identity, its configuration, and its memory
      ready.py      everything that the pause needs, and the pause
      snapshotdir.py  the directory of a guest that is to be held
      rehearsal.py  a checkpoint that bhyve finishes without being held
      fifo.py       the FIFO in which bhyve's last write waits
    paused.py     BhyvePaused: base.Paused of a source's guest, and its record
    fpu.py        the FPU that snapshots leave out: stored and loaded by the vCPUs
      carriable.py  which vCPUs' FPU cannot be carried, as far as a running guest shows
      fpustate.py   the FPU of a held guest, with the directory's journal
      stub.py       the few instructions that the vCPUs run
      lent.py       a vCPU and twelve pages, lent to the stub and given back
      physical.py registers.py  memory by physical address; vmm's register numbers
    sink.py       BhyveSink: base.Sink
      wanted.py     what the operator wants of the guest here, and whether it can be had
      restore.py    `bhyve -r`, started, and stopped in its read of the memory
      waitingrestore.py  that bhyve, given its state and let go
      restoring.py  the process of that bhyve, and its VM's memory
      vmstart.py    that bhyve, started by vm-bhyve's `vm start`; vmdirectory.py: its end
      vmshim.py     the `bhyve` that vm-bhyve finds, a program of its own
      powerbutton.py  what SIGTERM means to that bhyve, and to the source's
      lastpage.py   the missing last page, for which that bhyve waits
    loaded.py     base.Paused of a destination's guest
    clocks.py     the guest's clocks, moved on by the length of the pause
    network.py    what the network is told when a guest runs here
    cold.py       snapshot files as base.Snapshot and base.Sink

All of the code but freebsd*.py, ioctl.py and libc.py also runs over the
stand-in, and is tested there.

Run on FreeBSD 15.1, on an AMD processor that QEMU emulates: moves in every
form, between two hosts and on one, with the holds and the FPU, and most of the
failures that can occur in those moves.
All other facts were read in FreeBSD's sources, and so was everything about
FreeBSD 14, FreeBSD 16 and Intel's processors.  The comments say of each fact
whether it was run or read, and name its source.
"""
