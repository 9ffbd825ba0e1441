"""A bhyve work-alike for machines that have no bhyve.

`BHYSEND_VMM_DIR=DIR python -m bhystream.standin [options] NAME` is started
like bhyve and keeps bhyve's contract: the memory node (node.py), the
checkpoint socket (checkpoint.py), what a checkpoint saves and when (saving.py,
xo.py, below.py), the restore (restore.py), the configuration (config.py), exit
statuses (__main__.py).  kernel.py is what the bhyve backend sees of its host,
vm.py of one VM, sysctl.py what sysctl(8) says; supervisor.py plays vm-bhyve;
stage.py makes two hosts for the demonstration (bhystream.demo).  The guest
inside (guest.py, vcpu.py, devices.py) proves its own memory and registers
(proof.py).

    DIR/host.json        what this host is like, and how it misbehaves: settings.py
    DIR/vmm/NAME         the memory node: sparse, file offset = guest physical address
    DIR/vmm/NAME.map     memory map and topology, JSON
    DIR/vmm/NAME.dirty   one byte a page, where the host keeps a dirty log
    DIR/vmm/NAME.cpu     registers and FPU of its vCPUs, and which of them may run
    DIR/vmm/NAME.swapped one byte a page that mincore(2) would not call resident
    DIR/run/NAME         the checkpoint socket
    DIR/net/TAP          a tap; its content is its bridge
    DIR/vm/NAME/         vm-bhyve's directory of the guest

The stand-in is no FreeBSD: what has run on it has not run on bhyve.
"""
