"""Self-tests: whether the libraries of this machine make the bytes that a table holds.

A fingerprint has some libraries by version (Pillow, tokenizers) and others not at all (torch, transformers, diffusers),
and versions say little of bytes. So a table keeps a proof beside its fingerprint: what its libraries made of fixed
texts, pictures and small models. Where versions differ the self-test runs again; the same bytes keep the table, others
get one of their own (docs/decisions/0026). Keys hash the fingerprint that stands in the table, never a proof.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flux2_core.cache import fingerprints, index, prompt_rows
from flux2_core.config.sections import Config
from flux2_core.data.pictures import load
from flux2_core.data.pictures.transform import Transform
from flux2_core.errors import DataError, SetupError
from flux2_core.model.folder import ModelFolder
from flux2_core.model.tokenizer import PromptTokenizer
from flux2_core.store import objects, schemas
from flux2_core.store.hashing import differing, digest, first_difference, remembered
from flux2_core.store.schemas import KIND_LATENTS, KIND_TEXT
from flux2_core.store.table import Table

OF_LIBRARIES = ("image", "libraries", "quanto_version", "tokenizers_version")  # fields that a proof decides in place of
IN_RECIPE = ("pillow", "libjpeg_turbo", "littlecms2")  # versions among the words of the image recipe
USED = {  # what each part of a self-test rests on
    "tokens": ("tokenizers", "jinja2"),
    "pixels": (*IN_RECIPE, "simplejpeg", "torch"),
    "values": ("torch", "transformers", "diffusers", "optimum-quanto"),
}
SAME = 1e-4  # of the golden values; processors and vector instructions differ by 1e-6
FILES = Path(__file__).parent / "golden"  # pictures of each format, written once: another encoder writes other bytes
BEFORE = "before.json"  # what the versions of constraints.txt made when proofs began: taken for tables from before
SEEN = Transform(48, 64, 51, 73, 2, 5)  # how the pictures are resized and cropped
COUNTED = 1000  # stored texts of a table from before whose tokens are counted again


class SelfTest:
    """What the libraries here make of fixed inputs; each part is made when it is asked for."""

    def __init__(self, config: Config, model: ModelFolder, kind: str) -> None:
        self.config, self.model, self.kind = config, model, kind
        self.recipe = fingerprints.recipe(config.latents) if kind == KIND_LATENTS else {}
        self.base = _FINGERPRINTS[kind](model, config)

    @cached_property
    def libraries(self) -> dict[str, str | None]:
        """Versions of everything that could change the rows."""
        names = ["torch", "diffusers"] if self.kind == KIND_LATENTS else ["torch", "transformers", *USED["tokens"]]
        names += ["simplejpeg"] if "decoder" in self.recipe else []
        names += ["optimum-quanto"] if self.kind == KIND_TEXT and self.config.text.quantize != "none" else []
        versions: dict[str, str | None] = {name: version(name).partition("+")[0] for name in names}
        return versions | {name: self.recipe[name] for name in IN_RECIPE if name in self.recipe}

    @cached_property
    def exact(self) -> dict[str, str]:
        """Hashes of what must be equal to the bit: tokens of fixed texts, or pixels of fixed pictures."""
        if self.kind == KIND_TEXT:
            return {"tokens": self._tokenizer.golden()}
        pictures = sorted(file for file in FILES.iterdir() if file.name != BEFORE)
        return {f"pixels of {file.name}": self._pixels(file) for file in pictures}

    @cached_property
    def golden(self) -> list[float]:
        """What a small model of fixed weights makes: of one family, in fp32 on the CPU."""
        return [float(value) for value in remembered([self.name, self.libraries], self._golden)]

    @property
    def name(self) -> str:
        """Which golden values."""
        if self.kind == KIND_LATENTS:
            return KIND_LATENTS
        config = self.model.config("text_encoder")
        return f"{config.get('text_config', config)['model_type']}/{self.config.text.quantize}"

    def proof(self) -> dict[str, Any]:
        """All of it, as it stands beside a table."""
        return {"libraries": self.libraries, "recipe": self.recipe, "exact": self.exact, "golden": self.golden}

    def difference(self, known: Mapping[str, Any]) -> str | None:
        """What the libraries here make otherwise than those of a proof; None: the same bytes."""
        if known["libraries"] == self.libraries:
            return None
        for name in sorted(known["exact"].keys() & self.exact.keys()):
            if known["exact"][name] != self.exact[name]:
                return f"{self._changed(known, name.split()[0])} makes other {name}"
        if _distance(self.golden, known["golden"]) > SAME:
            return f"{self._changed(known, 'values')} computes other {self.kind} rows"
        return None

    def unfit(self, table: Table) -> str | None:
        """Why this machine may not add rows to a table of the same model and settings; None: it may."""
        if table.proof is None:
            return self._unfit_before(table)
        words, theirs = (_words(recipe) for recipe in (self.recipe, table.proof["recipe"]))
        if difference := first_difference(words, theirs):
            return f"another image recipe ({difference})"
        return self.difference(table.proof)

    def _unfit_before(self, table: Table) -> str | None:
        """Of a table from before proofs: its stored texts are cut again; its libraries are those of then."""
        before, exact = json.loads((FILES / BEFORE).read_text()), {}
        if table.fingerprint.get("image") != self.base.get("image"):
            if table.fingerprint["image"] != digest(fingerprints.recipe(self.config.latents, before["libraries"])):
                return "its image recipe was kept as a hash, of which no field can be told"
            exact = before["exact"][self.config.latents.decoder]
        if self.kind == KIND_TEXT and (wrong := self._recounted(table)):
            return wrong
        versions = {name: known for name, known in before["libraries"].items() if name in self.libraries}
        values = before["golden"].get(self.name)
        if values is None or versions.items() <= self.libraries.items():
            return None
        return self.difference({"libraries": versions, "exact": exact, "golden": values})

    def _recounted(self, table: Table) -> str | None:
        rows = table.head([schemas.KEY, schemas.TEXT, schemas.TOKENS], COUNTED)
        rows = [row for row in rows if row[schemas.KEY] != prompt_rows.PAD_KEY]
        counts = self._tokenizer.counts([row[schemas.TEXT] for row in rows])
        limit = self.config.text.max_length
        pairs = [(row, min(count, limit)) for row, count in zip(rows, counts, strict=True)]
        if not (wrong := [(row, count) for row, count in pairs if row[schemas.TOKENS] != count]):
            return None
        row, count = wrong[0]
        told = f"{row[schemas.TEXT][:40]!r} has {row[schemas.TOKENS]} there and {count} here"
        return f"tokens: {len(wrong)} of {len(rows)} texts were cut otherwise, by another tokenizer library ({told})"

    def _changed(self, known: Mapping[str, Any], part: str) -> str:
        theirs, ours = known["libraries"], self.libraries
        names = [name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)]
        blamed = [name for name in names if name in USED[part]] or names
        return ", ".join(f"{name} {theirs.get(name)} -> {ours.get(name)}" for name in blamed)

    @cached_property
    def _tokenizer(self) -> PromptTokenizer:
        text = self.config.text
        return PromptTokenizer(self.model, max_length=text.max_length, tokens=text.tokens)

    def _pixels(self, file: Path) -> str:
        try:
            pixels_HWC = load.load(str(file), SEEN, latents=self.config.latents)
        except DataError as error:  # a Pillow that was built without this format
            return str(error).removeprefix(f"{file}: ")
        return hashlib.sha256(pixels_HWC.tobytes()).hexdigest()

    def _golden(self) -> list[float]:
        if self.kind == KIND_LATENTS:
            from flux2_core.model.vae import golden_latents  # seconds of imports, after an upgrade only

            return golden_latents()
        from flux2_core.model.text_encoder import golden_rows

        return golden_rows(self.model.family, self.name.split("/")[0], quantize=self.config.text.quantize)


def settled(config: Config, model: ModelFolder) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The fingerprints, by kind, under which rows are looked for and written; and what is encoded anew, and why.

    Raises:
        DataError: a table from before is there whose rows this machine would make otherwise.
    """
    notes: list[str] = []
    return {kind: _settle(SelfTest(config, model, kind), notes) for kind in (KIND_TEXT, KIND_LATENTS)}, notes


def fingerprint(config: Config, model: ModelFolder, kind: str) -> dict[str, Any]:
    """The fingerprint of one kind, as `settled` has it."""
    return _settle(SelfTest(config, model, kind), [])


def open_table(config: Config, model: ModelFolder, kind: str, of: Mapping[str, Any]) -> Table:
    """The table of a fingerprint, made where it is missing, with a proof beside it.

    Raises:
        DataError: libraries that make other bytes have made it since `settled`.
    """
    test, uri = SelfTest(config, model, kind), URIS[kind](config, of)
    table = Table.open_or_create(uri, kind=kind, fingerprint=of, proof=test.proof)
    if difference := test.difference(table.proof or table.prove(test.proof())):
        raise DataError(f"{uri}: made by other libraries meanwhile ({difference}): run the same again")
    return table


def check_node(config: Config, model: ModelFolder, table: Table) -> None:
    """See that what this machine loads and has installed is what a table's rows are made with.

    Raises:
        SetupError: it is not; names the field and this machine.
    """
    test = SelfTest(config, model, table.kind)
    if difference := first_difference(_of_model(table.fingerprint), _of_model(test.base)):
        raise SetupError(
            f"{platform.node()}: the model at {model.path} is not the one that the run was planned with "
            f"({difference}): every node needs the same files"
        )
    if table.proof is not None and (difference := test.difference(table.proof)):
        raise SetupError(
            f"{platform.node()}: {difference} than {table.uri} holds: install the same versions on every node"
        )


def changed(test: SelfTest, ours: Mapping[str, Any], table: Table) -> set[str]:
    """In which fields a table's rows differ from those of the fingerprint `ours`; libraries where all else agrees.

    An image recipe counts by its own fields, or as `image` where the table has it as a hash only.
    """
    if (proof := table.proof) is None:
        said, known = ({"image": each.get("image")} for each in (table.fingerprint, ours))
    else:
        said, known = (_words(recipe) for recipe in (proof["recipe"], test.recipe))
    if found := differing(_of_model(ours) | known, _of_model(table.fingerprint) | said):
        return found
    return (proof and differing(test.libraries, proof["libraries"])) or {"libraries"}


def _settle(test: SelfTest, notes: list[str]) -> dict[str, Any]:
    own = URIS[test.kind](test.config, test.base)
    unfit: dict[str, str] = {}
    for uri, table in _candidates(test, own):
        if (why := test.unfit(table)) is None:
            return dict(table.fingerprint)
        if uri == own and table.proof is None:
            raise DataError(f"{uri}: written by an earlier cacheloom, and {why}: use another output.cache")
        unfit[uri] = why
    notes += [f"{test.kind} rows of {uri} are not used, and encoded anew: {why}" for uri, why in unfit.items()]
    return test.base | ({"libraries": test.libraries} if own in unfit else {})


def _candidates(test: SelfTest, own: str) -> Iterator[tuple[str, Table]]:
    """Tables of the same model and settings, whatever libraries made them; the one of this very fingerprint first."""
    if next(iter(objects.listing(own)), None) is not None:
        yield own, Table.open(own)
    yield from ((uri, table) for uri, table in beside(own) if _of_model(table.fingerprint) == _of_model(test.base))


def beside(own: str) -> Iterator[tuple[str, Table]]:
    """The tables that lie beside one, by URI."""
    place = own.rsplit("/", 1)[0]
    names = {uri[len(place) + 1 :].split("/", 1)[0] for uri, _ in objects.listing(place)}
    for name in sorted(names):
        uri = objects.join(place, name)
        if uri == own or not name.endswith(".lance"):
            continue
        try:
            yield uri, Table.open(uri)
        except DataError:  # of another contract, or damaged: `verify` says so, and its rows are not used
            continue


def _of_model(of: Mapping[str, Any]) -> dict[str, Any]:
    """What a fingerprint says of files and settings."""
    return {name: value for name, value in of.items() if name not in OF_LIBRARIES}


def _words(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """An image recipe without versions."""
    told = {name: value for name, value in recipe.items() if name not in IN_RECIPE}
    return told | ({"decoder": "fast"} if "decoder" in told else {})


def _distance(ours: list[float], theirs: list[float]) -> float:
    """Relative difference of golden values."""
    if len(ours) != len(theirs):
        return math.inf
    return math.dist(ours, theirs) / max(math.hypot(*theirs), 1e-12)


_FINGERPRINTS = {KIND_TEXT: fingerprints.text_fingerprint, KIND_LATENTS: fingerprints.latents_fingerprint}
URIS = {KIND_TEXT: index.text_uri, KIND_LATENTS: index.latents_uri}
