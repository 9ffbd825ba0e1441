"""Tests of the stand-in from outside: processes, sockets, files, and the guest's console."""
