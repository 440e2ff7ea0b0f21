"""R2: every kind of caption file has one outcome, and what reaches the encoder is what was written."""

import json
import re

import pytest
from PIL import Image

from flux2_core.config.dataset import Data
from flux2_core.config.sections import Model
from flux2_core.data.scan import scan
from flux2_core.errors import DataError
from flux2_core.model.folder import resolve
from flux2_core.model.tokenizer import PromptTokenizer
from tests.flux2_core.driven import drive
from tests.flux2_core.layout_files import put
from tests.flux2_core.pictures import encoded

LONG = "x" * 1_000_000
CONTROL = "[INST] </s> [IMG] [SYSTEM_PROMPT] <s>"
SKS = {"trigger": "sks"}

# case -> (the caption file, options, exact captions or the reason)
TEXTS = {
    "missing": (None, {}, "no caption: missing.txt is missing and default_caption is not set"),
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
    "trigger 0 times": (b"a dog that risks it", SKS, ("sks, a dog that risks it",)),
    "trigger 1 time": (b"a [trigger] dog", SKS, ("a sks dog",)),
    "trigger 2 times": (b"[trigger] and sks", SKS, ("sks and sks",)),
}
OTHERS = ("511 tokens", "512 tokens", "513 tokens", "duplicates", ".TXT", "non-string JSON")
TOKENS = (511, 512, 513)
NO_STRINGS = (7, True, {"a": "b"}, ["x", 7], [["x"]])
BLACK = encoded(Image.new("RGB", (16, 16)), "PNG")


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return PromptTokenizer(resolve(Model(path=str(tiny_model)), parts=("tokenizer",)), max_length=512)


@pytest.fixture(scope="module")
def long_texts(tokenizer):
    """A caption for each number of tokens."""
    words = {tokenizer.counts([text := "a" + " a" * n])[0]: text for n in range(450, 512)}
    return {tokens: words[tokens] for tokens in TOKENS}


@pytest.fixture(scope="module")
def driven(tmp_path_factory, tiny_model, long_texts):
    """All cases but that of 1 MB, planned and cached at once: a data set for each of their options, one of metadata."""
    root = tmp_path_factory.mktemp("captions")
    for case, (held, options, _) in TEXTS.items():
        if case != "1 MB":
            captioned(root / ("trigger" if options else "plain"), case, held)
    for tokens, text in long_texts.items():
        captioned(root / "plain", f"{tokens} tokens", text.encode())
    captioned(root / "plain", "capitals", b"loud", suffix=".TXT")
    captioned(root / "plain", "both", b"loud", suffix=".TXT")
    captioned(root / "plain", "both", b"quiet")
    rows = [{"file_name": f"{name}.png", "text": ["x", "y", " x"]} for name in ("one", "other")]
    rows += [{"file_name": f"odd{place}.png", "text": value} for place, value in enumerate(NO_STRINGS)]
    put(root / "metadata", "metadata.jsonl", "\n".join(map(json.dumps, rows)).encode())
    for row in rows:
        put(root / "metadata", row["file_name"], BLACK)
    sets = [{"path": str(root / name), "resolutions": [16]} for name in ("plain", "trigger", "metadata")]
    sets[1] |= SKS
    return drive(tiny_model, tmp_path_factory.mktemp("cache"), *sets)


def captioned(folder, name, held, *, suffix=".txt"):
    put(folder, f"{name}.png", BLACK)
    if held is not None:
        put(folder, f"{name}{suffix}", held)


def reason(driven, name):
    """Why the only picture of this name is quarantined, which `show` says too."""
    (found,) = (why for path, why in driven.reasons.items() if path.endswith(f"/{name}.png"))
    with pytest.raises(DataError, match=re.escape(f"{name}: quarantined ({found})")):
        driven.show(name)
    return found


@pytest.mark.parametrize("case", [case for case in TEXTS if case != "1 MB"])
def test_r2_caption_files(driven, case):
    """R2: `show` has the rows of exactly this text, or the picture is quarantined with exactly this reason."""
    assert len(TEXTS) + len(OTHERS) == 24
    _, _, expected = TEXTS[case]
    if isinstance(expected, str):
        assert reason(driven, case) == expected
        return
    shown = driven.show(case)
    assert [name for name in shown if name.startswith("prompt_embeds")] == ["prompt_embeds", "prompt_embeds.null"]
    assert driven.says(shown, *expected)
    assert not driven.says(shown, f"{expected[0]}.")


@pytest.mark.parametrize("tokens", TOKENS)
def test_r2_token_lengths(driven, tokenizer, long_texts, tokens):
    """R2: a caption of so many tokens is encoded as far as 512 reach; the one that loses its end is named by `plan`."""
    shown = driven.show(f"{tokens} tokens")
    assert driven.says(shown, long_texts[tokens])
    assert len(tokenizer.kept([long_texts[tokens]])[0]) == min(tokens, 512)
    assert driven.plan["tokens"]["truncated"] == [{"id": "513 tokens", "tokens": 513}]


def test_r2_nothing_is_said_without_need(driven):
    """R2: the one injected trigger is counted, no other trigger is missing, and `plan` warns of nothing else."""
    injected = "its caption does not mention the trigger 'sks', which was put in front of it"
    twins = "the same bytes as another picture: kept, one latent row"
    kept = driven.plan["samples"]["kept"]
    assert driven.warnings == {injected: 1, twins: kept, "read as a folder with metadata": 1}
    (triggers,) = driven.plan["triggers"]
    assert (triggers["captions"], triggers["mentioned"], triggers["injected"]) == (3, 3, 1)


def test_r2_control_tokens_stay_text(tokenizer):
    """R2: `[INST]`, `</s>` and the like in a caption become ordinary tokens, never the control tokens of that name."""
    special = tokenizer.tokenizer.get_added_tokens_decoder()
    frame, full = tokenizer.ids([""])[0], tokenizer.ids([CONTROL])[0]
    assert [token for token in full if token in special] == [token for token in frame if token in special]
    assert len(full) > len(frame) + 5


def test_r2_duplicates(driven):
    """R2: two pictures may share a caption; the same caption twice in one picture's list is one."""
    for name in ("one", "other"):
        shown = driven.show(name)
        assert driven.says(shown, "x")
        assert driven.says(shown, "y", "prompt_embeds.caption1")
        assert "prompt_embeds.caption2" not in shown


def test_r2_txt_in_capitals(driven):
    """R2: a.TXT is a.png's caption; beside a.txt neither is guessed."""
    assert driven.says(driven.show("capitals"), "loud")
    assert reason(driven, "both") == "both.TXT and both.txt differ only in case: keep one caption file"


@pytest.mark.parametrize("place", range(len(NO_STRINGS)))
def test_r2_non_string_json(driven, place):
    """R2: a caption that is no string is not made one."""
    assert re.search(r"its caption is .*, not (a string|of strings)", reason(driven, f"odd{place}"))


def test_r2_a_megabyte_is_read(tmp_path):
    """R2: a caption of 1 MB comes through whole."""
    captioned(tmp_path, "a", TEXTS["1 MB"][0])
    (found,) = scan(Data(path=str(tmp_path)), ordinal=0)
    assert found.captions == (LONG,)


@pytest.mark.all_cases
def test_r2_a_megabyte_is_encoded_as_far_as_it_goes(tmp_path, tiny_model):
    """R2: `plan` names the caption of a million tokens, and `show` has its first 512; 15 s of tokenizing."""
    captioned(tmp_path / "set", "a", TEXTS["1 MB"][0])
    driven = drive(tiny_model, tmp_path, {"path": str(tmp_path / "set"), "resolutions": [16]})
    ((cut),) = driven.plan["tokens"]["truncated"]
    assert (cut["id"], cut["tokens"] > 500_000) == ("a", True)
    assert driven.says(driven.show("a"), LONG)
