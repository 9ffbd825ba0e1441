"""A bhyve work-alike for machines that have no bhyve.

`BHYSEND_VMM_DIR=DIR python -m bhystream.standin [options] NAME` is started
like bhyve and keeps bhyve's contract: the memory node (node.py), the
checkpoint socket (checkpoint.py), what a checkpoint saves and when (saving.py,
xo.py, below.py), the restore (restore.py), the configuration (config.py) and
the exit statuses (__main__.py).  kernel.py plays the host that the bhyve backend
sees, vm.py one VM of that host, sysctl.py the values of sysctl(8);
supervisor.py plays vm-bhyve; stage.py makes two hosts for the demonstration
(bhystream.demo).  The guest inside the stand-in (guest.py, vcpu.py, devices.py)
checks its own memory and registers (proof.py).

    DIR/host.json        properties of this host, and its faults: settings.py
    DIR/vmm/NAME         the memory node: sparse, file offset = guest physical address
    DIR/vmm/NAME.map     memory map and topology, JSON
    DIR/vmm/NAME.dirty   one byte a page, if the host keeps a dirty log
    DIR/vmm/NAME.cpu     registers and FPU of the vCPUs, and which vCPUs may run
    DIR/vmm/NAME.swapped one byte a page, not 0 if the page is swapped out for mincore(2)
    DIR/run/NAME         the checkpoint socket
    DIR/net/TAP          a tap; the file contains the name of the tap's bridge
    DIR/vm/NAME/         vm-bhyve's directory of the guest

The stand-in is not FreeBSD: code that has run on the stand-in has not run on bhyve.
"""
