"""bhystream(5): its structures, read and written.

format.py      every constant and structure
writer.py      sections onto a descriptor
reader.py      sections off one: frames, caps, checksums, order
verify.py      a strict walk of the sections' contents
contents.py    the checks of a hypervisor's own sections
"""
