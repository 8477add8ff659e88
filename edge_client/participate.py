"""The client's half of the journey, top to bottom: check in, fetch, train, encode, send, and again."""

from __future__ import annotations

import dataclasses
import sys
import time
from typing import Any

from edge_client import recording
from edge_client.banks import fitting
from edge_client.calls import Tell
from edge_client.choosing import chosen
from edge_client.engines import Engine, Tokens
from edge_client.fusion import PLAIN, Weights, best_weights, fused, has_both
from edge_client.methods import Draw, Trained, batches
from edge_client.releases import Held
from edge_client.session import Session, Work, batch_seed
from edge_client.state import DeviceState, Pending
from edge_client.transport import Connection
from edge_client.view import View, send_part
from wire import spec
from wire.codecs import State
from wire.codecs.chain import Chain
from wire.contract import Action, after
from wire.delta import Delta, Layout, Vector
from wire.errors import MachineError, Reason, Refused
from wire.messages import MAX_WEIGHT, Contribution, Finished, Metrics, Task, Wait
from wire.portions import Portion
from wire.run_spec import RunSpec
from wire.scalars import Scalars, Trajectory
from wire.split import Split

HOLD_S = 30.0
"""How long the coordinator may hold a check-in. It answers the first at once: whoever looks on sees that it is there."""
LONGEST_PAUSE_S = 900.0
"""A device asks again by then, whatever it was told."""


def participate(
    connection: Connection, session: Session, state: DeviceState, runs: tuple[str, ...], stay: bool, tell: Tell
) -> None:
    """Take tasks of `runs` (all, if empty) until they have ended; with `stay`, until interrupted."""
    seen_active, hold_s = bool(runs), 0.0
    while True:
        answer, hold_s = connection.check_in(state.device, runs, hold_s), HOLD_S
        match answer:
            case Task():
                seen_active = True
                take_part(connection, session, state, answer, tell)
            case Wait():
                seen_active = seen_active or answer.active_runs > 0
                tell("waiting", {"active_runs": answer.active_runs})
                told = answer.retry_after_s
                time.sleep(told if 0 <= told <= LONGEST_PAUSE_S else LONGEST_PAUSE_S)
            case Finished() if stay or not seen_active:
                tell("waiting", {"active_runs": 0})
                time.sleep(5.0)  # every run has ended and none is announced: look again now and then
            case Finished():
                tell("finished", {"runs": list(answer.runs)})
                return


def take_part(connection: Connection, session: Session, state: DeviceState, task: Task, tell: Tell) -> None:
    """One task, from the release to the receipt."""
    state.begin(task)
    tell("task", {"run": task.run, "round": task.round, "attempt": task.attempt, "kind": task.kind})
    try:
        run, layout = session.described(connection, task)
        if not _resend(connection, state, run, layout, task, tell):
            work = session.work(run, layout)
            pending = _compute(connection, state, work, task, tell)
            state.prepare(pending, run)
            _send(connection, state, run, layout, pending, tell)
    except BaseException:
        if not state.holds(task):  # else its place is kept, for the client that starts next to send it
            connection.leave(state.device, task)
        raise
    finally:
        state.end()


def _resend(connection: Connection, state: DeviceState, run: RunSpec, layout: Layout, task: Task, tell: Tell) -> bool:
    """An update that was written down but has no receipt: send it again. True if it was for this very task."""
    pending = state.pending(run)
    if pending is None:
        return False
    tell("resuming", {"run": run.name, "round": pending.contribution.round})
    _send(connection, state, run, layout, pending, tell)
    return (pending.contribution.round, pending.contribution.attempt) == (task.round, task.attempt)


def _compute(connection: Connection, state: DeviceState, work: Work, task: Task, tell: Tell) -> Pending:
    """Fetch, measure, train, encode: everything between the task and the first byte sent."""
    held = work.releases.fetch(connection, work.run, work.layout, work.initial, task.release_version)
    if held.release.digest != task.release_digest:
        raise Refused(Reason.BAD_DIGEST, f"release {task.release_version} is not the one the task names")
    state.saw(held.release)
    state.tunes(work.run, work.view.rank)
    work = _of_its_bank(state, work, task, held, tell)
    start = work.view.enter(held.trajectory, state.own(work.run, work.own))
    weights = _weighed(state, work, task, start)
    before = _held_out_loss(work.engine, fused(work.view, start.adapter, weights), work.held_out)
    if task.kind == "evaluate":
        return Pending(_contribution(state, work, task, b"", held, before, None, None), b"", {}, task.release_version)
    portion = _portion(state, work, task, start)
    trained = _train(connection, state, work, task, start, portion, tell)
    after = _held_out_loss(work.engine, fused(work.view, trained.adapter, weights), work.held_out)
    if hasattr(work.engine, "traffic"):
        tell("split", {"run": task.run, "round": task.round, **work.engine.traffic})
    _record(state, work, task, trained, tell)
    kept = state.codec_state(work.run, task.release_version)
    encoder = work.codec and work.run.encoder(work.codec, task.round)
    fallen = state.fallen(work.run, before[0])
    payload, codec_state = encoded(trained.update, work.view, portion, encoder, kept, fallen)
    mine = _contribution(state, work, task, payload, held, before, after, trained)
    return Pending(mine, payload, codec_state, task.release_version, work.view.own(trained.adapter))


def _record(state: DeviceState, work: Work, task: Task, trained: Trained, tell: Tell) -> None:
    """The delta, written down where that was asked for. Where it cannot be, this is said, and its update sent all the same."""
    if work.record is None or not isinstance(trained.update, Delta):
        return
    try:
        recording.write(work.record, work.view.shared_delta(trained.update), task, state.device)
    except MachineError as error:
        tell("unrecorded", {"run": task.run, "round": task.round, "detail": str(error)})


def _of_its_bank(state: DeviceState, work: Work, task: Task, held: Held, tell: Tell) -> Work:
    """The work with the bank that fits what the device trains on, where the run has several and nobody named one."""
    if work.view.bank is None or work.domain is not None:
        return work
    batch = _first_batch(state, work, task)
    view = fitting(work.view, f"{work.run.seed}/{state.device}", work.engine, held.trajectory, batch)
    tell("bank", {"run": task.run, "round": task.round, "bank": view.bank_name})
    return dataclasses.replace(work, view=view)


def _first_batch(state: DeviceState, work: Work, task: Task) -> list[Tokens]:
    """What a device trains on first in a round, by which it makes its choices before."""
    return next(batches(work.train, 1, work.method.batch, batch_seed(work.run, state.device, task.round)))


def _held_out_loss(engine: Engine, adapter: Vector, held_out: list[Tokens]) -> tuple[float, int]:
    """Mean loss in nats a token of `adapter` on the device's own held-out text, and how many tokens that is."""
    engine.write(adapter)
    total, tokens = engine.loss(held_out)
    return total / max(1, tokens), tokens


def _weighed(state: DeviceState, work: Work, task: Task, start: Trajectory) -> Weights:
    """What the shared pair and the device's own count here and now, by the text that it trains on."""
    if not has_both(work.view):
        return PLAIN
    batch = _first_batch(state, work, task)
    weights = best_weights(work.engine, work.view, start.adapter, batch, state.weights(work.run))
    state.weigh(work.run, weights)
    return weights


def _portion(state: DeviceState, work: Work, task: Task, start: Trajectory) -> Portion | None:
    """What the device sends in this round."""
    most = work.view.portion(task.round, state.device)
    if not work.view.chooses:
        return most
    batch = _first_batch(state, work, task)
    return chosen(work.view, most, work.engine, start.adapter, batch)


def _train(
    connection: Connection,
    state: DeviceState,
    work: Work,
    task: Task,
    start: Trajectory,
    portion: Portion | None,
    tell: Tell,
) -> Trained:
    def progress(step: int, steps: int, loss: float) -> None:
        connection.keep_current()
        tell("step", {"run": task.run, "round": task.round, "step": step, "steps": steps, "loss": round(loss, 4)})

    key = start.directions.key(work.run.seed, task.round, state.device)
    done = (task.round - 1) / work.run.rounds
    draw = Draw(batch_seed(work.run, state.device, task.round), key, done, work.view.tuned(portion))
    return work.method.train(work.engine, start, work.train, draw, progress)


def encoded(
    update: Delta | Scalars | Split,
    view: View,
    portion: Portion | None,
    codec: Chain | None,
    kept: State | None,
    fallen: float = 0.0,
) -> tuple[bytes, State]:
    """The payload in the form of the update, and the codec state that its receipt will confirm. `fallen`: how far the device's
    held-out loss has, in nats a token, since its first round."""
    if isinstance(update, Scalars):
        return update.encode(view.shared), {}
    assert codec is not None, "a method that makes deltas is given to runs with a codec alone"
    if isinstance(update, Split):
        return update.encode(codec, codec_state(codec, update.delta.layout, kept))
    delta = view.shared_delta(update)
    if portion is not None and view.rule is not None:
        return send_part(delta, portion, view.rule, codec, kept, fallen)
    return codec.encode(delta, codec_state(codec, delta.layout, kept))


def codec_state(codec: Chain, layout: Layout, kept: State | None) -> State:
    """The state to encode with: the one that was kept, if it is of `layout`. A device that cuts elsewhere than before starts
    anew: what it had not sent of the layers above was little."""
    fresh = codec.init(layout)
    fits = kept is not None and all(key in kept and kept[key].shape == value.shape for key, value in fresh.items())
    return kept if kept is not None and fits else fresh


def _contribution(
    state: DeviceState,
    work: Work,
    task: Task,
    payload: bytes,
    held: Held,
    before: tuple[float, int],
    after: tuple[float, int] | None,
    trained: Trained | None,
) -> Contribution:
    metrics = Metrics(
        loss_before=before[0],
        loss_after=after[0] if after else None,
        held_out_tokens=before[1],
        train_loss=trained.loss if trained else 0.0,
        train_tokens=trained.tokens if trained else 0,
        steps=trained.steps if trained else 0,
        train_seconds=trained.seconds if trained else 0.0,
        peak_rss_bytes=peak_rss_bytes(),
        bytes_up=len(payload),
        bytes_down=held.bytes,
        forwards=trained.forwards if trained else 0,
    )
    return Contribution(
        device=state.device,
        run=task.run,
        round=task.round,
        attempt=task.attempt,
        digest=spec.bytes_digest(payload) if payload else "",
        size=len(payload),
        weight=min(work.examples, MAX_WEIGHT),
        base_digest=work.run.base.digest,
        release_digest=task.release_digest,
        metrics=metrics,
    )


def _send(
    connection: Connection, state: DeviceState, run: RunSpec, layout: Layout, pending: Pending, tell: Tell
) -> None:
    """Send, and keep or drop what was written down by what the coordinator says: docs/errors.md."""
    mine = pending.contribution

    def progress(sent: int, size: int) -> None:
        tell("uploading", {"run": run.name, "round": mine.round, "sent": sent, "size": size})

    try:
        connection.send(mine, pending.payload, progress)
    except Refused as error:
        action = after(error)
        if action in (Action.NEXT, Action.DROP):
            state.discard(run.name)
        if action is not Action.NEXT:
            raise
        tell("too_late", {"run": run.name, "round": mine.round, "reason": error.reason.value, "detail": str(error)})
        return
    state.confirm(pending, run)
    tell("submitted", _summary(connection, mine, layout))


def _summary(connection: Connection, mine: Contribution, layout: Layout) -> dict[str, Any]:
    m = mine.metrics
    return {
        "run": mine.run,
        "round": mine.round,
        "kind": "train" if mine.digest else "evaluate",
        "bytes_up": m.bytes_up,
        "bytes_down": m.bytes_down,
        "wire_up": connection.sent,
        "wire_down": connection.received,
        "float32_bytes": 4 * layout.size,
        "forwards": m.forwards,
        "loss_before": m.loss_before,
        "loss_after": m.loss_after,
        "held_out_tokens": m.held_out_tokens,
        "train_loss": m.train_loss,
        "seconds": round(m.train_seconds, 3),
        "tokens_per_s": round(m.train_tokens / m.train_seconds, 1) if m.train_seconds else None,
        "peak_rss_mb": m.peak_rss_bytes >> 20,
    }


def peak_rss_bytes() -> int:
    """The largest resident size of this process so far."""
    if sys.platform == "linux":  # getrusage would count what the process that started this one used before it did
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB on the BSDs
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
