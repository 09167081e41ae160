"""mkdocs hook: every file of docs/decisions stands in the navigation, in order of its number."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    (section,) = [entry["Decisions"] for entry in config["nav"] if "Decisions" in entry]
    for path in sorted((Path(config["docs_dir"]) / "decisions").glob("[0-9]*.md")):
        section.append(f"decisions/{path.name}")
    return config
