"""The look-up of XXH3: its order, its check by value, and its errors."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import xxhash

from bhystream.errors import InternalError
from bhystream.memory import xxh3

HASH = ctypes.CFUNCTYPE(
    ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t
)
MAKE_SECRET = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64)
DISPATCH, PLAIN = xxh3.HASHES
RIGHT = 0xFEDCBA9876543210


def stand_in(**values: int) -> SimpleNamespace:
    """Make a library whose hash functions return the given values.

    A function returns its value only if it gets the page, and the secret that was
    made from the seed.
    """
    symbols: dict[str, object] = {}

    def make_secret(secret: int, seed: int) -> None:
        ctypes.memmove(secret, seed.to_bytes(8, "little") * 24, 192)

    def hashing(value: int) -> object:
        def hash_page(page: int, nbytes: int, secret: int, secret_bytes: int) -> int:
            given = ctypes.string_at(page, nbytes), ctypes.string_at(secret, secret_bytes)
            wanted = xxh3.PROBE, xxh3.PROBE_SEED.to_bytes(8, "little") * 24
            return value if given == wanted else 1

        return HASH(hash_page)

    symbols[xxh3.MAKE_SECRET] = MAKE_SECRET(make_secret)
    symbols.update({name: hashing(value) for name, value in values.items()})
    return SimpleNamespace(**symbols)


def digest(data: bytes, seed: int) -> int:
    assert (data, seed) == (xxh3.PROBE, xxh3.PROBE_SEED)
    return RIGHT


def test_the_package_has_functions_that_work() -> None:
    found = xxh3.find()
    assert found.hash_name in xxh3.HASHES
    make_secret = MAKE_SECRET(found.secret_address)
    hash_page = HASH(found.hash_address)
    for seed in (0, 1, 2**63, 2**64 - 1):
        secret = ctypes.create_string_buffer(xxh3.SECRET_BYTES)
        make_secret(ctypes.addressof(secret), seed)
        page = ctypes.create_string_buffer(xxh3.PROBE, 4096)
        value = hash_page(ctypes.addressof(page), 4096, ctypes.addressof(secret), 192)
        assert value == xxhash.xxh3_64_intdigest(xxh3.PROBE, seed=seed)


def test_the_look_up_is_done_once() -> None:
    assert xxh3.find() is xxh3.find()


def test_dispatch_is_preferred() -> None:
    library = stand_in(**{DISPATCH: RIGHT, PLAIN: RIGHT})
    found = xxh3.look_up(library, digest)
    assert found.hash_name == DISPATCH
    assert found.hash_address == ctypes.cast(getattr(library, DISPATCH), ctypes.c_void_p).value
    assert (
        found.secret_address
        == ctypes.cast(library.XXH3_generateSecret_fromSeed, ctypes.c_void_p).value
    )


@pytest.mark.parametrize("values", [{PLAIN: RIGHT}, {DISPATCH: RIGHT ^ 1, PLAIN: RIGHT}])
def test_absent_or_wrong_dispatch_falls_back(values: dict[str, int]) -> None:
    assert xxh3.look_up(stand_in(**values), digest).hash_name == PLAIN


@pytest.mark.parametrize("values", [{}, {PLAIN: 0}, {DISPATCH: RIGHT - 1, PLAIN: RIGHT + 1}])
def test_no_function_that_works_is_an_error_naming_the_package(values: dict[str, int]) -> None:
    with pytest.raises(InternalError, match="the xxhash package has no C function that works"):
        xxh3.look_up(stand_in(**values), digest)


def test_no_secret_is_an_error_naming_the_package() -> None:
    library = stand_in(**{DISPATCH: RIGHT})
    delattr(library, xxh3.MAKE_SECRET)
    with pytest.raises(InternalError, match="the xxhash package has no C function XXH3_gen"):
        xxh3.look_up(library, digest)


def test_a_library_without_xxh3_is_refused() -> None:
    with pytest.raises(InternalError, match="xxhash package"):
        xxh3.look_up(ctypes.CDLL(None, use_errno=False), digest)
