"""`myna serve`: runs as models behind OpenAI's HTTP interface.

Owns the checks before anything is loaded, the key, what is said at the start, and the end by a
signal. Requests and answers are `inference.server`'s; vLLM, where it is asked for, takes this
process over.
"""

import gc
import importlib.util
import ipaddress
import os
from collections.abc import Sequence
from typing import Literal

from myna.cli.remote_code import warn_of_remote_code
from myna.cli.terminal import error_console
from myna.errors import ConfigError

KEY_VARIABLE = "MYNA_API_KEY"
_ANY_HOST = ("0.0.0.0", "::")


def run(
    sources: Sequence[str],
    *,
    host: str,
    port: int,
    api_key: str | None,
    engine: Literal["transformers", "vllm"],
    trust_remote_code: bool,
    force_base: bool,
) -> None:
    """Serve `sources` until SIGINT or SIGTERM.

    Raises ConfigError for a host that others reach without a key, a port that is taken, and runs
    that cannot be served together.
    """
    key = api_key if api_key is not None else os.environ.get(KEY_VARIABLE)
    _check_key(host, key)
    if trust_remote_code:
        warn_of_remote_code(", ".join(sources), error_console)
    if engine == "vllm":
        _become_vllm(sources, host, port, key, trust_remote_code, force_base)
    else:
        _serve(sources, host, port, key, trust_remote_code, force_base)


def _serve(
    sources: Sequence[str],
    host: str,
    port: int,
    key: str | None,
    trust_remote_code: bool,
    force_base: bool,
) -> None:
    if not all(importlib.util.find_spec(name) for name in ("starlette", "uvicorn")):
        raise ConfigError(
            "myna serve needs packages that are not installed: pip install 'myna[serve]'"
        )
    from myna.inference.server.app import create_app
    from myna.inference.server.batching import open_engine
    from myna.inference.server.limits import Limits
    from myna.inference.server.listener import Listener, open_socket
    from myna.inference.server.names import find_runs

    limits = Limits()
    runs = find_runs(sources, trust_remote_code=trust_remote_code)
    # Before minutes of loading: the port may be taken. Early clients wait in its queue.
    with open_socket(host, port) as sock:
        engine = open_engine(
            runs,
            limits=limits,
            trust_remote_code=trust_remote_code,
            force_base=force_base,
            note=_note,
        )
        try:
            # What was loaded stays: collecting garbage need not look at it again while others wait.
            gc.collect()
            gc.freeze()
            app = create_app(engine, api_key=key, limits=limits, hosts=_hosts(host))

            def ready() -> None:
                _note(f"models: {', '.join(engine.models)}")
                # For programs that wait for it: one line, whatever the width of the terminal.
                _note(f"listening on http://{_bracketed(host)}:{sock.getsockname()[1]}")

            Listener(app, sock, limits, ready=ready, ending=engine.stop_taking).serve_forever()
        finally:
            engine.close()


def _become_vllm(
    sources: Sequence[str],
    host: str,
    port: int,
    key: str | None,
    trust_remote_code: bool,
    force_base: bool,
) -> None:
    from myna.inference.server.names import find_runs
    from myna.inference.server.vllm import plan_vllm

    runs = find_runs(sources, trust_remote_code=trust_remote_code)
    launch = plan_vllm(
        runs.base,
        runs.adapters,
        host=host,
        port=port,
        api_key=key,
        trust_remote_code=trust_remote_code,
        force_base=force_base,
    )
    for text in launch.notes:
        _note(text)
    launch.run()


def _check_key(host: str, key: str | None) -> None:
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and key):
        raise ConfigError(
            f"--api-key, or {KEY_VARIABLE}, is empty or holds characters that no header can carry; "
            "expected printable ASCII without spaces at the ends."
        )
    if key is None and not _is_loopback(host):
        raise ConfigError(
            f"--host {host} lets other machines in, and there is no key; expected --api-key KEY or "
            f"{KEY_VARIABLE}.\n  Set one, or stay on 127.0.0.1."
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _hosts(host: str) -> list[str] | None:
    """Names that the Host header may have; None, any, for a server that is reached under many."""
    from myna.inference.server.guards import LOOPBACK

    return None if host in _ANY_HOST else [*LOOPBACK, _bracketed(host).lower()]


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _note(text: str) -> None:
    error_console.print(text, markup=False, soft_wrap=True)
