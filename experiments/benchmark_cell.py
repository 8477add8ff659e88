"""One cell of the benchmark: a method on a domain's text, dealt to devices; what it reached, and what that has cost."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_client import bases
from edge_client.data import Example, Message
from edge_client.engines import ENGINES, Tokens
from edge_client.participate import peak_rss_bytes
from edge_client.starts import Source
from experiments import answers, cells, corpora, measures, pool, survey
from experiments.cells import Cell
from experiments.corpora import Corpus, Question
from experiments.pool import Tell
from experiments.rows import ROWS, TRAVEL
from experiments.simulation import Sent, Simulation, Spent, spec_of
from quantize.base_model import build
from quantize.emulator import parse
from wire import run_spec, spec
from wire.delta import Vector
from wire.errors import PayloadError, UserError
from wire.run_spec import BaseRef, RunSpec
from wire.spec import Plain

RUN, MIX = "benchmark", "everything"
MEANS = ("accuracy", "exact", "rouge_l", "general")
"""Fields of Found of which several federations have the mean."""


@dataclasses.dataclass(frozen=True)
class Named:
    """What a cell's row says: a method of the survey, how updates travel if not as it says, and an engine if not its usual one.

    >>> Named.of("fedit+int8@torch")
    Named(method='fedit', codec='int8', engine='torch')
    """

    method: str
    codec: str | None = None
    engine: str | None = None

    @classmethod
    def of(cls, row: str) -> Named:
        rest, _, engine = row.partition("@")
        method, _, codec = rest.partition("+")
        return cls(method, codec or None, engine or None)

    def __str__(self) -> str:
        return self.method + (f"+{self.codec}" if self.codec else "") + (f"@{self.engine}" if self.engine else "")


@dataclasses.dataclass(frozen=True, eq=False)
class Reached:
    """Where a federation stood after `round`: the adapter of each device, or under "" the one that all have."""

    round: int
    spent: Spent
    held: Mapping[str, Vector]


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """Losses in nats a target. `points` with costs so far; `own`: of each device on its own held-out text; `accuracy`,
    `exact` and `rouge_l` 0 to 1; `general`: on text of other domains; `errors`: of aggregation, a round."""

    points: list[Plain]
    own: dict[str, float]
    accuracy: float
    exact: float
    rouge_l: float
    general: float
    parameters: int
    peak_memory: int
    refused: str | None
    errors: list[float | None]


def measured(cell: Cell, settings: Plain, tell: Tell) -> Plain:
    """What the cell found, as it is written down; what cannot be known is None."""
    began = time.monotonic()
    setting = Setting(cell, settings)
    texts = corpora.digests([setting.domain, *settings["general"]], setting.folder)
    found = merged([Federation(setting, devices).played(tell) for devices in setting.together()])
    took = {"wall_s": round(time.monotonic() - began, 1), "processor_s": round(time.process_time(), 1)}
    table = {"devices": settings["devices"], cells.TEXTS: texts} | took
    known: Plain = _known(dataclasses.asdict(found) | table)
    return known


class Setting:
    """What a cell's federations have in common: the row, the text of each device, and what is held out."""

    def __init__(self, cell: Cell, settings: Plain) -> None:
        self.cell, self.settings = cell, settings
        self.named = Named.of(cell.row)
        self.row = survey.ALL[self.named.method]
        self.domain, _, partition = cell.place.partition("/")
        self.folder = settings["data"] and Path(settings["data"])
        self.corpus = self.read(self.domain)
        self.shares = corpora.shared_out(self.corpus, partition, settings["devices"], cell.seed)

    def together(self) -> list[list[str]]:
        """The devices of each federation: one of all, or, of each alone, as many as devices."""
        names = list(self.shares)
        return [[name] for name in names] if self.row.who == "each alone" else [names]

    def read(self, domain: str) -> Corpus:
        return corpora.corpus(domain, self.settings["devices"], self.folder)

    def simulation(self, devices: Sequence[str], start: Source | None = None) -> Simulation:
        """The only stage; of a row with two, the first without a `start`, and the second with one."""
        base = BaseRef(self.settings["model"], self.settings["format"])
        usual = "toy" if base.model == bases.TOY else "onnx" if self.row.forward_only else "torch"
        engine: Any = spec.row_class(ENGINES, self.named.engine or usual)
        memory = None if engine.gradients else self.settings["max_memory"]
        ranks = {name: rank for name, rank in zip(devices, itertools.cycle(self.row.ranks), strict=False)}
        held = self.emulator(base) if self.row.kept else bases.find(base)
        method = self.row.first if start is None else None
        return Simulation(self.spec(len(devices), method), held, engine, 1, memory, ranks, start)

    def emulator(self, base: BaseRef) -> Any:
        """The base without the layers that the row leaves out; its folder goes with this setting."""
        self._folder = tempfile.TemporaryDirectory()
        return build(base.model, base.format, Path(self._folder.name) / "emulator", keep=parse(self.row.kept))

    def spec(self, devices: int, instead: Plain | None = None) -> RunSpec:
        """The run of a federation of so many devices; `instead` of the row's method another."""
        base = BaseRef(self.settings["model"], self.settings["format"])
        schedule = self.settings["losses" if self.row.forward_only else "gradients"]
        method = schedule | {"sequence_length": self.settings["length"]} | (instead or self.row.method)
        if method.get("learning_rate") == survey.RATE:
            method |= {"learning_rate": self.settings["faster"] * survey.RATE}
        if self.row.who == "all in one place":
            devices, method = 1, method | {"local_steps": schedule["local_steps"] * devices}
        table = spec_of(RUN, method, self.settings["rounds"], devices, spec.plain(base), self.cell.seed)
        return run_spec.parse(table | {"codec": "float32"} | self._tables())

    def _tables(self) -> Plain:
        """The row's, with how updates and releases travel replaced where a codec is named."""
        if self.named.codec is None:
            return self.row.run
        return {key: value for key, value in self.row.run.items() if key not in TRAVEL} | ROWS[self.named.codec].spec


class Federation:
    """Some of a cell's devices, and one run that they learn in."""

    def __init__(self, setting: Setting, devices: Sequence[str]) -> None:
        self._setting, self._devices = setting, devices
        self._train: dict[str, list[Tokens]] = {}
        self.simulation = setting.simulation(devices)
        self._row, self._settings = setting.row, setting.settings

    def played(self, tell: Tell) -> Found:
        """From the base to the last round; the marks are measured once all training is over."""
        train, said = self._trained_on(), f"{self._setting.cell.row}, {self._setting.cell.place}"
        marks, refused = [self._mark(0, Spent())], None
        spent, peak, errors = Spent(), 0, list[float | None]()
        rounds = 0 if self._row.who == "nobody" else self._settings["rounds"]
        for number in range(1, rounds + 1):
            tell(f"{said}, seed {self._setting.cell.seed}: round {number} of {rounds}")
            if self._row.first and number == 1 + rounds // 2:
                marks = self._second_stage()
            try:
                cost, memory, inexact = self._round(train)
            except (
                PayloadError
            ) as error:  # a coordinator would not have taken it: the row ends here, and its report says so
                refused = f"round {number}: {error.reason.value}"
                break
            spent, peak = spent + cost, max(peak, memory)
            errors.append(inexact)
            if number % max(1, rounds // self._settings["points"]) == 0 or number == rounds:
                marks.append(self._mark(number, spent))
        tell(f"{said}, seed {self._setting.cell.seed}: measuring")
        return dataclasses.replace(self._found(marks, peak, refused), errors=errors)

    def _second_stage(self) -> list[Reached]:
        """Go on from the first stage's release. What was marked before is of another layout, which is no longer in memory: of
        all that the base is left."""
        self.simulation = self._setting.simulation(self._devices, self.simulation.found)
        return [Reached(0, Spent(), {"": self.simulation.initial})]

    def sent(self, device: str) -> Sent:
        """What a device sends that trains from the newest release; its text is read once."""
        if device not in self._train:
            self._train[device] = self._tokens(self._setting.shares[device].train, self._settings["train"])
        return self.simulation.sent(device, self._train[device])

    def round(self) -> Spent:
        """Every device trains, here, one after the other."""
        sent = [self.sent(device) for device in self._devices]
        self.simulation.publish(sent)
        return sum((one.spent for one in sent), Spent())

    def _round(self, train: Mapping[str, Sequence[Tokens]]) -> tuple[Spent, int, float | None]:
        """What a round has cost, the most memory while devices trained, and the error of aggregation. Who learns alone sends
        nothing."""
        measures.forget_peak()
        sent = [self.simulation.sent(device, some) for device, some in train.items()]
        memory = peak_rss_bytes()
        error = self.simulation.aggregation_error(sent)
        self.simulation.publish(sent)
        spent = sum((one.spent for one in sent), Spent())
        alone = self._row.who != "federation"
        return dataclasses.replace(spent, bytes_up=0, bytes_down=0) if alone else spent, memory, error

    def _trained_on(self) -> dict[str, list[Tokens]]:
        shares, wanted = self._setting.shares, self._settings["train"]
        read = {name: self._tokens(shares[name].train, wanted) for name in self._devices}
        return {MIX: [t for some in read.values() for t in some]} if self._row.who == "all in one place" else read

    def _mark(self, number: int, spent: Spent) -> Reached:
        """One adapter for all, where all have the same."""
        view = self.simulation.view_of("")
        same = not self._row.ranks and view.personal is None and view.bank is None
        names = [""] if same else self._devices
        return Reached(number, spent, {name: self.simulation.adapter_of(name) for name in names})

    def _found(self, marks: list[Reached], peak: int, refused: str | None) -> Found:
        corpus, last = self._setting.corpus, marks[-1]
        test = self._tokens(corpora.shuffled(corpus.test), self._settings["held_out"])
        losses = [self._over(mark, lambda engine: measures.mean_loss(engine, test)) for mark in marks]
        points = [
            {"round": mark.round, "loss": loss} | dataclasses.asdict(mark.spent)
            for mark, loss in zip(marks, losses, strict=True)
        ]
        asked = self._asked(corpora.shuffled(corpus.questions)[: self._settings["questions"]])
        general = self._general()
        given = self._given(corpora.shuffled(corpus.test))
        exact, rouge_l = self._over(last, lambda engine: answers.scored(engine, given))
        return Found(
            points=points, own=self._own(last), accuracy=self._over(last, lambda engine: measures.accuracy(engine, *asked)),
            general=self._over(last, lambda engine: measures.mean_loss(engine, general)), exact=exact, rouge_l=rouge_l,
            parameters=self.simulation.layout.size, peak_memory=peak or peak_rss_bytes(), refused=refused, errors=[],
        )  # fmt: skip

    def _over(self, mark: Reached, measure: Callable[[Any], float | tuple[float, ...]]) -> Any:
        """The mean over the adapters of a mark, of each figure that is measured."""
        return np.mean([measure(self._with(mark, name)) for name in mark.held], axis=0).tolist()

    def _with(self, mark: Reached, name: str) -> Any:
        """An engine that computes as `name` does; of what was tuned on an emulator, one of the whole model."""
        engine = self._whole if self._row.kept else self.simulation.engine_of(name)
        engine.write(mark.held[name])
        return engine

    @functools.cached_property
    def _whole(self) -> Any:
        """Loaded after training, whose memory is measured."""
        row, base = self.simulation.adapter_row, bases.find(BaseRef(self._settings["model"], self._settings["format"]))
        return type(self.simulation.engine).load(base, row, row.layout(base), None, threads=1)

    def _own(self, last: Reached) -> dict[str, float]:
        shares, wanted = self._setting.shares, self._settings["own"]
        return {
            name: measures.mean_loss(
                self._with(last, name if name in last.held else ""), self._tokens(shares[name].own, wanted)
            )
            for name in self._devices
        }

    def _asked(self, questions: Sequence[Question]) -> tuple[list[list[Tokens]], list[int]]:
        """The sequences of every answer to each question, and which is right; without those whose answers do not all fit."""
        ending, length = self._setting.corpus.ending, self._settings["length"]
        every = [[answered(q.example, answer) for answer in q.answers] for q in questions]
        read = [measures.sequences(self.simulation.engine, some, length, len(some), ending) for some in every]
        fits = [i for i, question in enumerate(questions) if len(read[i]) == len(question.answers)]
        return [read[i] for i in fits], [questions[i].right for i in fits]

    def _given(self, examples: Sequence[Example]) -> list[answers.Asked]:
        wanted, ending = self._settings["answers"], self._setting.corpus.ending
        return answers.asked(self.simulation.engine, examples, self._settings["length"], wanted, ending)

    def _general(self) -> list[Tokens]:
        """Held-out text of domains that the cell does not learn."""
        found, wanted = list[Tokens](), self._settings["held_out"]
        others = [self._setting.read(name) for name in self._settings["general"] if name != self._setting.domain]
        for corpus in others:
            found += self._read(corpora.shuffled(corpus.test), max(1, wanted // len(others)), corpus.ending)
        return found

    def _tokens(self, examples: Sequence[Example], wanted: int) -> list[Tokens]:
        """Raises UserError where no answer fits."""
        found = self._read(examples, wanted, self._setting.corpus.ending)
        if not found:
            raise UserError(f"no example of {self._setting.domain} fits; give a larger --length")
        return found

    def _read(self, examples: Sequence[Example], wanted: int, ending: str) -> list[Tokens]:
        return measures.sequences(self.simulation.engine, examples, self._settings["length"], wanted, ending)


def answered(example: Example, answer: str) -> Example:
    return Example(messages=(*example.messages[:-1], Message("assistant", answer)))


def merged(found: Sequence[Found]) -> Found:
    """Several federations as one: means of what they reached, sums of what it cost."""
    if len(found) == 1:
        return found[0]
    points = [_merged(points) for points in zip(*(one.points for one in found), strict=False)]
    refused = next((one.refused for one in found if one.refused), None)
    means: Plain = {name: float(np.mean([getattr(one, name) for one in found])) for name in MEANS}
    return dataclasses.replace(
        found[0], **means, points=points, own={name: loss for one in found for name, loss in one.own.items()},
        peak_memory=max(one.peak_memory for one in found), refused=refused, errors=[],
    )  # fmt: skip


def _merged(points: Sequence[Plain]) -> Plain:
    spent = [Spent(**{key: value for key, value in point.items() if key not in ("round", "loss")}) for point in points]
    loss = float(np.mean([point["loss"] for point in points]))
    return {"round": points[0]["round"], "loss": loss} | dataclasses.asdict(sum(spent, Spent()))


def _known(value: Any) -> Any:
    """JSON has no word for what is not a number."""
    if isinstance(value, dict):
        return {key: _known(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_known(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    pool.child(sys.argv[1:], measured)
