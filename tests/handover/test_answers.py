"""Answers: the lines against bhystream(5), the parser, and the inbox that bhysend reads."""

from __future__ import annotations

import threading

import pytest

from bhystream.errors import FormatError, GuestError, IncompatibleError
from bhystream.handover.answers import Answer, Inbox, Parser, pack, unpack
from support.memory_source import seeded

# The limits in bhystream(5).
MAX_LINE_BYTES, MAX_NOISE_BYTES = 512, 4096
ID, OTHER = "0123456789abcdef" * 2, "f" * 32
NONCE = "00ff" * 8
HELLO = Answer(ID, "HELLO", ("hv2/a1", "/var/lib/bhysend"))
ELSEWHERE = Answer(ID, "HELLO", ("hv3/b2", "/var/lib/bhysend"))

# Each word of bhystream(5), ANSWERS, with its arguments, and its line.
LINES = [
    (HELLO, f"bhys1 {ID} HELLO hv2/a1 /var/lib/bhysend\n"),
    (Answer(ID, "SEEN", ("17",)), f"bhys1 {ID} SEEN 17\n"),
    (Answer(ID, "ACCEPT"), f"bhys1 {ID} ACCEPT\n"),
    (Answer(ID, "REFUSED", ("no disk",)), f"bhys1 {ID} REFUSED no%20disk\n"),
    (Answer(ID, "READY", (NONCE,)), f"bhys1 {ID} READY {NONCE}\n"),
    (Answer(ID, "RUNNING"), f"bhys1 {ID} RUNNING\n"),
    (Answer(ID, "FAILED", ("100%\n",)), f"bhys1 {ID} FAILED 100%25%0a\n"),
    (Answer(ID, "RAN"), f"bhys1 {ID} RAN\n"),
    (Answer(ID, "UNKNOWN"), f"bhys1 {ID} UNKNOWN\n"),
]
WORDS = [answer.word for answer, _ in LINES]


def line_of(text: str) -> bytes:
    """Return a line of our stream."""
    return f"bhys1 {ID} {text}\n".encode("latin-1")


# Lines.


@pytest.mark.parametrize(("answer", "line"), LINES, ids=WORDS)
def test_an_answer_and_its_line(answer: Answer, line: str) -> None:
    assert pack(answer) == line.encode("ascii")
    assert unpack(line.encode("ascii")) == answer


@pytest.mark.parametrize(("answer", "line"), LINES, ids=WORDS)
def test_a_wrong_number_of_arguments_is_refused(answer: Answer, line: str) -> None:
    fewer = line.rstrip("\n").rpartition(" ")[0] + "\n"
    for text in [line[:-1] + " 1\n", *([fewer] if answer.args else [])]:
        with pytest.raises(FormatError, match="not an answer"):
            unpack(text.encode("ascii"))


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a b", "a%20b"),
        ("\x00\x1f\x20\x21\x7e\x7f", "%00%1f%20!~%7f"),
        ("%41", "%2541"),
        ("\u00fc\u20ac\U0001f600", "%c3%bc%e2%82%ac%f0%9f%98%80"),
        ("a\tb\r\nbhys1", "a%09b%0d%0abhys1"),
    ],
)
def test_what_is_no_plain_byte_is_escaped(text: str, escaped: str) -> None:
    line = pack(Answer(ID, "FAILED", (text,)))
    assert line == line_of(f"FAILED {escaped}")
    assert unpack(line).text == text


def test_no_text_is_never_no_argument() -> None:
    assert pack(Answer(ID, "FAILED", ("",))) == line_of("FAILED ?")
    assert unpack(line_of("RUNNING")).text == ""


def test_what_utf_8_has_not_is_replaced() -> None:
    # A path that is not text: a file system may have such names.
    assert pack(Answer(ID, "FAILED", ("a\udcffb",))) == line_of("FAILED a?b")


@pytest.mark.parametrize("character", ["x", " ", "\u00fc", "\u20ac", "\U0001f600"])
@pytest.mark.parametrize("shift", range(13))
def test_a_long_text_is_cut_after_a_whole_character(character: str, shift: int) -> None:
    text = "x" * shift + character * MAX_LINE_BYTES
    line = pack(Answer(ID, "FAILED", (text,)))
    cost = len(character.encode()) * (1 if character == "x" else 3)
    assert MAX_LINE_BYTES - cost < len(line) <= MAX_LINE_BYTES
    found = unpack(line).text
    assert found and text.startswith(found)


def test_a_text_that_just_fits_is_whole() -> None:
    room = MAX_LINE_BYTES - len(line_of("FAILED "))
    for count in (room - 1, room):
        line = pack(Answer(ID, "FAILED", ("x" * count,)))
        assert (len(line), unpack(line).text) == (MAX_LINE_BYTES - room + count, "x" * count)
    assert unpack(pack(Answer(ID, "FAILED", ("x" * (room + 1),)))).text == "x" * room


def test_the_last_argument_is_cut_and_the_first_is_not() -> None:
    host, directory = "h" * 64 + "/" + "0" * 16, "/" + "d" * 4095
    found = unpack(pack(Answer(ID, "HELLO", (host, directory))))
    assert found.args[0] == host
    assert directory.startswith(found.args[1])
    assert len(pack(found)) == MAX_LINE_BYTES


@pytest.mark.parametrize(
    ("host", "is_good"),
    [
        ("h" * 254 + "/0", True), ("h" * 255 + "/0", False),
        ("h/" + "0" * 64, True), ("h/" + "0" * 65, False), ("/0", False), ("h/", False),
    ],
)  # fmt: skip
def test_the_name_and_the_id_of_a_host_have_a_longest_form(host: str, is_good: bool) -> None:
    line = line_of(f"HELLO {host} /d")
    if is_good:
        assert unpack(line).args == (host, "/d")
        return
    with pytest.raises(FormatError, match="HELLO with a broken host or directory"):
        unpack(line)


@pytest.mark.parametrize("beyond", [0, 1])
def test_a_line_has_a_longest_form(beyond: int) -> None:
    line = line_of("FAILED " + "x" * (MAX_LINE_BYTES - len(line_of("FAILED ")) + beyond))
    assert len(line) == MAX_LINE_BYTES + beyond
    if not beyond:
        assert pack(unpack(line)) == line
        return
    with pytest.raises(FormatError, match=r"^not an answer$"):
        unpack(line)


HOSTILE = {
    "empty": b"",
    "newline": b"\n",
    "no newline": line_of("RUNNING")[:-1],
    "cr": line_of("RUNNING\r"),
    "two lines": line_of("RUNNING") * 2,
    "more": line_of("RUNNING") + b"x",
    "before": b" " + line_of("RUNNING"),
    "space at the end": line_of("RUNNING "),
    "two spaces": line_of(" RUNNING"),
    "two spaces at an argument": line_of("SEEN  1"),
    "tab": line_of("SEEN\t1"),
    "nul": line_of("FAILED a\0b"),
    "del": line_of("FAILED a\x7fb"),
    "not ascii": line_of("FAILED a\xfcb"),
    "other magic": line_of("RUNNING").replace(b"bhys1", b"bhys2"),
    "other case": line_of("RUNNING").replace(b"bhys1", b"BHYS1"),
    "word in lower case": line_of("running"),
    "unknown word": line_of("RUN"),
    "no word": line_of(""),
    "id too short": line_of("RUNNING").replace(ID.encode(), ID[1:].encode()),
    "id too long": line_of("RUNNING").replace(ID.encode(), b"0" + ID.encode()),
    "id in upper case": line_of("RUNNING").replace(ID.encode(), ID.upper().encode()),
    "id not hexadecimal": line_of("RUNNING").replace(b"0123", b"g123"),
    "percent alone": line_of("FAILED %"),
    "percent cut": line_of("FAILED %a"),
    "percent in upper case": line_of("FAILED %2F"),
    "percent not hexadecimal": line_of("FAILED %0x"),
    "percent twice": line_of("FAILED %%41"),
    "not utf-8": line_of("FAILED %ff"),
    "utf-8 cut": line_of("FAILED %e2%82"),
    "surrogate": line_of("FAILED %ed%a0%80"),
    "seen nothing": line_of("SEEN x"),
    "seen less than nothing": line_of("SEEN -1"),
    "seen too much": line_of("SEEN " + "9" * 20),
    "seen another digit": line_of("SEEN %d9%a1"),
    "seen and a newline": line_of("SEEN 1%0a"),
    "nonce too short": line_of(f"READY {NONCE[1:]}"),
    "nonce too long": line_of(f"READY 0{NONCE}"),
    "nonce in upper case": line_of(f"READY {NONCE.upper()}"),
    "nonce and a newline": line_of(f"READY {NONCE}%0a"),
    "too long": line_of("FAILED " + "x" * MAX_LINE_BYTES),
    "one too long": line_of("FAILED " + "x" * (MAX_LINE_BYTES - len(line_of("FAILED ")) + 1)),
}


@pytest.mark.parametrize("line", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_line_that_is_no_answer_is_refused(line: bytes) -> None:
    with pytest.raises(FormatError, match="not an answer"):
        unpack(line)


@pytest.mark.parametrize(("answer", "line"), LINES, ids=WORDS)
def test_a_changed_byte_is_refused_or_says_something_else(answer: Answer, line: str) -> None:
    """A changed line is refused with FormatError, or is another answer of the same shape."""
    raw = line.encode("ascii")
    for at in range(len(raw)):
        for byte in range(256):
            changed = raw[:at] + bytes([byte]) + raw[at + 1 :]
            try:
                found = unpack(changed)
            except FormatError:
                continue
            assert (found == answer) == (changed == raw)
            assert len(found.args) == len(answer.args)


def test_random_texts_come_back() -> None:
    rng = seeded()
    for _ in range(500):
        text = "".join(
            chr(
                rng.choice(
                    [rng.randrange(128), rng.randrange(0xD800), rng.randrange(1 << 16, 1 << 20)]
                )
            )
            for _ in range(rng.randrange(1, 30))
        )
        answer = Answer(rng.randbytes(16).hex(), "REFUSED", (text,))
        assert unpack(pack(answer)) == answer


def test_random_bytes_are_an_answer_or_a_format_error() -> None:
    rng = seeded()
    alphabet = b"bhys1 0af%ACEPTRUNING\n\0\xff"
    for _ in range(2000):
        tail = bytes(rng.choice(alphabet) for _ in range(rng.randrange(40)))
        for raw in (tail, line_of("")[:-1] + tail, line_of("FAILED ")[:-1] + tail + b"\n"):
            try:
                assert unpack(pack(unpack(raw))) == unpack(raw)
            except FormatError:
                continue


# The parser.


class Feeding:
    """A parser, what it yielded, and the noise that it passed on."""

    def __init__(self, id_: str | None = ID) -> None:
        self.noise: list[bytes] = []
        self.parser = Parser(id_, self.noise.append)
        self.found: list[Answer] = []

    def feed(self, *pieces: bytes) -> list[Answer]:
        for piece in pieces:
            for answer in self.parser.feed(piece):
                self.found.append(answer)
        return self.found


ALL = b"".join(line.encode("ascii") for _, line in LINES)
NOISE = b"Last login: Mon\r\n\n" + HOSTILE["not ascii"] + HOSTILE["unknown word"]


@pytest.mark.parametrize("at", range(len(NOISE + ALL) + 1))
def test_lines_are_joined_wherever_they_are_cut(at: int) -> None:
    feeding = Feeding()
    raw = NOISE + ALL
    assert feeding.feed(raw[:at], raw[at:]) == [answer for answer, _ in LINES]
    assert b"".join(feeding.noise) == NOISE
    assert feeding.parser.hello == HELLO


def test_lines_come_byte_by_byte() -> None:
    feeding = Feeding(None)
    pieces = [bytes([byte]) for byte in NOISE + ALL]
    assert feeding.feed(*pieces) == [answer for answer, _ in LINES]
    assert feeding.noise == NOISE.splitlines(keepends=True)


def test_the_stream_of_the_first_hello_is_taken_where_none_is_named() -> None:
    feeding = Feeding(None)
    assert feeding.parser.id is None
    feeding.feed(pack(HELLO))
    assert feeding.parser.id == ID
    with pytest.raises(FormatError, match=f"an answer of another stream, {OTHER}"):
        feeding.feed(pack(Answer(OTHER, "RUNNING")))


def test_what_comes_before_an_error_is_yielded() -> None:
    feeding = Feeding()
    with pytest.raises(FormatError):
        feeding.feed(pack(HELLO) + line_of("ACCEPT") + b"x\n" + line_of("RUNNING"))
    assert [answer.word for answer in feeding.found] == ["HELLO", "ACCEPT"]


@pytest.mark.parametrize("lines", [1, 2, 64])
def test_noise_before_hello_is_passed_on_up_to_its_limit(lines: int) -> None:
    noise = (b"n" * (MAX_NOISE_BYTES // lines - 1) + b"\n") * lines
    feeding = Feeding()
    assert feeding.feed(noise, pack(HELLO)) == [HELLO]
    assert b"".join(feeding.noise) == noise
    again = Feeding()
    with pytest.raises(FormatError, match="no answer in 4096 bytes"):
        again.feed(b"\n" + noise, pack(HELLO))
    assert again.found == []


def test_noise_without_a_newline_is_limited_too() -> None:
    feeding = Feeding()
    feeding.feed(b"n" * MAX_NOISE_BYTES)
    with pytest.raises(FormatError, match="no answer in 4096 bytes"):
        feeding.feed(b"n")


# Input of which a parser makes one line, or two.
LINES_ALL_THE_SAME = ("empty", "no newline", "two lines", "newline")


@pytest.mark.parametrize(
    "noise",
    [b"\n", b"motd\n", *(raw for name, raw in HOSTILE.items() if name not in LINES_ALL_THE_SAME)],
)
def test_noise_after_hello_is_an_error(noise: bytes) -> None:
    feeding = Feeding()
    feeding.feed(pack(HELLO))
    with pytest.raises(FormatError):
        feeding.feed(noise, b"\n")


def test_a_line_without_end_is_an_error() -> None:
    feeding = Feeding()
    feeding.feed(pack(HELLO), b"x" * MAX_LINE_BYTES)
    with pytest.raises(FormatError, match="a line without end"):
        feeding.feed(b"x")


@pytest.mark.parametrize("answer", [answer for answer, _ in LINES[1:]], ids=WORDS[1:])
def test_nothing_comes_before_hello(answer: Answer) -> None:
    feeding = Feeding()
    with pytest.raises(FormatError, match=f"{answer.word} comes before HELLO"):
        feeding.feed(pack(answer), pack(HELLO))
    assert feeding.found == []


@pytest.mark.parametrize("after", [b"", pack(HELLO)])
def test_another_streams_answer_is_an_error(after: bytes) -> None:
    feeding = Feeding()
    feeding.feed(after)
    with pytest.raises(FormatError, match=f"an answer of another stream, {OTHER}"):
        feeding.feed(pack(Answer(OTHER, "HELLO", HELLO.args)))
    assert feeding.found == ([HELLO] if after else [])


def test_hello_may_be_repeated_and_not_changed() -> None:
    feeding = Feeding()
    assert feeding.feed(pack(HELLO) * 3) == [HELLO] * 3
    for other in (ELSEWHERE, Answer(ID, "HELLO", ("hv2/a1", "/elsewhere"))):
        with pytest.raises(FormatError, match="another host answers than before"):
            feeding.feed(pack(other))


# The inbox.


def filled(*answers: Answer, hello: Answer = HELLO) -> Inbox:
    inbox = Inbox()
    for answer in (hello, *answers):
        inbox.put(hello, answer)
    return inbox


def facts(inbox: Inbox) -> tuple[object, ...]:
    return (inbox.hello, inbox.seen, inbox.accepted, inbox.nonce, inbox.final, inbox.lost)


def test_an_empty_box() -> None:
    inbox = Inbox()
    assert facts(inbox) == (None, -1, False, None, None, "")
    inbox.check()
    assert inbox.failure() is None


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (HELLO, (HELLO, -1, False, None, None, "")),
        (Answer(ID, "SEEN", ("7",)), (HELLO, 7, False, None, None, "")),
        (Answer(ID, "ACCEPT"), (HELLO, -1, True, None, None, "")),
        (Answer(ID, "READY", (NONCE,)), (HELLO, -1, False, bytes.fromhex(NONCE), None, "")),
        (Answer(ID, "UNKNOWN"), (HELLO, -1, False, None, None, "")),
    ],
)
def test_what_an_answer_leaves_in_the_box(answer: Answer, expected: tuple[object, ...]) -> None:
    inbox = filled(answer)
    assert facts(inbox) == expected
    inbox.check()


@pytest.mark.parametrize("word", ["REFUSED", "RUNNING", "FAILED", "RAN"])
def test_a_final_answer(word: str) -> None:
    answer = Answer(ID, word, ("why",) if word in ("REFUSED", "FAILED") else ())
    assert filled(answer).final == answer


def test_seen_never_goes_back() -> None:
    inbox = filled(Answer(ID, "SEEN", ("7",)), Answer(ID, "SEEN", ("3",)))
    assert inbox.seen == 7


@pytest.mark.parametrize("answer", [answer for answer, _ in LINES[1:]], ids=WORDS[1:])
def test_another_host_does_not_count(answer: Answer) -> None:
    inbox = filled()
    before = facts(inbox)
    inbox.put(ELSEWHERE, ELSEWHERE)
    inbox.put(ELSEWHERE, answer)
    assert facts(inbox) == before


def test_the_same_host_counts_on_another_connection() -> None:
    inbox = filled()
    inbox.put(Answer(ID, "HELLO", HELLO.args), Answer(ID, "ACCEPT"))
    assert inbox.accepted


def test_the_first_reason_for_a_loss_stays() -> None:
    inbox = Inbox()
    inbox.lose("the first")
    inbox.lose("the second")
    assert inbox.lost == "the first"
    with pytest.raises(GuestError, match=r"^the first$"):
        inbox.check()


@pytest.mark.parametrize(
    ("answer", "cls", "text"),
    [
        (Answer(ID, "REFUSED", ("no disk",)), IncompatibleError, "hv2: no disk"),
        (Answer(ID, "FAILED", ("no memory",)), GuestError, "hv2: no memory"),
        (Answer(ID, "RAN"), GuestError, "hv2: RAN"),
        (Answer(ID, "RUNNING"), GuestError, "hv2: RUNNING"),
    ],
)
def test_what_ends_the_conversation_before_go(
    answer: Answer, cls: type[Exception], text: str
) -> None:
    inbox = filled(answer)
    inbox.lose("the way back was closed")  # the answer explains why
    with pytest.raises(cls) as caught:
        inbox.check()
    assert (type(caught.value), str(caught.value)) == (cls, text)


def test_a_wait_ends_at_once_where_the_condition_holds() -> None:
    assert filled().wait(lambda: True, 0)
    assert not filled().wait(lambda: False, 0)


class Waiting(threading.Thread):
    """Waits for a condition on an inbox without a limit, and keeps what wait() returned."""

    def __init__(self, inbox: Inbox) -> None:
        super().__init__(daemon=True)
        self.inbox = inbox
        self.asked = threading.Event()
        self.result: bool | None = None
        self.start()
        self.asked.wait()

    def condition(self) -> bool:
        self.asked.set()
        return self.inbox.accepted

    def run(self) -> None:
        self.result = self.inbox.wait(self.condition, 1000)

    def ended(self) -> bool | None:
        self.join(60)
        assert not self.is_alive()
        return self.result


def test_a_wait_ends_when_the_answer_comes() -> None:
    inbox = filled()
    waiting = Waiting(inbox)
    inbox.put(HELLO, Answer(ID, "SEEN", ("1",)))
    inbox.put(HELLO, Answer(ID, "ACCEPT"))
    assert waiting.ended() is True


def test_a_wait_ends_when_nothing_more_will_come() -> None:
    inbox = filled()
    waiting = Waiting(inbox)
    inbox.lose("gone")
    assert waiting.ended() is False


def test_a_wait_ends_with_the_last_answer() -> None:
    inbox = filled()
    waiting = Waiting(inbox)
    inbox.put(HELLO, Answer(ID, "REFUSED", ("no",)))
    assert waiting.ended() is False
