"""Reading configurations: TOML, overrides, errors, and writing them down again."""

import random
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from flux2_core.config.places import Place
from flux2_core.config.reading import SYNONYMS, absolute, apply_override, dump_toml, fields, keys, load, parse
from flux2_core.config.sections import Config
from flux2_core.errors import UsageError

BASE = '[model]\npath = "m"\n[[data]]\npath = "d"\n'


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "c.toml"
    path.write_text(BASE)
    return path


def message(tree: dict[str, Any]) -> list[str]:
    with pytest.raises(UsageError) as caught:
        parse({"model": {"path": "m"}, "data": [{"path": "d"}], **tree})
    return str(caught.value).removeprefix("configuration: ").split("\nconfiguration: ")


def test_a_file_and_overrides(toml: Path) -> None:
    """An override wins over the file, makes sections that are missing, and reaches into lists."""
    given = ["train.steps=7", "data.0.path=photos of me", "lora.alpha=2.5", "validate.prompts=['a', 'b']"]
    given += ["run=fine", "data.0.resolutions=[64, 128]", "data.0.check_images=true"]
    config = load(toml, given)
    assert (config.train.steps, config.data[0].path, config.lora.alpha) == (7, "photos of me", 2.5)
    assert (config.validation.prompts, config.run) == (("a", "b"), "fine")
    assert (config.data[0].resolutions, config.data[0].check_images) == ((64, 128), True)


@pytest.mark.parametrize("name", ["2024", "2026-11-21", "true", "1e5", "inf", "0x10", "1.5"])
def test_text_is_text(toml: Path, name: str) -> None:
    """Where a key holds text, what looks like a number or a date is still text; so are quoted values."""
    assert load(toml, [f"run={name}", f"data.0.trigger={name}"]).run == name
    assert load(toml, [f"data.0.trigger={name}"]).data[0].trigger == name
    assert load(toml, [f'data.0.trigger="{name}"']).data[0].trigger == name


def test_an_equals_sign_belongs_to_the_value(toml: Path) -> None:
    """Only the first = parts key and value, and a line break cannot smuggle a second key in."""
    assert load(toml, ["data.0.default_caption=a = b"]).data[0].default_caption == "a = b"
    assert load(toml, ["data.0.default_caption='a'\nb = 'c'"]).data[0].default_caption == "'a'\nb = 'c'"


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("train.steps", "is not an override"),
        ("=3", "is not an override"),
        ("data.1.path=x", r"data\.1 does not exist; the file has 1"),
        ("data.path=x", r"data is a list; write data\.0\.path"),
        ("data.².path=x", "does not exist"),
        ("model.path.x=1", r"model\.path is a value, not a section"),
        ("model.path.x.y=1", r"model\.path\.x is inside a value"),
        ("train.stepss=1", r"train\.stepss: unknown key\. Did you mean train\.steps\?"),
        ("data.0.captions=x", r"data\.0\.captions: unknown key\. Did you mean data\[\]\.caption\?"),
    ],
)
def test_overrides_that_lead_nowhere(toml: Path, override: str, wanted: str) -> None:
    """A wrong override is refused with its key as it was given."""
    with pytest.raises(UsageError, match=wanted):
        load(toml, [override])


def test_an_override_needs_a_data_set() -> None:
    """`data.0.path` without any [[data]] says so."""
    with pytest.raises(UsageError, match=r"no \[\[data\]\]"):
        apply_override({}, "data.0.path=x")


@pytest.mark.parametrize(
    ("tree", "lines"),
    [
        ({"data": [{"path": "d", "captionn": "x"}]}, ["data.0.captionn: unknown key. Did you mean data[].caption?"]),
        ({"data": [{"path": "d", "repeats": 0}]}, ["data.0.repeats: "]),
        ({"data": [{}]}, ["data.0.path: required, and not given"]),
        ({"data": {"path": "d"}}, ["data: there may be several, so its heading has two brackets: [[data]]"]),
        ({"lora": {"targets": 5}}, ["lora.targets: Input should be a preset or a list of regular expressions"]),
        ({"train": {"steps": "x"}, "text": {"dtype": "x"}}, ["text.dtype: ", "train.steps: "]),
        ({"rank": 4}, ["rank: unknown key. Did you mean lora.rank?"]),
        ({"train": {"lr": 1e-4}}, ["train.lr: unknown key. Did you mean train.learning_rate?"]),
        ({"data": [{"path": "d", "resolution": 64}]}, ["data.0.resolution: unknown key. Did you mean data[].resolu"]),
        ({"data": [{"path": "d", "resolutions": 64}]}, ["data.0.resolutions: Input should be a list, in brackets (g"]),
        ({"data": [{"path": "d", "trigger": " "}]}, ["data.0.trigger: empty: name a word, or leave the key out"]),
        ({"trian": {"steps": 4}}, ["trian.steps: unknown key. Did you mean train.steps?"]),
        ({"validate": {"promts": []}}, ["validate.promts: unknown key. Did you mean validate.prompts?"]),
        ({"validate": {"every": -1}}, ["validate.every: "]),
        ({"zzzz": {"qqqq": 4}}, ["zzzz.qqqq: unknown key. docs/config.md lists every key."]),
    ],
)
def test_one_wrong_key_is_one_line(tree: dict[str, Any], lines: list[str]) -> None:
    """Every wrong key gets exactly one line, which begins with its dotted name."""
    found = message(tree)
    assert len(found) == len(lines)
    assert all(one.startswith(wanted) for one, wanted in zip(found, lines, strict=True)), found


@pytest.mark.parametrize(
    "override",
    [
        "output.cache=s3://key:hunter2@bucket/x",
        "data.0.path=s3://hunter2@bucket",
        "data.0.references=['http://a:hunter2@b']",
    ],
)
def test_passwords_are_refused_unseen(toml: Path, override: str) -> None:
    """A URL with a password is refused, at every key that holds places, and the password is not in the message."""
    with pytest.raises(UsageError, match="credentials come from the environment") as refused:
        load(toml, [override])
    assert "hunter2" not in str(refused.value)
    assert override.partition("=")[0] in str(refused.value)


def test_a_huge_value_is_cut_in_the_message() -> None:
    """A refused value of a megabyte does not fill the screen."""
    assert len(message({"text": {"dtype": "x" * 10**6}})[0]) < 300


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    """Missing, a folder, not TOML, not UTF-8: each names the file."""
    bad = tmp_path / "bad.toml"
    bad.write_text("a = = b")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, wanted in (
        (tmp_path / "no.toml", "no such file"),
        (tmp_path, "not a"),
        (bad, "not a"),
        (binary, "not a"),
    ):
        with pytest.raises(UsageError, match=wanted) as caught:
            load(path)
        assert str(path) in str(caught.value)


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    """Windows' editors put one at the start."""
    path = tmp_path / "c.toml"
    path.write_bytes(b"\xef\xbb\xbf" + BASE.encode())
    assert load(path).model.path == "m"


ODD = ['"', "\\", "\n", "\r\n", "\t", "\0", "\x1f", "\x7f", "'", "'''", '"""', "#", "=", "[x]", "é", "日本", "\u200b"]
ODD += ["\u2028", "\ufeff", "\U000e0001", "\U0010ffff", "😀", "\u202e", " ", "\\n", "\\u0041", "{", "$HOME"]


def test_dumped_and_read_again_is_the_same(tmp_path: Path) -> None:
    """`load(dump_toml(c)) == c` for 300 random configurations with every odd character there is."""
    rng = random.Random(0)

    def text() -> str:
        return "".join(rng.choice([*ODD, "a", chr(rng.randrange(0x20, 0xD800))]) for _ in range(rng.randrange(1, 9)))

    for _ in range(300):
        data = [{"path": text(), "trigger": f"t{text()}", "default_caption": text(), "repeats": rng.randrange(1, 9)}]
        data.append({"path": text(), "resolutions": [16, 32], "check_images": rng.choice([True, False, None])})
        config = parse(
            {
                "run": rng.choice(["a", "2024", "true"]),
                "model": {"path": text()},
                "data": data,
                "train": {"learning_rate": 10 ** rng.uniform(-12, 20), "steps": rng.randrange(10**6)},
                "lora": {"targets": rng.choice(["all", [text(), text()]]), "alpha": rng.choice([None, 1e-7, 3.0])},
                "validate": {"prompts": [text() for _ in range(rng.randrange(4))]},
                "max_quarantined": rng.random(),
            }
        )
        path = tmp_path / "again.toml"
        path.write_text(dump_toml(config), encoding="utf-8", newline="")
        assert load(path) == config


def test_the_dump_names_every_key_that_is_set() -> None:
    """What is written down is resolved: defaults too."""
    dumped = dump_toml(parse({"model": {"path": "m"}, "data": [{"path": "d"}]}))
    unset = {"model.revision", "data[].default_caption", "data[].trigger", "data[].check_images", "lora.alpha"}
    unset |= {"validate.size", "cluster.address", "cluster.encoders", "cluster.micro_batch", "cluster.min_workers"}
    unset |= {"output.mirror", "cluster.gpu_memory", "cluster.price", "model.family", "lora.init", "validate.negative"}
    unset |= {"cluster.rounded", "data[].class_name", "data[].max_size", "data[].masks", "data[].noise", "train.epochs"}
    unset |= {"data[].preferred", "data[].rejected", "lora.factor", "lora.min_rank", "output.as_lora"}
    unset |= {"cluster.encoder_resources"}
    unset |= {"data[].reference_size", "validate.prompt[].text"}  # the last ones stand in one line
    unset |= {"slider.target", "slider.positive", "slider.negative"}
    names = {line.split(" = ")[0] for line in dumped.splitlines() if " = " in line}
    names = names - {"prompt"} | {"references"}
    assert {key.rpartition(".")[2] for key in set(keys()) - unset} == names


RELATIVE = {  # every key that holds a path: a relative one, and where it leads to
    "model.path": ("m", "m"),
    "data[].path": ("d", "d"),
    "data[].masks": ("masks", "d/masks"),  # below data.path, where it is
    "data[].references": ("before", "before"),  # which is not below data.path
    "data[].preferred": ("d", "d"),
    "data[].rejected": ("worse", "worse"),
    "lora.init": ("a.safetensors", "a.safetensors"),
    "validate.prompt[].references": ("r.png", "r.png"),
    "lora.preset": ("b.safetensors", "b.safetensors"),
    "output.root": ("r", "r"),
    "output.cache": ("c", "c"),
    "cluster.rounded": ("few", "few"),
    "output.mirror": ("copies", "copies"),
}
NO_PLACES = {  # keys that hold text and no path; whoever adds one of either kind says here, or by `Place`, which it is
    "run", "model.revision", "data[].caption", "data[].default_caption", "data[].trigger", "data[].class_name",
    "data[].caption_edits", "data[].skip_captions", "latents.background", "lora.targets",
    "validate.prompts", "validate.negative", "validate.prompt[].text", "validate.every", "output.save_every",
    "cluster.address", "lora.ranks", "cluster.encoder_resources",
    "slider.target", "slider.positive", "slider.negative", "slider.anchor",
}  # fmt: skip


def text(annotation: Any) -> bool:
    """Whether a key may hold free text or a path, by itself, in a list, or beside other types."""
    return annotation in (str, Path) or any(map(text, typing.get_args(annotation)))


def test_every_text_is_a_place_or_is_none() -> None:
    """A new key that holds text fails here until it is either annotated as a path or listed as none."""
    marked = {key: sum(isinstance(mark, Place) for mark in field.metadata) for key, field in fields()}
    assert {key for key, field in fields() if text(field.annotation) and not marked[key]} == NO_PLACES
    assert {key for key, count in marked.items() if count} == set(RELATIVE)
    assert max(marked.values()) == 1
    assert all(text(field.annotation) for key, field in fields() if marked[key])
    assert text(list[Annotated[str | None, 1]])
    assert not text(Literal["a", "b"])


def with_places(places: dict[str, str]) -> Config:
    shown: dict[str, Any] = {"text": "a"}
    tree: dict[str, Any] = {"data": [{}, {}], "validate": {"prompt": [shown]}}
    several = {"data[]": tree["data"], "validate.prompt[]": [shown]}
    for key, path in places.items():
        section, name = key.rsplit(".", 1)
        value = [path] if name in ("references", "preset") else path
        for node in several.get(section) or [tree.setdefault(section, {})]:
            node[name] = value
    return parse(tree)


def test_every_place_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's workers stand elsewhere: no path stays relative, of no data set; everything else stays as it is."""
    monkeypatch.chdir(tmp_path)
    for folder in ("m", "d/masks"):
        Path(folder).mkdir(parents=True)
    given = with_places({key: relative for key, (relative, _) in RELATIVE.items()})
    found = absolute(given)
    wanted = {key: str(tmp_path / place) for key, (_, place) in RELATIVE.items()}
    assert found == with_places(wanted)
    assert len(found.data) == 2
    assert absolute(found) == found


def test_what_is_no_local_path_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket, a hub id, and a mirror that is unset or given as nothing stay; a home folder is spelt out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    stays = {"model.path": "black-forest-labs/FLUX.2-dev", "data[].path": "s3://b/d", "output.cache": "s3://b/c"}
    for mirror in ("s3://b/m", "", None):
        config = with_places(stays | {"output.root": "~/runs"} | ({} if mirror is None else {"output.mirror": mirror}))
        found = absolute(config)
        assert (found.model.path, found.data[0].path, found.output.cache) == tuple(stays.values())
        assert found.output.mirror == mirror
        assert found.output.root == str(tmp_path / "home" / "runs")
        assert found.lora.init is None


def test_synonyms_lead_to_keys() -> None:
    """What other trainers call a key leads to one that is there, and to one only."""
    assert SYNONYMS.keys() <= {*keys()}
    words = [word for others in SYNONYMS.values() for word in others.split()]
    assert len(words) == len({*words})
    assert {*words} & {key.rpartition(".")[2] for key in keys()} == {"prompts"}  # sample.prompts, say
