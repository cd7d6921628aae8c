"""A coverage-guided run of the reader: `python tests/fuzz/atheris_reading.py -max_total_time=3600`.

For a nightly job. atheris is no dependency of the tests (it has no wheels for every platform):
`pip install atheris` first. The first byte of an input picks the name of the file, the rest is its
content; the property is `reading.check_reading`.
"""

import sys
import tempfile
from pathlib import Path

try:
    import atheris
except ImportError:
    sys.exit("atheris is not installed: pip install atheris")

with atheris.instrument_imports(include=["myna"]):
    from reading import NAMES, check_reading

FOLDER = tempfile.TemporaryDirectory()


def test_one_input(data: bytes) -> None:
    if data:
        path = Path(FOLDER.name) / NAMES[data[0] % len(NAMES)]
        path.write_bytes(data[1:])
        check_reading(path)


if __name__ == "__main__":
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
