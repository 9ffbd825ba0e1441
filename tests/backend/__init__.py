"""The QEMU backend, against real QEMUs without an operating system."""
