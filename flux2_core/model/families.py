"""The families of FLUX.2: one record each, with every fact that differs between them and that no file of a model says.

A family more is a record more, and its name among the values of `model.family`. Sizes come from a model's own files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

SYSTEM_MESSAGE = (  # byte for byte that of FLUX.2 (diffusers, pipelines/flux2/system_messages.py): one newline inside
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)


@dataclass(frozen=True)
class Licence:
    """What the card of an adapter says of the licence of its base."""

    front_matter: str = ""
    """Lines that the hub reads."""
    name: str = ""
    page: str = ""
    notice: str = ""
    """What distributors of derivatives are asked to carry, word for word; none: the card points to the base's own."""


@dataclass(frozen=True)
class Published:
    """A model that Black Forest Labs published, known by its sizes."""

    name: str
    title: str
    hub: str
    sizes: tuple[int, int, int]
    """Attention heads, double blocks, single blocks."""
    licence: Licence = Licence()


@dataclass(frozen=True)
class Family:
    """What a family fixes beyond its configuration files."""

    name: str
    """Value of `model.family`, and part of the fingerprints of its text rows."""
    pipeline: str
    """Its class in diffusers: `_class_name` of a model_index.json."""
    taps: tuple[int, ...]
    """Hidden states that make the prompt embedding; 0 is the embedding layer."""
    system_message: str | None
    padding_side: Literal["left", "right"]
    chat: Mapping[str, bool]
    """What the chat template is told."""
    typed_parts: bool
    """Whether the template is given a message as a list of typed parts; else as plain text."""
    weight_prefixes: tuple[str, ...]
    """What stands before the language model's own tensor names in the text encoder's files, by version of the files."""
    published: tuple[Published, ...] = ()

    @property
    def ragged(self) -> bool:
        """Whether pad rows are one constant vector, so that only a caption's own rows need storing.

        Before a causal model's first token they know of no caption; behind its last one each of them does.
        """
        return self.padding_side == "left"

    def messages(self, text: str) -> list[dict[str, Any]]:
        """The chat around a caption, as the encoder's template takes it."""
        said = {"user": text} if self.system_message is None else {"system": self.system_message, "user": text}
        return [
            {"role": role, "content": [{"type": "text", "text": words}] if self.typed_parts else words}
            for role, words in said.items()
        ]


NON_COMMERCIAL_PAGE = "https://huggingface.co/black-forest-labs/FLUX.2-dev/blob/main/LICENSE.md"
NON_COMMERCIAL = Licence(
    front_matter=f"license: other\nlicense_name: flux-non-commercial-license\nlicense_link: {NON_COMMERCIAL_PAGE}\n",
    name="FLUX Non-Commercial License",
    page=NON_COMMERCIAL_PAGE,
    notice="This FLUX Model is licensed by Black Forest Labs Inc. under the FLUX Non-Commercial License. Copyright "
    "Black Forest Labs Inc. IN NO EVENT SHALL BLACK FOREST LABS INC. BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER "
    "LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH USE OF "
    "THIS MODEL.",
)

DEV = Family(
    name="dev",
    pipeline="Flux2Pipeline",
    taps=(10, 20, 30),
    system_message=SYSTEM_MESSAGE,
    padding_side="left",
    chat={"add_generation_prompt": False},
    typed_parts=True,
    weight_prefixes=("model.language_model.", "language_model.model.", "language_model.", "model.", ""),
    published=(Published("dev", "FLUX.2 [dev]", "black-forest-labs/FLUX.2-dev", (48, 8, 48), NON_COMMERCIAL),),
)
KLEIN = Family(
    name="klein",
    pipeline="Flux2KleinPipeline",
    taps=(9, 18, 27),
    system_message=None,
    padding_side="right",
    chat={"add_generation_prompt": True, "enable_thinking": False},
    typed_parts=False,
    weight_prefixes=("model.", ""),
    published=(
        Published("klein-9b", "FLUX.2 [klein] 9B", "black-forest-labs/FLUX.2-klein-9B", (32, 8, 24)),
        Published(
            "klein-4b",
            "FLUX.2 [klein] 4B",
            "black-forest-labs/FLUX.2-klein-4B",
            (24, 5, 20),
            Licence(front_matter="license: apache-2.0\n"),
        ),
    ),
)
FAMILIES = {family.name: family for family in (DEV, KLEIN)}
