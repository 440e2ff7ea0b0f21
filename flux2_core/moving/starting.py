"""A configuration to begin with: what is to be learned, and on which card; the figures are those of the guides.

They agree on rank 16 to 32, a rate of 1e-4 and guidance 1 while training, on 15 to 60 pictures at 768 to 1024 pixels,
and on previews and checkpoints each 250 steps. Where the base lies, and in how many bits, the planner finds out.
"""

from __future__ import annotations

import json
from typing import NamedTuple

MODEL = "black-forest-labs/FLUX.2-dev"


class Goal(NamedTuple):
    """What is to be learned."""

    steps: int
    pictures: str
    """How many, and how they are captioned."""
    trigger: str
    class_name: str
    prompts: tuple[str, ...]


class Card(NamedTuple):
    """What a card has room and time for."""

    rank: int
    batch_size: int
    resolutions: tuple[int, ...]


GOALS = {
    "style": Goal(
        1500,
        "15 to 30 pictures, each with a .txt that says what is in it and nothing of how it is painted",
        "ohwx style",
        "photo",
        ("[trigger], a woman on a bench in a park", "a woman on a bench in a park"),
    ),
    "character": Goal(
        2000,
        "20 to 60 pictures of many sides, lights and places, each with a .txt such as: [trigger] a woman in a market",
        "ohwx",
        "person",
        ("[trigger] in the snow", "a portrait of a person"),
    ),
    "object": Goal(
        2000,
        "20 to 40 pictures from all sides, each with a .txt such as: a photo of [trigger] on a table",
        "ohwx thing",
        "thing",
        ("a photo of [trigger] on a beach", "a photo of a thing on a beach"),
    ),
    "edit": Goal(
        2500,
        "50 to 200 pictures as they are to become, each with a .txt that is the instruction",
        "",
        "",
        ("turn the picture into a watercolour",),
    ),
}
CARDS = {
    24: Card(16, 1, (768,)),
    48: Card(32, 1, (768, 1024)),
    80: Card(32, 2, (768, 1024)),
    141: Card(32, 4, (768, 1024)),
}


def begin(goal: str, card: int, data: str) -> list[str]:
    """The configuration as lines of commented TOML."""
    what, room, edits = GOALS[goal], CARDS[card], goal == "edit"
    folder = f"{data.rstrip('/')}/after" if edits else data
    lines = [
        f"# {goal} on a card of {card} GiB; `cacheloom plan` says what it takes, docs/config.md what else there is",
        f'run = "{goal}"',
        "",
        "[model]",
        f'path = "{MODEL}"  # accept the licence on its page and set HF_TOKEN',
        "",
        "[[data]]",
        f"path = {json.dumps(folder)}  # {what.pictures}",
    ]
    if edits:
        lines.append(
            f"references = [{json.dumps(data.rstrip('/') + '/before')}]  # the same as they were, by file name"
        )
    else:
        lines.append(f'trigger = "{what.trigger}"  # the word that calls it: a rare one')
        lines.append(f'class_name = "{what.class_name}"  # what it is one of, for preservation')
    lines += [f"resolutions = {list(room.resolutions)}", "", "[lora]", f"rank = {room.rank}", "", "[train]"]
    lines += [
        f"steps = {what.steps}  # look at the previews: fewer are often enough",
        f"batch_size = {room.batch_size}",
    ]
    lines += [] if edits else ['preservation = "dop"  # prompts without the trigger stay as the base model draws them']
    lines += ["", "[noise]", 'distribution = "weighted"  # as AI Toolkit advises for FLUX.2', "", "[validate]"]
    lines += [f"prompts = {json.dumps(what.prompts, ensure_ascii=False)}", f"size = {min(room.resolutions)}", ""]
    return [*lines, "[cluster]", f"gpu_memory = {card}  # GiB; remove it where the card is at hand"]
