"""`myna serve` as a program: what it refuses at once, what it says, and how it ends."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from openai import OpenAI

from myna.cli.serve import run
from myna.errors import ConfigError
from tiny_model import save_tiny_run


def serve(*sources: str, **options: object) -> None:
    settings: dict = {
        "host": "127.0.0.1",
        "port": 0,
        "api_key": None,
        "engine": "transformers",
        "trust_remote_code": False,
        "force_base": False,
    }
    run(sources, **settings | options)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "127.0.0.1.evil"])
def test_a_host_that_others_reach_needs_a_key(
    tiny_model: Path, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MYNA_API_KEY", raising=False)
    with pytest.raises(ConfigError) as refused:
        serve(str(tiny_model), host=host)
    assert str(refused.value) == (
        f"--host {host} lets other machines in, and there is no key; expected --api-key KEY or "
        "MYNA_API_KEY.\n  Set one, or stay on 127.0.0.1."
    )


@pytest.mark.parametrize("key", ["", " a", "ä", "a\n"])
def test_a_key_that_no_header_can_carry(
    tiny_model: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="printable ASCII"):
        serve(str(tiny_model), api_key=key)
    monkeypatch.setenv("MYNA_API_KEY", key)
    with pytest.raises(ConfigError, match="MYNA_API_KEY, is empty or holds"):
        serve(str(tiny_model))


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(tiny_model: Path) -> None:
    from myna.inference.server.listener import open_socket

    with open_socket("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as refused:
            serve(str(tiny_model), port=port)
    assert f"127.0.0.1:{port} cannot be listened on: Address already in use" in str(refused.value)
    assert str(refused.value).endswith("--port 0 takes a free one.")


def test_missing_packages_are_named_with_their_install_command(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'myna\[serve\]'"):
        serve(str(tiny_model))


def test_it_serves_until_a_signal_and_finishes_what_it_is_writing(
    tiny_model: Path, tmp_path: Path
) -> None:
    run_folder = save_tiny_run(tiny_model, tmp_path / "voice")
    command = [sys.executable, "-m", "myna.cli.main", "serve", str(run_folder), "--port", "0"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "MYNA_API_KEY": "secret"}
    )
    try:
        assert process.stderr is not None
        said = []
        address = None
        for line in process.stderr:
            said.append(line.rstrip("\n"))
            if found := re.fullmatch(r"listening on (http://127\.0\.0\.1:\d+)", said[-1]):
                address = found[1]
                break
        assert address is not None, said
        assert said == ["models: voice, base", f"listening on {address}"]
        with OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0) as client:
            stream = client.chat.completions.create(
                model="voice",
                messages=[{"role": "user", "content": "Tell me"}],
                max_tokens=150,
                temperature=2.0,
                stream=True,
            )
            chunks = iter(stream)
            next(chunks)
            process.send_signal(signal.SIGTERM)
            assert list(chunks)[-1].choices[0].finish_reason in ("stop", "length")
        assert process.wait(60) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
