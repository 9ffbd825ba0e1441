"""A strict reader of bhystream(5), made from the page alone.

It shares no code with the package: if the two readers disagree about a stream, one of them differs
from the page.  This reader favors plainness over speed, and keeps the guest's data pages in a
dict, so it is for the small streams of the tests.

    found.py    what a stream holds, and the exception for a stream that breaks a rule
    values.py   the contents of the head: JSON, HOST, LAYOUT, CONFIG, DEVICES
    frame.py    one zstd frame
    walk.py     the sections in their order, the rounds, the state, the trailer

Data flow: `walk.Source` reads exact lengths and keeps the offset; `walk.Reader.run` reads one
section after another and checks what all sections share; one method for each type checks the
contents and stores them in `Stream`.  Nothing is allocated by a length of the stream before that
length is within its cap, and then only as the bytes arrive.

The page leaves one choice: here, that TIME may not follow an incomplete state is a rule of the
place, not of the contents.
"""

from spec_reader.found import Refused, Stream
from spec_reader.walk import read

__all__ = ["Refused", "Stream", "read"]
