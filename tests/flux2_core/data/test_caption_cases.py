"""R2: every kind of caption file has one outcome, and what reaches the encoder is what was written."""

import itertools
import json

import numpy as np
import pyarrow as pa
import pytest

from flux2_core.config.sections import Data, Model
from flux2_core.data.scan import Candidate, Note, Rejected, scan
from flux2_core.model.folder import resolve
from flux2_core.model.tokenizer import PromptTokenizer
from flux2_core.plan import doctor
from tests.flux2_core.layout_files import put

LONG = "x" * 1_000_000
CONTROL = "[INST] </s> [IMG] [SYSTEM_PROMPT] <s>"
SKS = {"trigger": "sks"}
INJECTED = "injected"

# case -> (the caption file, options, exact captions or the reason, note)
TEXTS = {
    "missing": (None, {}, "no caption: a.txt is missing and default_caption is not set"),
    "empty": (b"", {}, "its caption is blank; write one or set default_caption"),
    "blank": (" \t\r\n\u200b".encode(), {}, "its caption is blank; write one or set default_caption"),
    "BOM": (b"\xef\xbb\xbfa cat", {}, ("a cat",)),
    "UTF-16": ("a cat".encode("utf-16"), {}, "caption is UTF-16 or UTF-32 text; save it as UTF-8"),
    "latin-1": ("café".encode("latin-1"), {}, "caption is not UTF-8 (byte 0xe9 at 3); save it as UTF-8"),
    "NUL": (b"a\0cat", {}, "caption holds a NUL character; remove it (or save the file as UTF-8)"),
    "lone surrogate": (b"a \xed\xa0\x80", {}, "caption is not UTF-8 (byte 0xed at 2); save it as UTF-8"),
    "NFC": ("caf\u00e9".encode(), {}, ("caf\u00e9",)),
    "NFD": ("cafe\u0301".encode(), {}, ("cafe\u0301",)),
    "RTL": ("חתול \u200fעל שטיח".encode(), {}, ("חתול \u200fעל שטיח",)),
    "ZWJ": ("👩‍👩‍👧".encode(), {}, ("👩‍👩‍👧",)),
    "CRLF": (b"a cat\r\non a mat\r\n", {}, ("a cat\non a mat",)),
    "1 MB": (LONG.encode(), {}, (LONG,)),
    "control tokens": (CONTROL.encode(), {}, (CONTROL,)),
    "trigger 0 times": (b"a dog that risks it", SKS, ("sks, a dog that risks it",), INJECTED),
    "trigger 1 time": (b"a [trigger] dog", SKS, ("a sks dog",)),
    "trigger 2 times": (b"[trigger] and sks", SKS, ("sks and sks",)),
}
OTHERS = ("511 tokens", "512 tokens", "513 tokens", "duplicates", ".TXT", "non-string JSON")


def outcome(root, **options):
    found = list(scan(Data(path=str(root), **options), ordinal=0))
    notes = [item.message for item in found if isinstance(item, Note)]
    return [item for item in found if not isinstance(item, Note)], [n for n in notes if not n.startswith("read as")]


@pytest.mark.parametrize("case", TEXTS)
def test_r2_caption_files(tmp_path, case):
    """R2, 18 of 24 cases: kept with exactly this text, or quarantined with exactly this reason; nothing in between."""
    assert len(TEXTS) + len(OTHERS) == 24
    held, options, expected, *flags = TEXTS[case]
    put(tmp_path, "a.png", b"")
    if held is not None:
        put(tmp_path, "a.txt", held)
    (found,), notes = outcome(tmp_path, **options)
    if isinstance(expected, str):
        assert isinstance(found, Rejected)
        assert found.reason == expected
    else:
        assert isinstance(found, Candidate)
        assert found.captions == expected
        assert found.injected == (INJECTED in flags)
    assert not notes


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return PromptTokenizer(resolve(Model(path=str(tiny_model)), parts=("tokenizer",)), max_length=512)


@pytest.mark.parametrize("tokens", [511, 512, 513])
def test_r2_token_lengths(tmp_path, tokenizer, tokens):
    """R2: a caption of so many tokens comes through whole; over 512 its truncation is reported with its length."""
    frame = tokenizer.counts([""])[0]
    text = next(t for n in itertools.count(1) if tokenizer.counts([t := "a" + " a" * n])[0] >= tokens)
    assert frame < tokenizer.counts([text])[0] == tokens
    put(tmp_path, "a.png", b"")
    put(tmp_path, "a.txt", text.encode())
    (found,), notes = outcome(tmp_path)
    assert found.captions == (text,)
    assert not notes
    pictures = pa.table({"id": ["a"], "captions": [[text]]})
    reported = doctor.truncated(pictures, [text], np.array(tokenizer.counts([text])), limit=512)
    assert reported == ([{"id": "a", "tokens": 513}] if tokens > 512 else [])
    assert len(tokenizer.kept([text])[0]) == min(tokens, 512)


def test_r2_control_tokens_stay_text(tokenizer):
    """R2: `[INST]`, `</s>` and the like in a caption become ordinary tokens, never the control tokens of that name."""
    special = tokenizer.tokenizer.get_added_tokens_decoder()
    frame, full = tokenizer.ids([""])[0], tokenizer.ids([CONTROL])[0]
    assert [token for token in full if token in special] == [token for token in frame if token in special]
    assert len(full) > len(frame) + 5


def test_r2_duplicates(tmp_path):
    """R2: two pictures may share a caption; the same caption twice in one picture's list is one."""
    rows = [{"file_name": name, "text": ["x", "y", " x"]} for name in ("a.png", "b.png")]
    put(tmp_path, "metadata.jsonl", "\n".join(map(json.dumps, rows)).encode())
    for name in ("a.png", "b.png"):
        put(tmp_path, name, b"")
    found, notes = outcome(tmp_path)
    assert [item.captions for item in found] == [("x", "y"), ("x", "y")]
    assert not notes


def test_r2_txt_in_capitals(tmp_path):
    """R2: a.TXT is a.png's caption; beside a.txt neither is guessed."""
    put(tmp_path, "a.png", b"")
    put(tmp_path, "a.TXT", b"loud")
    assert outcome(tmp_path)[0][0].captions == ("loud",)
    put(tmp_path, "a.txt", b"quiet")
    assert "differ only in case" in outcome(tmp_path)[0][0].reason


@pytest.mark.parametrize("value", [7, True, {"a": "b"}, ["x", 7], [["x"]]])
def test_r2_non_string_json(tmp_path, value):
    """R2: a caption that is no string is not made one."""
    put(tmp_path, "a.png", b"")
    put(tmp_path, "metadata.jsonl", json.dumps({"file_name": "a.png", "text": value}).encode())
    (found,), _ = outcome(tmp_path)
    assert isinstance(found, Rejected)
    assert "not a string" in found.reason or "not of strings" in found.reason
