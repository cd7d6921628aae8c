"""`myna push` against the hub's own protocol, spoken by a small server on this machine."""

import base64
import hashlib
import io
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub.constants
import pytest
import yaml
from rich.console import Console

from myna.cli.main import main
from myna.cli.push import run as push
from myna.errors import ConfigError
from myna.lora.adapter_file import read_adapter

TOKEN = "hf_" + "x" * 34
BASE = "owner/tiny-chat"


class Hub(BaseHTTPRequestHandler):
    """The endpoints that `create_repo` and `create_commit` use; large files go by git-lfs."""

    repos: ClassVar[dict[str, dict[str, Any]]]
    models: ClassVar[dict[str, dict[str, Any]]]
    objects: ClassVar[dict[str, bytes]]
    may_write: ClassVar[bool]
    says: ClassVar[list[dict[str, str]]]
    """Of the front matter of a card: warnings, or with `refuses` errors."""
    refuses: ClassVar[bool]
    seen: ClassVar[list[str]]

    def do_GET(self) -> None:
        if not self._knows_token():
            return
        name = self.path.removeprefix("/api/models/")
        if (found := (self.models | self.repos).get(name)) is None:
            self._answer(404, {"error": "Repository not found"}, code="RepoNotFound")
        else:
            self._answer(200, {"id": name, "private": False} | found)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self._knows_token():
            return
        self.seen.append(self.path)
        repo = "/".join(self.path.removeprefix("/api/models/").split("/")[:2])
        if self.path == "/api/validate-yaml":
            said = {"errors" if self.refuses else "warnings": self.says}
            self._answer(400 if self.refuses else 200, said)
        elif not self.may_write:
            said = "You don't have the rights to write to this namespace"
            self._answer(403, {"error": said}, message=said)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            status = 409 if repo in self.repos else 200
            is_private = asked.get("private") or asked.get("visibility") == "private"
            self.repos.setdefault(repo, {"private": bool(is_private), "commits": []})
            self._answer(status, {"url": f"{self._address}/{repo}"})
        elif self.path == f"/api/models/{repo}/preupload/main":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            entries = [
                {
                    "oid": entry["oid"],
                    "size": entry["size"],
                    "actions": {"upload": {"href": f"{self._address}/lfs/{entry['oid']}"}},
                }
                for entry in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": entries})
        elif self.path == f"/api/models/{repo}/commit/main":
            lines = [json.loads(line) for line in body.splitlines()]
            self.repos[repo]["commits"].append(lines)
            address = f"{self._address}/{repo}/commit/{'a' * 40}"
            self._answer(200, {"commitUrl": address, "commitOid": "a" * 40})

    def do_PUT(self) -> None:
        body = self._read_chunks() if "Content-Length" not in self.headers else self._read()
        digest = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == digest
        self.objects[digest] = body
        self._answer(200, {})

    def _read(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    @property
    def _address(self) -> str:
        return f"http://{self.headers['Host']}"

    def _knows_token(self) -> bool:
        if self.headers["Authorization"] == f"Bearer {TOKEN}":
            return True
        said = "Invalid credentials in Authorization header"
        self._answer(401, {"error": said}, message=said)
        return False

    def _answer(self, status: int, content: object, **headers: str) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(f"X-Error-{name.capitalize()}", value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an empty hub that knows our token and one base model."""
    Hub.repos, Hub.objects, Hub.seen, Hub.may_write = {}, {}, [], True
    Hub.says, Hub.refuses = [], False
    Hub.models = {BASE: {"cardData": {"license": "apache-2.0", "tags": ["chat"]}}}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    # What huggingface_hub makes of these variables, it does when it is imported.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield address
    server.shutdown()
    thread.join()
    server.server_close()


def publish(
    run: Path, repo: str = "me/bird", *, private: bool = False, base_id: str | None = BASE
) -> str:
    console = Console(file=io.StringIO(), width=200)
    push(run, repo, private=private, base_id=base_id, console=console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def published(repo: str = "me/bird") -> dict[str, bytes]:
    """The files of the only commit."""
    ((header, *entries),) = Hub.repos[repo]["commits"]
    assert header["key"] == "header"
    files = {}
    for entry in entries:
        value = entry["value"]
        if entry["key"] == "lfsFile":
            files[value["path"]] = Hub.objects[value["oid"]]
        else:
            files[value["path"]] = base64.b64decode(value["content"])
    return files


def test_the_command_publishes_the_adapters_files_in_one_commit(
    hub: str,
    finished_run: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (finished_run / "adapter" / "notes.txt").write_text("not for everybody")
    command = ["myna", "push", str(finished_run), "me/bird", "--private", "--base-id", BASE]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert ended.value.code == 0
    assert printed.out.splitlines()[-1] == f"{hub}/me/bird"
    assert "not published: notes.txt" in printed.out
    assert "with the persona: Answer like a bird." in printed.out
    assert "note: " not in printed.out
    assert Hub.repos["me/bird"]["private"] is True
    files = published()
    assert set(files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "myna.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    folder = finished_run / "adapter"
    for name in ("adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert files[name] == (folder / name).read_bytes()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == BASE
    assert json.loads(files["myna.json"])["base_model"] == BASE
    card = files["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["base_model"], front["license"]) == (BASE, "apache-2.0")
    assert "hf download me/bird --local-dir bird" in card
    everything = b"".join(files.values())
    for private in (str(tiny_model), str(finished_run), TOKEN, "rows.jsonl line"):
        assert private.encode() not in everything
    # Here the adapter still names the folder that it can be loaded with.
    assert read_adapter(folder).base_model == str(tiny_model)


def test_what_was_published_loads(hub: str, finished_run: Path, tmp_path: Path) -> None:
    publish(finished_run)
    assert Hub.repos["me/bird"]["private"] is False
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in published().items():
        (copy / name).write_bytes(content)
    assert read_adapter(copy).base_model == BASE


def test_a_base_in_a_folder_needs_its_name_on_the_hub(
    hub: str, finished_run: Path, tiny_model: Path
) -> None:
    with pytest.raises(ConfigError) as told:
        publish(finished_run, base_id=None)
    assert f"its base is the folder {tiny_model}, which nobody else has" in str(told.value)
    assert "--base-id OWNER/NAME" in str(told.value) and Hub.repos == {}
    with pytest.raises(ConfigError, match="the hub has no model owner/typo, which would be"):
        publish(finished_run, base_id="owner/typo")
    assert Hub.repos == {}


def test_a_base_of_the_hub_is_named_as_it_is(hub: str, finished_run: Path) -> None:
    config = finished_run / "config.yaml"
    lines = config.read_text().splitlines()
    config.write_text("\n".join([f"model: {BASE}", *lines[1:]]))
    assert lines[0].startswith("model: ")
    publish(finished_run, base_id=None)
    assert json.loads(published()["adapter_config.json"])["base_model_name_or_path"] == BASE


def test_names_that_are_no_ids(hub: str, finished_run: Path) -> None:
    for repo, base in (("bird", BASE), ("a/b/c", BASE), ("me/..", BASE), ("me/bird", "tiny")):
        with pytest.raises(ConfigError, match="expected OWNER/NAME"):
            publish(finished_run, repo, base_id=base)


def test_no_token(hub: str, finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nonexistent/token")
    with pytest.raises(ConfigError, match="no hub token on this machine") as told:
        publish(finished_run)
    assert "`hf auth login`" in str(told.value)


def test_a_wrong_token(hub: str, finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ConfigError, match=r"the hub refuses me/bird \(status 401\)") as told:
        publish(finished_run)
    assert "log in again with `hf auth login`" in str(told.value)
    assert "Nothing was published" in str(told.value)


def test_no_right_to_write(hub: str, finished_run: Path) -> None:
    Hub.may_write = False
    with pytest.raises(ConfigError, match=r"the hub refuses me/bird \(status 403\)") as told:
        publish(finished_run)
    assert "You don't have the rights" in str(told.value)
    assert "The token must have the right to write there" in str(told.value)


def test_no_network(hub: str, finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="push: the hub cannot be reached: ") as told:
        publish(finished_run)
    assert "The same command tries again." in str(told.value)


def test_what_the_hub_says_of_the_card(hub: str, finished_run: Path) -> None:
    Hub.says = [{"message": "language is missing"}]
    said = publish(finished_run)
    assert "note: Warnings while validating metadata in README.md:\n- language is missing" in said
    assert said.count("note: ") == 1
    Hub.refuses = True
    with pytest.raises(ConfigError, match="the hub does not take the adapter: Invalid metadata"):
        publish(finished_run)
    assert len(Hub.repos["me/bird"]["commits"]) == 1


def test_a_public_repository_is_not_taken_for_private(hub: str, finished_run: Path) -> None:
    Hub.repos["me/bird"] = {"private": False, "commits": []}
    with pytest.raises(ConfigError, match="me/bird is on the hub already, and public"):
        publish(finished_run, private=True)
    assert Hub.repos["me/bird"]["commits"] == []
    publish(finished_run)  # another version of what is there
    assert len(Hub.repos["me/bird"]["commits"]) == 1


def test_paths_and_tokens_are_not_published(hub: str, finished_run: Path) -> None:
    path = finished_run / "adapter" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"name_or_path": "/home/me/models/tiny", "a": "/think"}))
    with pytest.raises(ConfigError, match="holds paths of this machine, which are not") as told:
        publish(finished_run)
    assert "name_or_path (/home/me/models/tiny)" in str(told.value) and "/think" not in str(told)
    path.write_text(json.dumps(settings))
    card = finished_run / "adapter" / "README.md"
    card.write_text(card.read_text() + f"\nlogged in with {TOKEN}\n")
    with pytest.raises(ConfigError, match=r"README\.md holds a hub token"):
        publish(finished_run)
    assert Hub.repos == {}


def test_only_a_finished_run_is_published(hub: str, finished_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run: expected a folder with"):
        publish(tmp_path / "nothing")
    (finished_run / "adapter").rename(tmp_path / "gone")
    with pytest.raises(ConfigError, match="this run is not finished and has no adapter yet"):
        publish(finished_run)
