"""The real programs in real pipes, moving a real Linux guest.

pipeline.py starts the processes and ends them; tap.py stands in a pipe and stops, cuts or
damages the stream at a chosen section; sshd.py is a private SSH server; travel.py is a host and
a guest on its way through one QEMU after the other.  conftest.py lends each test a host of its
own and each module a guest.
"""
