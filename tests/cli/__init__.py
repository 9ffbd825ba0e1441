"""The real programs in real pipes, moving a real Linux guest.

pipeline.py starts the processes and ends them; tap.py is a stage of a pipe that stops, cuts or
damages the stream at a chosen section; sshd.py is a private SSH server; travel.py is a host and
a guest that moves from one hypervisor to the next.  conftest.py lends each test a host of its
own and each module a guest.
"""
