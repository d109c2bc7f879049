"""Files of a line per recording, which a resumed run continues where its checkpoint was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def add_line(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line after those of earlier steps, whole or not at all; those of later steps a resumed run does again.

    Args:
        path: of the file, a JSON document a line; it is made where it is not there.
        line: plain values, "step" among them.
    """
    earlier = path.read_text().splitlines() if path.is_file() else []
    kept = [text for text in earlier if json.loads(text)["step"] < line["step"]]
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_text("\n".join([*kept, json.dumps(line)]) + "\n")
    part.replace(path)
