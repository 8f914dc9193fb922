"""Writes what the fault tests saw as a table: ``python -m faults.table <seen.jsonl>``."""

from __future__ import annotations

import json
import os
import re
import sys
from datetime import date
from pathlib import Path


def main() -> None:
    seen = Path(sys.argv[1])
    rows = [json.loads(line) for line in seen.read_text("utf-8").splitlines()]
    rows.sort(key=lambda row: int((re.match(r"(\d+) ·", row["fault"]) or (0, 99))[1]))
    lines = [
        f"Seen on {date.today()}, {os.cpu_count()} CPU cores, by `make test-faults`: a tiny "
        "Gemma-3 under Ray and DeepSpeed ZeRO-3, 12 steps, a checkpoint every third. Each is held "
        "against the undisturbed run of its own recipe and corpus.",
        "",
        "| fault | what was seen | losses and weights | seconds |",
        "|---|---|---|---|",
    ]
    for row in rows:
        same = f"as undisturbed, sha256 `{row['weights']}…`" if row.get("weights") else "–"
        lines.append(f"| {row['fault']} | {row['seen']} | {same} | {row['seconds'] or '–'} |")
    path = seen.parent.parent.parent / "docs" / "faults.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("# Faults, and what came of them\n\n" + "\n".join(lines) + "\n", "utf-8")
    print(path)


if __name__ == "__main__":
    main()
