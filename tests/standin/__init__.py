"""The stand-in, tested from outside: processes, sockets, files, what the guest prints."""
