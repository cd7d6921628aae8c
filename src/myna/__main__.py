"""The program `myna`, also as `python -m myna`: the command line, or what it lacks.

Owns the one case in which there is no command line: packages that it is made of are not there,
because an installation was interrupted. Any command then says what is missing.
"""

import sys


def main() -> None:
    """Run the command line; exit 2 where this installation is not complete."""
    try:
        from myna.cli.main import main as run
    except ImportError:
        from myna.installation import incomplete

        text = incomplete()
        if text is None:
            raise
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
