"""Every adapter, tuned in a federation of real processes, taken home, and loaded by what knows nothing of edgetune.

    python -m tests.e2e.exports                         # make exports; SmolLM2-135M, NF4
    python -m tests.e2e.exports --only prefix norms --keep DIR

The loss that the devices gave for the newest release, and that of the exported folder in plain transformers (and peft, where it
knows the adapter), in float32 on the same held-out sequences, must agree to 1e-3 nats a target: docs/exports.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edge_client import data
from edge_client.engines.text import Text
from edge_client.transport import Connection
from quantize import cached_base
from tests.e2e.test_real_model import texts
from tests.processes import CoordinatorProcess, edgetune, environment, finished, start_client
from wire.messages import RunStatus

MODEL, FORMAT = "smollm2-135m", "nf4"
FRACTION, LENGTH = 0.25, 48
AGREES, MOVED = 1e-3, 0.02
"""Nats: how far losses may be apart, and what a round must have changed, so that they agree on something."""
BANKS = """\
[portions]
id = "bank"
names = ["first", "second"]
"""
OUTSIDE = """\
import json, sys
import torch, transformers
from pathlib import Path
folder, sequences = Path(sys.argv[1]), json.load(open(sys.argv[2]))
if (folder / "load.py").exists():
    sys.path.insert(0, str(folder))
    import load
    model = load.model()
elif (folder / "adapter_config.json").exists():
    import peft
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(folder / "base"), folder)
else:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
total = count = 0
for ids in map(torch.tensor, sequences):
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, -len(ids):]  # what comes before a text predicts nothing
    total += float(torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum"))
    count += len(ids) - 1
ours = [m for m in sys.modules if m.split(".")[0] in ("edgetune", "edge_client", "wire", "quantize")]
print(json.dumps({"loss": total / count, "count": count, "ours": ours}))
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """An adapter's table, the forms it is exported in, and what a run of it needs. `own`: devices keep a part, so that there is
    only their export; `refused`: what `run create` says on this base; `domain`: the bank that is tuned, of a run of two."""

    adapter: Mapping[str, Any]
    to: tuple[str, ...]
    rate: float = 3e-3
    aggregator: str = "mean"
    devices: int = 1
    own: bool = False
    refused: str = ""
    domain: str = ""


LORA, BOTH = {"id": "lora", "rank": 4}, ("peft", "merged")
CASES: Mapping[str, Case] = {
    "lora": Case(LORA, BOTH),
    "lora-b": Case(LORA | {"tuned": "B"}, BOTH),
    "lora-history": Case(LORA | {"history": 16}, BOTH, aggregator="fedex", devices=2),
    "lora-leading": Case(LORA | {"start": "leading"}, BOTH),
    "lora-keeps-b": Case(LORA | {"keeps": "B"}, BOTH, own=True),
    "lora-keeps-pair": Case(LORA | {"keeps": "pair"}, BOTH, own=True),
    "lora_sb": Case({"id": "lora_sb", "rank": 8}, BOTH, 3e-2),
    "lora-bank": Case(LORA, BOTH, domain="second"),
    "norms": Case({"id": "norms"}, ("merged",), 3e-2),
    "biases": Case({"id": "biases"}, (), refused="bias"),
    "entries": Case({"id": "entries", "density": 0.01}, ("merged",)),
    "bottleneck": Case({"id": "bottleneck", "width": 8}, ("torch",)),
    "prompt": Case({"id": "prompt", "length": 8}, ("peft",), 1e-2),
    "projected_prompt": Case({"id": "projected_prompt", "length": 8, "dimensions": 64}, ("peft",), 1e-1),
    "prefix": Case({"id": "prefix", "length": 8}, ("peft",), 1e-2),
}
"""Every row of ADAPTERS, and what its fields make of it."""


@dataclasses.dataclass(frozen=True)
class Line:
    """Losses in nats a target; `same`: whether `run export` and `client export` wrote the same tensors, where both do."""

    case: str
    to: str
    parameters: int
    before: float
    inside: float
    outside: float
    same: bool

    @property
    def good(self) -> bool:
        return abs(self.outside - self.inside) < AGREES and abs(self.inside - self.before) > MOVED and self.same


def spec(name: str, case: Case) -> str:
    """A run of one round."""
    table = ", ".join(f"{key} = {json.dumps(value)}" for key, value in case.adapter.items())
    return f"""\
name = "{name}"
rounds = 1
codec = "float32"
aggregator = {{ id = "{case.aggregator}" }}
[base]
model = "{MODEL}"
format = "{FORMAT}"
[cohort]
goal = {case.devices}
minimum = {case.devices}
[method]
id = "lora"
adapter = {{ {table} }}
local_steps = 6
batch = 2
sequence_length = {LENGTH}
learning_rate = {case.rate}
[evaluation]
fraction = {FRACTION}
max_sequences = 2
{BANKS if case.domain else ""}"""


def played(name: str, case: Case, address: str, folder: Path) -> Iterator[Line]:
    """One case: a federation, and each export of it."""
    (folder / f"{name}.toml").write_text(spec(name, case))
    made = edgetune("run", "create", folder / f"{name}.toml", "--coordinator", address, timeout_s=600)
    assert (made.returncode == 2 and case.refused in made.stderr) if case.refused else made.returncode == 0, made.stderr
    if case.refused:
        print(f"{name}: {made.stderr.strip()}", flush=True)
        return
    who = [f"device-{n}" for n in range(case.devices)]
    more = ("--run", name, *domain(case))
    clients = [start_client(address, texts(folder / f"{one}.jsonl", one), folder / one, *more, name=one) for one in who]
    finished(clients, timeout_s=900)
    (folder / "sequences.json").write_text(
        json.dumps([ids for one in who for ids in held_out(folder / f"{one}.jsonl")])
    )
    with Connection(address) as connection:
        ended = connection.status(name)
    for to in case.to:
        yield exported(name, case, to, ended, address, folder)


def domain(case: Case) -> tuple[str, ...]:
    return ("--domain", case.domain) if case.domain else ()


def held_out(file: Path) -> list[list[int]]:
    """The sequences that a device measured."""
    _, examples = data.split(data.read(file), FRACTION, 0)
    return [tokens.ids.tolist() for tokens in Text(cached_base(MODEL, FORMAT).folder).sequences(examples, LENGTH)[:2]]


def exported(name: str, case: Case, to: str, ended: RunStatus, address: str, folder: Path) -> Line:
    """One folder taken home by each command that can, and what the first of them says of the held-out text."""
    mine: list[str | Path] = ["client", "export", "--run", name, "--state", folder / "device-0"]
    commands: list[list[str | Path]] = [mine] if case.own else [["run", "export", name], mine]
    made = [folder / f"{name}-{to}-{n}" for n in range(len(commands))]
    for command, out in zip(commands, made, strict=True):
        done = edgetune(*command, "--to", to, out, "--coordinator", address, *domain(case), timeout_s=600)
        assert done.returncode == 0, done.stderr
    line = [sys.executable, "-c", OUTSIDE, str(made[0]), str(folder / "sequences.json")]
    said = subprocess.run(line, capture_output=True, text=True, check=True, env=environment(), cwd=folder)
    theirs = json.loads(said.stdout.splitlines()[-1])
    first, last = ended.releases
    assert theirs["ours"] == [] and theirs["count"] == last.held_out_tokens
    same = len({digest(out) for out in made}) == 1
    for out in made[1:]:
        shutil.rmtree(out)
    before, inside = first.held_out_loss or 0.0, last.held_out_loss or 0.0
    return Line(name, to, ended.parameters, before, inside, theirs["loss"], same)


def digest(folder: Path) -> str:
    """Of the tensors in a folder."""
    files = sorted(folder.rglob("*.safetensors"))
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where to leave the exported folders")
    args = parser.parse_args()
    good = True
    with tempfile.TemporaryDirectory() as made, CoordinatorProcess(Path(made) / "store") as coordinator:
        for name in args.only:
            folder = (args.keep or Path(made)) / name
            folder.mkdir(parents=True)
            for line in played(name, CASES[name], coordinator.address, folder):
                good = good and line.good
                print(json.dumps(dataclasses.asdict(line) | {"good": line.good}), flush=True)
            if args.keep is None:
                shutil.rmtree(folder)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
