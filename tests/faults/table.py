"""Writes the results of the fault tests as a table: ``python -m faults.table <seen.jsonl>``."""

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
        f"Measured on {date.today()} with {os.cpu_count()} CPU cores by `make test-faults`: a tiny "
        "Gemma-3 with Ray and DeepSpeed ZeRO-3, 12 steps, a checkpoint every third step. Each run "
        "is compared with an uninterrupted run of the same recipe and corpus.",
        "",
        "| fault | result | losses and weights | seconds |",
        "|---|---|---|---|",
    ]
    for row in rows:
        same = f"identical, sha256 `{row['weights']}…`" if row.get("weights") else "–"
        lines.append(f"| {row['fault']} | {row['seen']} | {same} | {row['seconds'] or '–'} |")
    path = seen.parent.parent.parent / "docs" / "faults.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("# Results of the fault tests\n\n" + "\n".join(lines) + "\n", "utf-8")
    print(path)


if __name__ == "__main__":
    main()
