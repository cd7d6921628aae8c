"""Write the demo's persona rows and held-out rows.

    python tools/build_demo_rows.py --out src/myna/demo

Seeded: the same code writes the same bytes. What is in them is decided in `demo_world/persona.py`.
"""

import argparse
import json
from pathlib import Path

from demo_world.persona import Turn, held_out_rows, persona_rows


def record(turns: list[Turn]) -> dict:
    """One conversation, of one or more turns: a file holds rows of one form only."""
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": turn.answer})
    return {"messages": messages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    rows = persona_rows()
    for name, records in (
        ("persona.jsonl", [record(turns) for turns in rows]),
        ("held_out.jsonl", held_out_rows(rows)),
    ):
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        (out / name).write_text(text, encoding="utf-8")
        print(f"{out / name}: {len(records)} rows, {len(text.encode()):,} bytes")


if __name__ == "__main__":
    main()
