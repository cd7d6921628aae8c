"""A command and a webhook are told; neither can fail a run."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from myna.cli.notify import notify

MESSAGE = {"run": "runs/a", "outcome": "failed", "message": "step 3: 损失 is nan"}


def test_a_command_gets_the_message_on_its_standard_input(tmp_path: Path) -> None:
    script = tmp_path / "tell.py"
    script.write_text(f"import sys; open({str(tmp_path / 'told')!r}, 'w').write(sys.stdin.read())")
    assert notify(f"{sys.executable} {script}", MESSAGE) is None
    assert json.loads((tmp_path / "told").read_text()) == MESSAGE


def test_no_shell_reads_the_command(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    notify(f"{sys.executable} -c pass ; touch {canary}", MESSAGE)
    notify(f"{sys.executable} -c pass $(touch {canary})", MESSAGE)
    assert not canary.exists()


def test_a_command_that_fails_or_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    fails = tmp_path / "fails.py"
    fails.write_text("import sys; sys.exit('no such room')")
    assert notify(f"{sys.executable} {fails}", MESSAGE) == (
        "notify: the command ended with 1: no such room"
    )
    said = notify("no-such-command-anywhere", MESSAGE)
    assert said is not None and said.startswith("notify: ") and "no-such-command" in said
    assert (notify("'unclosed", MESSAGE) or "").startswith("notify: ")


def test_a_webhook_gets_a_post() -> None:
    received: list[tuple[str, str, bytes]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.path, self.headers["Content-Type"], body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hook)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        assert notify(f"http://127.0.0.1:{server.server_port}/hook", MESSAGE) is None
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    ((path, kind, body),) = received
    assert (path, kind, json.loads(body)) == ("/hook", "application/json", MESSAGE)
    said = notify(f"http://127.0.0.1:{server.server_port}/hook", MESSAGE)
    assert said is not None and said.startswith("notify: ")
