"""The embedded model: a small FLUX.2 that this repository trained on pictures it drew, and what checks its drawings."""

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "model"
