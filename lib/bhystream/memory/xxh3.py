"""Find the C functions of XXH3 in the xxhash package.

Every page hash of bhystream(5) is XXH3-64 with the seed of the stream's
header.  The package's Python call costs an object and the GIL for each page,
so the hot loops call C.  Nothing of XXH3 is compiled here: the package's
extension module, or the shared library that it was linked with, exports the
functions, and dlsym(3) on the module's handle finds both.

With a seed other than 0 the library derives a secret of 192 bytes from the
seed at every call.  Deriving it once per stream is 1.3 times as fast, and for
more than 240 bytes XXH3 with that secret is by definition XXH3 with the seed.
That is not taken on trust: a function is used only if it agrees with the
package's own digest of a page.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import xxhash

from bhystream.errors import InternalError

# XXH3_SECRET_DEFAULT_SIZE of xxhash.h: what generateSecret_fromSeed writes.
SECRET_BYTES = 192

# The names, in order of preference.  "dispatch" picks AVX2 or AVX-512 at run time;
# wheels have this function, distributions' packages may lack it.
HASHES = ("XXH3_64bits_withSecret_dispatch", "XXH3_64bits_withSecret")
MAKE_SECRET = "XXH3_generateSecret_fromSeed"

# A page without repetition, so that a function that reads too few bytes does not pass.
PROBE = struct.pack("<2048H", *range(2048))
PROBE_SEED = 0x9E3779B97F4A7C15

_HASH = ctypes.CFUNCTYPE(
    ctypes.c_uint64, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t
)
_MAKE_SECRET = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_uint64)


class Functions(NamedTuple):
    """Addresses of two C functions, valid for the life of the process.

    hash_address: uint64_t f(const void *input, size_t input_bytes,
    const void *secret, size_t secret_bytes).  secret_address:
    void f(void *secret, uint64_t seed); it writes SECRET_BYTES bytes.
    hash_name: the symbol of the hash function, for reports.
    """

    hash_name: str
    hash_address: int
    secret_address: int


@functools.cache
def find() -> Functions:
    """Return the functions to use, looked up and checked once per process.

    Raises InternalError, which names the package, if no function in it works.
    """
    path = importlib.import_module("xxhash._xxhash").__file__
    try:
        # ctypes never unloads, so the addresses stay valid.
        library = ctypes.CDLL(path)
    except OSError as error:
        raise InternalError(f"cannot load the xxhash package: {error}") from error
    return look_up(library, xxhash.xxh3_64_intdigest)


def look_up(library: Any, digest: Callable[[bytes, int], int]) -> Functions:
    """Return the first functions of `library` that agree with `digest`.

    library: has symbols as attributes, as a ctypes.CDLL has.  digest(bytes, seed):
    returns the right value.  Raises InternalError if no function agrees.
    """
    make_secret = getattr(library, MAKE_SECRET, None)
    if make_secret is None:
        raise InternalError(f"the xxhash package has no C function {MAKE_SECRET}")
    secret = ctypes.create_string_buffer(SECRET_BYTES)
    ctypes.cast(make_secret, _MAKE_SECRET)(secret, PROBE_SEED)
    expected = digest(PROBE, PROBE_SEED)
    for name in HASHES:
        symbol = getattr(library, name, None)
        if symbol is None:
            continue
        value = ctypes.cast(symbol, _HASH)(PROBE, len(PROBE), secret.raw, SECRET_BYTES)
        if value == expected:
            return Functions(name, _address(symbol), _address(make_secret))
    raise InternalError(
        f"the xxhash package has no C function that works: tried {', '.join(HASHES)}"
    )


def _address(symbol: Any) -> int:
    address = ctypes.cast(symbol, ctypes.c_void_p).value
    if address is None:  # dlsym(3) may find a symbol whose value is NULL
        raise InternalError("the xxhash package exports a null function")
    return address
