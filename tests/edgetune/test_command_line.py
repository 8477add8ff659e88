from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import CoordinatorProcess, edgetune

INVITATION = f"edgetune://127.0.0.1:9/{'A' * 43}/{'A' * 22}"
ROOT = Path(__file__).parents[2]
PACKAGES = ("edgetune", "experiments", "edge_client", "coordinator", "wire", "quantize", "protos")
COMMANDS = [
    [],
    ["demo"],
    ["quantize"],
    ["client"],
    *(["client", action] for action in ("join", "enroll", "status", "leave", "generate", "export", "doctor")),
    ["coordinator"],
    *(["coordinator", action] for action in ("serve", "init", "invite", "devices", "revoke")),
    ["run"],
    *(["run", action] for action in ("create", "list", "status", "watch", "verify", "export")),
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_examples(words: list[str]) -> None:
    done = edgetune(*words, "--help")
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout


def test_help_loads_neither_torch_nor_grpc() -> None:
    probe = (
        "import sys, contextlib, io\n"
        "from edgetune.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    main(['client', 'join', '--help'])\n"
        "print([m for m in ('torch', 'grpc', 'transformers') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_client_that_shows_json_loads_nothing_that_it_does_not_need() -> None:
    needless = (
        "tqdm",
        "quantize",
        "google.rpc",
        "grpc_status",
        "cryptography",
        "tomllib",
        "shutil",
        "zstandard",
        "psutil",
    )
    probe = (
        "import sys\n"
        "before = set(sys.modules)  # what measures coverage loads things of its own\n"
        "from edge_client import cli, engines, methods, participate, progress, session, state, transport\n"
        "from edge_client.engines import toy\n"
        "from edge_client.methods import lora\n"
        f"print([m for m in {needless} if m in set(sys.modules) - before])\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "status", "x", "--coordinator", "127.0.0.1:1"], "127.0.0.1:1"),
        (["run", "verify", "x", "--store", "/nowhere"], "no coordinator's store"),
        (["run", "create", "/nowhere.toml"], "no such file"),
        (["quantize", "no-such-model", "--out", "/tmp/never"], "no-such-model"),
        (["client", "join", "--data", "/nowhere.jsonl"], "no such file"),
        (["client", "status", "--name", "Bad Name"], "--name"),
        (["demo", "--data", "/nowhere.jsonl"], "no such file"),
        (["demo", "--model", "no-such-model"], "no-such-model"),
        (["demo", "--method", "zo", "--downlink-codec", "ecsq"], "which no codec shortens"),
        (["coordinator", "serve", "--listen", "127.0.0.1:99999"], "argument --listen: '127.0.0.1:99999': a port is"),
        (["coordinator", "serve", "--metrics", "65500"], "argument --metrics: '65500': a port for numbers is"),
        (["coordinator", "invite", "--quota", "-1"], "argument --quota: '-1': a quota is 1 to 1,000,000"),
        (["coordinator", "invite", "--quota", "9" * 30], "a quota is 1 to 1,000,000"),
        (["run", "list", "--coordinator", "http://foo"], "argument --coordinator: 'http://foo': expected HOST:PORT"),
        *(
            (
                ["run", action, "x", *more, "--release", number],
                f"argument --release: '{number}' is not the number of a release",
            )
            for action, more in (("export", ["out", "--to", "peft"]), ("replay", []))
            for number in ("-1", "9" * 12)
        ),
        (["client", "export", "--run", "x", "out", "--to", "peft", "--release", "-1"], "argument --release: '-1'"),
        (["client", "generate", "--run", "x", "hi", "--release", "-1"], "argument --release: '-1'"),
        (["client", "enroll", INVITATION, "--name", "", "--state", "/nowhere"], "argument --name: ''"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else None,
)
def test_what_cannot_be_done_is_one_line_without_a_traceback(words: list[str], said: str, tmp_path: Path) -> None:
    extra = ["--out", str(tmp_path / "out")] if words[0] == "demo" else []
    done = edgetune(*words, *extra)
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("edgetune")]
    assert len(errors) == 1 and not done.stdout


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["run", "status"], 2, "edgetune run status: the following arguments are required: RUN"),
        (["client", "join", "--data", "/nowhere.jsonl"], 2, "/nowhere.jsonl: no such file"),
        (["run", "list", "--coordinator", "127.0.0.1:1"], 1, "no coordinator answers at 127.0.0.1:1"),
        (["quantize", "no-such-model", "--out", "/tmp/never"], 2, "no-such-model"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else None,
)
def test_an_error_is_one_object_where_json_is_shown(words: list[str], code: int, said: str) -> None:
    done = edgetune(*words, "--json")
    shown = json.loads(done.stdout)
    assert (done.returncode, shown["event"]) == (code, "ended") and said in shown["error"]
    assert "edgetune" in done.stderr and "Traceback" not in done.stderr  # people read on, too


@pytest.mark.parametrize("words", [["run", "list"], ["coordinator", "devices"], ["coordinator", "serve"]], ids=" ".join)
def test_an_identity_that_is_named_is_not_left_out(words: list[str], tmp_path: Path) -> None:
    done = edgetune(*words, "--insecure", "--identity", tmp_path)
    assert done.returncode == 2 and "leave one of them out" in done.stderr


def test_an_identity_that_is_found_and_left_out_is_said(tmp_path: Path) -> None:
    made = json.loads(edgetune("coordinator", "init", "--dir", tmp_path / "identity", "--json").stdout)
    shutil.copytree(made["admin"], tmp_path / "state" / "identity")
    nobody = ["--insecure", "--coordinator", "127.0.0.1:1"]
    with CoordinatorProcess(tmp_path, "127.0.0.1:0", "--insecure") as open_to_all:
        assert open_to_all.event("insecure")["identity"] == made["identity"]
    done = edgetune("client", "generate", "Hm?", "--run", "r", "--state", tmp_path / "state", *nobody)
    assert done.returncode == 1 and f"the identity in {tmp_path / 'state' / 'identity'} is not used" in done.stderr


@pytest.mark.parametrize(("given", "name"), [("münchen.de", "xn--mnchen-3ya.de"), ("::2", "::2")])
def test_an_authority_is_made_for_names_that_certificates_have(given: str, name: str, tmp_path: Path) -> None:
    done = edgetune("coordinator", "init", "--dir", tmp_path / "identity", "--host", given, "--json")
    assert json.loads(done.stdout)["hosts"][0] == name
    assert [path.name for path in tmp_path.iterdir()] == ["identity"]


@pytest.mark.parametrize("given", ["bad host!", "", "a" * 300])
def test_an_authority_for_no_host_is_refused_and_leaves_nothing(given: str, tmp_path: Path) -> None:
    done = edgetune("coordinator", "init", "--dir", tmp_path / "identity", "--host", given)
    assert done.returncode == 2 and "argument --host" in done.stderr and "expected a host name" in done.stderr
    assert not list(tmp_path.iterdir())


def test_json_is_one_object_for_scripts(tmp_path: Path) -> None:
    done = edgetune("client", "status", "--state", tmp_path / "s", "--name", "me", "--json")
    assert json.loads(done.stdout)["device"] == "me"


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]


def test_nothing_unpickles() -> None:
    """No pickle, no torch.load, no numpy.load that could: bytes from elsewhere must never become code."""
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
                owner = ast.unparse(node.func.value)
                assert owner != "torch", path
                if owner in ("np", "numpy"):
                    assert any(k.arg == "allow_pickle" and ast.unparse(k.value) == "False" for k in node.keywords), path


def test_sources_are_found() -> None:
    assert len(sources()) > 50


@pytest.mark.parametrize(
    ("absent", "words", "said"),
    [
        ("psutil", ["client", "doctor", "--quick"], "edgetune[client]"),
        ("cryptography", ["client", "enroll", INVITATION], "edgetune[identity]"),
        ("torch", ["client", "doctor", "--engine", "torch"], "edgetune[torch]"),
        ("matplotlib", ["demo"], "edgetune[demo]"),
    ],
)
def test_a_package_that_is_missing_is_said_with_the_line_that_installs_it(
    absent: str, words: list[str], said: str, tmp_path: Path
) -> None:
    """The package is hidden as an installation without its extra would lack it."""
    hidden = (
        "import importlib.util, sys\n"
        f"sys.modules[{absent!r}] = None\n"
        "found = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *a: None if name == {absent!r} else found(name, *a)\n"
        "from edgetune.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", hidden, *words], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
