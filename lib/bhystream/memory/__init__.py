"""Pages: hashed, compared, copied and placed.

page.pyx batch.pyx   the hot loops; they import nothing of ours but xxh3
xxh3.py        finds XXH3's C functions in the xxhash package
extent.py      the packed extent, as it lies in a stream and before the loops
hole.py        holes of files, found and made
mapping.py     mappings given up, whoever still looks at them
target.py      where pages arrive: a file, or the memory of a guest that waits
"""
