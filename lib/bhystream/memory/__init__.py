"""Pages: hashed, compared, copied and placed.

page.pyx batch.pyx scatter.pyx   the hot loops; they import nothing of ours but xxh3
splice.pyx     pages given to a pipe without a copy, and taken out of one
inplace.py     the pages of a section, sent from where they are
xxh3.py        finds XXH3's C functions in the xxhash package
extent.py      the packed extent, the same in a stream and for the loops
hole.py        holes of files, found and made
mapping.py     mappings released, even if views of them are still in use
target.py      where pages arrive: a file, or the memory of a waiting guest
"""
